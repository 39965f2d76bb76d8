"""A short training run on images."""

from pathlib import Path
from typing import Any

from nmt.data.options import BatchingOptions
from nmt.options import CheckpointOptions, OptimizationOptions, TrainConfig
from nmt.vision.options import ImageClassificationOptions

WITH_BATCH_NORM = {"model": "timm/test_byobnet", "image_size": 32}


def config(
    save_dir: Path, folders: dict[str, Path], **changes: Any
) -> TrainConfig[ImageClassificationOptions]:
    batching = {"max_tokens": None, "batch_size": 8, "required_batch_size_multiple": 1}
    optimization = {"optimizer": "sgd", "lr": 0.05, "lr_scheduler": "constant", "warmup_updates": 0}
    return TrainConfig(
        task="image_classification",
        task_options=ImageClassificationOptions(**folders, **(WITH_BATCH_NORM | changes.pop("task", {}))),
        save_dir=save_dir,
        batching=BatchingOptions(**(batching | changes.pop("batching", {}))),
        optimization=OptimizationOptions(**(optimization | changes.pop("optimization", {}))),
        checkpoints=CheckpointOptions(best_checkpoint_metric="accuracy"),
        device="cpu",
        log_interval=1,
        **changes,
    )
