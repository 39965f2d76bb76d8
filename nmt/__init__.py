"""Train translation models from raw text, and translate with them.

    import nmt
    config = nmt.train_config(data="DATA", save_dir="RUN", max_update=10_000)  # the options of nmt-train
    result = nmt.train(config)                                                 # what nmt-train does
    nmt.Translator.load(result.best).translate(["A dog runs."])

The names are looked up when they are first used, so that `import nmt` does not load torch.
"""

import os
from typing import TYPE_CHECKING, Any

from nmt.prepared_shapes import keep_prepared_shapes

keep_prepared_shapes(16)
# Tensors of 2 MB and more begin at huge pages: what one batch frees fits the next one better.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# What PyTorch's C++ warns of, each rank for itself, is about calls in here, such as an option of DDP.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
__all__ = ["TrainingResult", "Translator", "train", "train_config"]

if TYPE_CHECKING:
    from nmt.options import train_config
    from nmt.train_loop import TrainingResult, train
    from nmt.translation.translator import Translator


def __getattr__(name: str) -> Any:
    if name == "train_config":
        from nmt.options import train_config

        return train_config
    if name in ("TrainingResult", "train"):
        from nmt import train_loop

        return getattr(train_loop, name)
    if name == "Translator":
        from nmt.translation.translator import Translator

        return Translator
    raise AttributeError(f"module `nmt` has no attribute `{name}`")
