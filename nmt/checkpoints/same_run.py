"""Whether a checkpoint belongs to the run that is to go on from it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nmt.checkpoints.model_folder import load_config
from nmt.config.mapping import changed_fixed_options
from nmt.errors import UserError
from nmt.options import TrainConfig
from nmt.task import Task
from nmt.task_extras import is_same_asset


def refuse_other_run(task: Task[Any], config: TrainConfig[Any], folder: Path) -> None:
    """Raise `UserError` if a checkpoint has another model, task or vocabulary than the configuration."""
    for name, before, now in changed_fixed_options(load_config(folder), config):
        raise UserError(
            f"`{name}` may not change when a run is resumed: it was {before} in `{folder}`, but is {now}. "
            "Set it back or name another `save-dir`."
        )
    with TemporaryDirectory() as temporary:
        task.save_assets(Path(temporary))
        for path in sorted(Path(temporary).rglob("*")):
            before_path = folder / path.relative_to(temporary)
            if path.is_file() and not (before_path.is_file() and is_same_asset(task, before_path, path)):
                raise UserError(
                    f"`{path.name}` of the data must be the one that the run began with, but differs from "
                    f"`{before_path}`. Use the same data or name another `save-dir`."
                )
