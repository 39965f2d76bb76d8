"""The options of nmt-generate, nmt-score, nmt-average, nmt-convert and nmt-plot. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nmt.config.fields import key_of
from nmt.config.mapping import Positional
from nmt.config.ranges import check_ranges, limits
from nmt.errors import UserError
from nmt.generation.options import DecodingOptions

MOST_THREADS = 1024
MOST_SENTENCES = 1_000_000  # of a sample; they are held in memory


@dataclass(frozen=True)
class GenerateOptions:
    """What to translate with which model, and how to search."""

    model: str
    """The model folder, or the folder of a run, of which the best checkpoint is taken; or several, A:B, whose
    probabilities are averaged."""
    input: Path | None = None
    """Text to translate, a sentence a line (.gz too); standard input if none is named."""
    output: Path | None = None
    """Where to write the translations, `nbest` lines for a line; standard output if none is named."""
    reference: Path | None = None
    """Reference translations, as many lines as the input: BLEU, chrF and TER of the best ones are printed."""
    baseline: Path | None = None
    """Another system: its translations of the same input, a line each, or a model folder or run, which translates
    with the same options. Is the difference to it chance?"""
    format: Literal["text", "jsonl", "fairseq"] = "text"
    """text: translations alone; jsonl: a JSON object a line, with scores and flags that tell which lines to read;
    fairseq: its S-, T-, H-, D- and P- lines, scores to the base 2."""
    input_is_pieces: bool = False
    """The input and the reference are split into pieces already, joined by blanks."""
    too_long: Literal["split", "truncate", "error"] = "split"
    """What becomes of a line of more pieces than the model takes: it is split at punctuation and its parts are
    translated apart; or its end is cut off (always so with score-reference); or it is an error."""
    print_alignment: bool = False
    """Show which word of the source each word comes from, as `0-0 1-2`: after ` ||| ` (text), as an A- line
    (fairseq), or as `alignment` (jsonl)."""
    alignment_layer: int = -1
    """The decoder layer whose attention tells it, from 0; -1 is the last."""
    plot_attention: Path | None = None
    """A folder for a picture (PNG) of each line's attention: pieces of the source and of the translation."""
    prefix_size: int = field(default=0, metadata=limits(least=0))
    """Translations begin with this many tokens of the reference."""
    score_reference: bool = False
    """Score the reference instead of translating (with `format` fairseq or jsonl)."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    buffer_size: int | None = field(default=None, metadata=limits(least=1))
    """Lines that are read, sorted by length and translated before they are written, in their own order; 10,000, or
    1 where lines are typed: with 1 a line is answered before the next one is read."""
    max_tokens: int | None = field(default=None, metadata=limits(least=1))
    """Largest batch: its sentences times the pieces of the longest one; 2,048, or 4,096 with a beam of 1, and on
    a GPU 512 sentences or what its memory has room for. It changes speed and memory alone."""
    batch_size: int | None = field(default=None, metadata=limits(least=1))
    """Most sentences of a batch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """What is computed with: bf16 is faster and rounds; scores differ in the second or third digit. int8, with
    `device` cpu and a processor that has VNNI, makes most products of 8-bit integers and the others of bf16. What
    scores a reference or tells an alignment is always the model as it is."""
    num_threads: int | None = None
    """Threads for the CPU; all cores if it is left out."""

    @property
    def baseline_is_model(self) -> bool:
        """Whether the baseline is a model, which is to translate, and not a file."""
        return self.baseline is not None and self.baseline.is_dir()

    def check(self) -> None:
        """Raise `UserError` for options that do not go together, and for an output that is read, too."""
        check_ranges(self, {"num_threads": (1, MOST_THREADS)})
        for name in ("prefix_size", "score_reference"):
            if getattr(self, name) and self.reference is None:
                flag = key_of(name)
                raise UserError(f"`{flag}` must have a reference, but there is none. Give --reference FILE.")
        if self.score_reference and self.format == "text":
            raise UserError(
                "`score-reference` must come with `format` fairseq or jsonl, showing scores. Add --format jsonl."
            )
        if self.decoding.mbr is not None and self.score_reference:
            raise UserError(
                "`mbr` must be left out with `score-reference`, which translates nothing. Leave one out."
            )
        if self.alignment_layer != -1 and not (self.print_alignment or self.plot_attention):
            raise UserError(
                "`alignment-layer` must come with `print-alignment` or `plot-attention`. Add one."
            )
        if self.baseline is not None and (self.reference is None or self.score_reference):
            raise UserError(
                "`baseline` must come with a reference to score both against, and without `score-reference`. "
                "Give --reference FILE and leave `score-reference` out."
            )
        if self.baseline_is_model and (self.prefix_size or self.input_is_pieces):
            flag = "prefix-size" if self.prefix_size else "input-is-pieces"
            raise UserError(
                f"`baseline` must be a file of translations with `{flag}`, but {self.baseline} is a folder: "
                "another model may have other pieces. Name a file."
            )
        for name, path in (("input", self.input), ("reference", self.reference), ("baseline", self.baseline)):
            if path is not None and self.output is not None and path.resolve() == self.output.resolve():
                raise UserError(
                    f"`output` must be another file than `{name}`, but both are {path}. Name another."
                )


@dataclass(frozen=True)
class ScoreOptions:
    """Which translations to score, against what."""

    hypothesis: Path
    """The translations, a line each (.gz too)."""
    reference: Path | None = None
    """Reference translations, as many lines: BLEU, chrF and TER are printed."""
    baseline: Path | None = None
    """Translations by another system, as many lines: is the difference to them chance?"""
    target_lang: str | None = None
    """The language of the translations: zh, ja and ko have their own words for BLEU."""
    model: str | None = None
    """Instead of a reference: a model folder, a run, or several, A:B. Each line's log-probability and number of
    tokens (end of sentence included) are printed, and the perplexity."""
    input: Path | None = None
    """The source text, for the model."""
    output: Path | None = None
    """Where to write the log-probabilities; standard output if none is named."""
    input_is_pieces: bool = False
    """The source and the translations are split into pieces already, joined by blanks."""
    max_tokens: int = field(default=2048, metadata=limits(least=1))
    """Largest batch: its sentences times the pieces of the longest one. It changes speed and memory alone."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    num_threads: int | None = None
    """Threads for the CPU; all cores if it is left out."""

    def check(self) -> None:
        """Raise `UserError` unless there is a reference or a model to score by, and what goes with it."""
        if (self.reference is None) == (self.model is None):
            fault = "neither is given" if self.model is None else "both are given"
            raise UserError(f"`reference` or `model` must be given, one of them, but {fault}. Give one.")
        for name, other in (("baseline", "reference"), ("target_lang", "reference"), ("output", "model")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise UserError(
                    f"`{name.replace('_', '-')}` must come with `{other}`, but there is none. Give both."
                )
        if (self.model is None) != (self.input is None):
            needed, given = ("input", "model") if self.input is None else ("model", "input")
            raise UserError(f"`{needed}` must come with `{given}`, but there is none. Give both.")
        check_ranges(self, {"num_threads": (1, MOST_THREADS)})
        for name in ("hypothesis", "input"):
            path = getattr(self, name)
            if path is not None and self.output is not None and path.resolve() == self.output.resolve():
                raise UserError(
                    f"`output` must be another file than `{name}`, but both are {path}. Name another."
                )


@dataclass(frozen=True)
class AverageOptions:
    """Which checkpoints to average, and where to write the result."""

    checkpoints: Positional[Path]
    """The folder of a run, or its `checkpoints` folder."""
    output: Path
    """The model folder to write; it must not exist."""
    last: int | None = field(default=None, metadata=limits(least=1))
    """Average this many of the newest checkpoints; 5 if neither this nor `best` is given."""
    best: int | None = field(default=None, metadata=limits(least=1))
    """Average this many of the best checkpoints instead."""

    @property
    def count(self) -> int:
        """How many checkpoints to average."""
        return self.best or self.last or 5

    def check(self) -> None:
        """Raise `UserError` for two answers to which."""
        if self.last is not None and self.best is not None:
            raise UserError(
                f"`last` ({self.last}) or `best` ({self.best}) must be left out. Give one of them."
            )


@dataclass(frozen=True)
class ImportOptions:
    """nmt-convert --from: which model of which toolkit to convert, and where to write the result."""

    checkpoint: Positional[Path]
    """The file of the model, such as checkpoint_best.pt. Nothing in it is executed."""
    from_: Literal["fairseq"]
    """The toolkit that wrote it."""
    dict_dir: Path
    """The folder of its dictionaries, dict.LANG.txt, such as the data directory of its training."""
    to: Path
    """The model folder to write; it must not exist."""
    source_lang: str | None = None
    """The source language, where neither the checkpoint nor names of data in `dict-dir` tell it."""
    target_lang: str | None = None
    """The target language, likewise."""


@dataclass(frozen=True)
class PlotOptions:
    """Which runs to draw, and how."""

    runs: Positional[tuple[Path, ...]]
    """The folders of one or several runs: the `save-dir` of each. A run may be going on."""
    output: Path = Path("plot.png")
    """The picture to write, over what is there: .png, .pdf or .svg."""
    x: Literal["update", "epoch", "hours"] = "update"
    """The horizontal axis: updates, epochs, or the time spent on the run, validation included."""
    metrics: tuple[str, ...] = ()
    """What to draw beside learning rate and speed; all but nll and ppl, which follow the loss, unless given."""

    def check(self) -> None:
        """Raise `UserError` if there is nothing to draw, or no way to write it."""
        if not self.runs:
            raise UserError(
                "`runs` must name the folder of a run, but is empty. Name the `save-dir` of nmt-train."
            )
        if self.output.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(
                f"`output` must end in .png, .pdf or .svg, but is {self.output}. Name the picture so."
            )


@dataclass(frozen=True)
class ExportOptions:
    """nmt-convert --to TOOLKIT: which model folder to convert for which toolkit."""

    model: Positional[Path]
    """The model folder, or the folder of a run, of which the best checkpoint is taken."""
    to: tuple[Literal["ctranslate2"], Path]
    """The toolkit that is to read it, and the folder to write, which must not exist."""
    quantization: Literal["int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16"] | None = (
        None
    )
    """How the weights are stored; float32 if it is left out."""
    sample: Path | None = None
    """Source text, a sentence a line, of which both translate the first lines to be compared; if it is left out,
    sentences of pieces drawn at random."""
    sample_size: int = 200
    """How many lines of it."""

    def check(self) -> None:
        """Raise `UserError` for a sample without lines."""
        check_ranges(self, {"sample_size": (1, MOST_SENTENCES)})
