"""The options of nmt-generate and nmt-average. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from nmt.errors import UserError
from nmt.generation.options import DecodingOptions


@dataclass(frozen=True)
class GenerateOptions:
    """What to translate with which model, and how to search."""

    model: Path
    """The model folder, such as RUN/checkpoints/best; it is all that translating needs."""
    input: Path | None = None
    """Text to translate, a sentence a line (.gz too); standard input if none is named."""
    output: Path | None = None
    """Where to write the translations, `nbest` lines for a line; standard output if none is named."""
    reference: Path | None = None
    """Reference translations, as many lines as the input: BLEU and chrF of the best ones are printed."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    buffer_size: int = 10_000
    """Lines that are read, sorted by length and translated before they are written, in their own order."""
    max_tokens: int = 2048
    """Largest batch: its sentences times the pieces of the longest one. It changes the speed alone."""
    batch_size: int | None = None
    """Most sentences of a batch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    num_threads: int | None = None
    """Threads for the CPU; all cores if it is left out."""

    def check(self) -> None:
        """Raise `UserError` for sizes below 1, and for an output that would overwrite what is being read."""
        for name in ("buffer_size", "max_tokens", "batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name.replace('_', '-')}` must be at least 1, but is {value}.")
        for name, path in (("input", self.input), ("reference", self.reference)):
            if path is not None and self.output is not None and path.resolve() == self.output.resolve():
                raise UserError(f"`output` must be another file than `{name}`, but both are {path}.")


@dataclass(frozen=True)
class AverageOptions:
    """Which checkpoints to average, and where to write the result."""

    checkpoints: tyro.conf.Positional[Path]
    """The `checkpoints` folder of a run."""
    output: Path
    """The model folder to write; it must not exist."""
    last: int = 5
    """Average this many of the newest checkpoints."""

    def check(self) -> None:
        """Raise `UserError` for less than one checkpoint."""
        if self.last < 1:
            raise UserError(f"`last` must be at least 1, but is {self.last}.")
