"""Train translation models from raw text, and translate with them.

    import nmt
    best = nmt.train(config)                            # what nmt-train does; config is an nmt.options.TrainConfig
    nmt.Translator.load(best).translate(["A dog runs."])

Both names are looked up when they are first used, so that `import nmt` does not load torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Translator", "train"]

if TYPE_CHECKING:
    from nmt.train_loop import train
    from nmt.translation.translator import Translator


def __getattr__(name: str) -> Any:
    if name == "train":
        from nmt.train_loop import train

        return train
    if name == "Translator":
        from nmt.translation.translator import Translator

        return Translator
    raise AttributeError(f"module `nmt` has no attribute `{name}`")
