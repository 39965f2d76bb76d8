"""Train translation models from raw text, and translate with them.

    import nmt
    nmt.preprocess(source_lang="en", target_lang="de", trainpref="train", validpref="valid", destdir="DATA")
    config = nmt.train_config(data="DATA", save_dir="RUN", max_update=10_000)  # the options of nmt-train
    result = nmt.train(config)                                                 # what nmt-train does
    nmt.average("RUN", "MODEL", last=5)
    translations = nmt.Translator.load("MODEL").translate(["A dog runs."])
    nmt.score(translations, ["Ein Hund läuft."])                               # BLEU, chrF and TER

The names are looked up when they are first used, so that `import nmt` does not load torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from nmt.system.prepared_shapes import keep_prepared_shapes

keep_prepared_shapes(16)
# Tensors of 2 MB and more begin at huge pages, so that memory freed by one batch fits the next one better.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# PyTorch's C++ warnings, which every rank prints, are about calls in this package, such as an option of DDP.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
__all__ = [
    "Request",
    "Score",
    "TrainingResult",
    "Translator",
    "UserError",
    "average",
    "preprocess",
    "score",
    "train",
    "train_config",
]

if TYPE_CHECKING:  # what editors and type checkers see
    from nmt.errors import UserError
    from nmt.options import train_config
    from nmt.python_api import average, preprocess, score
    from nmt.train_loop import TrainingResult, train
    from nmt.translation.request import Request
    from nmt.translation.scoring import Score
    from nmt.translation.translator import Translator

_PLACES = {
    "Request": "nmt.translation.request",
    "Score": "nmt.translation.scoring",
    "TrainingResult": "nmt.train_loop",
    "Translator": "nmt.translation.translator",
    "UserError": "nmt.errors",
    "average": "nmt.python_api",
    "preprocess": "nmt.python_api",
    "score": "nmt.python_api",
    "train": "nmt.train_loop",
    "train_config": "nmt.options",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module `nmt` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
