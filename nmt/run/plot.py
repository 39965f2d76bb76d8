"""Draw what runs have recorded: loss, metrics, learning rate and speed, several runs in one picture.

Needs matplotlib, without its global state: a figure is made, returned, and belongs to the caller.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter
from numpy.typing import NDArray

from nmt.errors import UserError, counted, shown
from nmt.run.run_log import read_records

Record = dict[str, Any]
XAxis = Literal["update", "epoch", "hours"]

# Okabe and Ito's colours, which people with any colour vision tell apart; without yellow, too faint for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Lengths of dashes and gaps; an empty tuple is a solid line.
_DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
)
_STYLES = [(colour, dashes) for dashes in _DASHES for colour in _COLOURS]

_SPEED = "targets/s"
_LABELS = {
    "loss": "loss per target",
    "nll": "negative log-likelihood per target (nats)",
    "ppl": "perplexity",
    "bleu": "BLEU",
    "chrf": "chrF2",
    "lr": "learning rate",
    _SPEED: "targets per second",
    "update": "update",
    "epoch": "epoch",
    "hours": "hours",
}
_FROM_ZERO = ("lr", _SPEED)
_LOGARITHMIC = ("ppl",)
_DRAWN = ("train", "valid")
_NO_METRICS = {"kind", "update", "epoch", "hours"}
_FOLLOW_LOSS = {"nll", "ppl"}
_BEST = "best "  # before the name of the metric that chooses the best checkpoint
_LONGEST_NAME = 40
_CHARACTERS_AN_INCH = 13  # of the legend, about


@dataclass(frozen=True)
class RunRecords:
    """A run as it is drawn."""

    name: str
    records: list[Record]
    """What `nmt.run.run_log.read_records` gives, at least one."""

    @property
    def best_metric(self) -> str | None:
        """The metric that chooses the best checkpoint, if the run has been validated."""
        validations = [record for record in self.records if record["kind"] == "valid"]
        names = [name for record in validations for name in record if name.startswith(_BEST)]
        return names[-1].removeprefix(_BEST) if names else None

    @property
    def best(self) -> Record | None:
        """The validation of the best checkpoint."""
        if (metric := self.best_metric) is None:
            return None
        validations = [record for record in self.records if record["kind"] == "valid"]
        value = validations[-1].get(_BEST + metric)
        return next((r for r in validations if value is not None and r.get(metric) == value), None)


def open_runs(folders: Iterable[Path]) -> tuple[list[RunRecords], list[str]]:
    """Read the records of run folders.

    Returns:
        The runs, each with a name that tells it from the others, and a line about each thing left out.

    Raises:
        UserError: One is no folder of a run, or none has reported anything yet.
    """
    left_out = []
    found: dict[Path, list[Record]] = {}
    for folder in folders:
        records, num_damaged = read_records(folder)
        if num_damaged:
            left_out.append(f"{counted(num_damaged, 'damaged line')} of {folder}")
        if records:
            found[folder.resolve()] = records
        else:
            left_out.append(f"{folder}, which has reported nothing yet")
    if not found:
        raise UserError(
            "A run must have reported something to be drawn, but none has. Wait for its first report."
        )
    names = _short_names(list(found))
    return [RunRecords(name, records) for name, records in zip(names, found.values(), strict=True)], left_out


def draw(runs: Sequence[RunRecords], *, x: XAxis = "update", metrics: Sequence[str] = ()) -> Figure:
    """Draw the curves of runs: a panel for each metric, for the learning rate and for the speed.

    Thin lines are training, lines with dots validation; a star marks the best checkpoint. A run without some
    metric is missing from its panel.

    Args:
        runs: At least one.
        x: What runs from left to right.
        metrics: What to draw; if empty, all that the runs have but those that follow the loss.

    Raises:
        UserError: No run has such a metric, or one has no such x axis.
    """
    panels = _choose_panels(runs, metrics)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 2.9 * rows + 0.8 + 0.11 * len(runs)  # the legend has about two runs a line
    figure = Figure(figsize=(5.2 * columns, height), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten().tolist()
    for ax in axes[len(panels) :]:
        ax.remove()
    places = [_x_places(run, x) for run in runs]
    for i, (ax, metric) in enumerate(zip(axes, panels, strict=False)):
        _draw_panel(ax, metric, runs, places)
        _format_axes(ax, metric, x, is_lowest=i + columns >= len(panels))
    _add_legends(figure, runs)
    return figure


def _choose_panels(runs: Sequence[RunRecords], metrics: Sequence[str]) -> list[str]:
    recorded = dict.fromkeys(
        name
        for run in runs
        for record in run.records
        if record["kind"] in (*_DRAWN, "epoch")
        for name in record
    )
    validated = dict.fromkeys(
        name for run in runs for record in run.records if record["kind"] == "valid" for name in record
    )
    for metric in metrics:
        if metric not in recorded:
            known = ", ".join(name for name in recorded if name not in _NO_METRICS)
            raise UserError(f"`metrics` must be among {known}, but one is {shown(metric)}.")
    chosen = metrics or [
        name
        for name in dict.fromkeys(["loss", *validated])
        if name in recorded and not name.startswith(_BEST) and name not in _NO_METRICS | _FOLLOW_LOSS
    ]
    return list(dict.fromkeys([*chosen, *(name for name in _FROM_ZERO if name in recorded)]))


def _x_places(run: RunRecords, x: XAxis) -> Callable[[Record], float]:
    """Return the function that gives a record's place on the x axis."""
    if x == "update":
        return lambda record: record["update"]
    if x == "hours":
        if any("hours" not in record for record in run.records if record["kind"] in _DRAWN):
            raise UserError(
                f"`x` hours must have runs that recorded it, but {run.name} did not. Use --x update."
            )
        return lambda record: record["hours"]
    ends = {
        record["epoch"]: record["update"]
        for record in run.records
        if record["kind"] == "epoch" and "epoch" in record
    }
    if not ends:
        raise UserError(
            f"`x` epoch must have runs of an epoch or more, but {run.name} has none. Use --x update."
        )
    # Epochs are reported as whole numbers. Between two ends the updates tell the fraction, after the last end the
    # length of the last epoch.
    epochs, updates = [0, *ends], [0, *ends.values()]
    length = (updates[-1] - updates[-2]) / (epochs[-1] - epochs[-2])
    last_epoch, last_update = epochs[-1], updates[-1]

    def place(record: Record) -> float:
        beyond = max(record["update"] - last_update, 0) / length
        return float(np.interp(record["update"], updates, epochs)) if not beyond else last_epoch + beyond

    return place


def _draw_panel(
    ax: Axes, metric: str, runs: Sequence[RunRecords], places: Sequence[Callable[[Record], float]]
) -> None:
    for run, place, (colour, dashes) in zip(runs, places, itertools.cycle(_STYLES), strict=False):
        x, y = _curve(run, _kind_of_training(run, metric), metric, place)
        lone = "." if len(x) == 1 else None
        width, alpha = (1.2, 0.9) if metric in _FROM_ZERO else (0.9, 0.55)
        ax.plot(x, y, marker=lone, color=colour, linestyle=dashes, linewidth=width, alpha=alpha)
        x, y = _curve(run, "valid", metric, place)
        ax.plot(x, y, color=colour, linestyle=dashes, linewidth=1.6, marker="o", markersize=3.2)
        if run.best is not None and _number(run.best.get(metric)) is not None:
            ax.plot(
                [place(run.best)],
                [run.best[metric]],
                color=colour,
                zorder=5,  # above the curves of other runs
                marker="*",
                markersize=13,
                markeredgecolor="white",
                markeredgewidth=0.8,
            )


def _kind_of_training(run: RunRecords, metric: str) -> str:
    """Return which records draw a metric of training: reports, or epochs if there are more of these."""
    counts = Counter(record["kind"] for record in run.records if metric in record)
    return "epoch" if counts["epoch"] > counts["train"] else "train"


def _curve(
    run: RunRecords, kind: str, metric: str, place: Callable[[Record], float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return where the records of a kind lie and their values, NaN (a gap) where one is not finite."""
    records = [record for record in run.records if record["kind"] == kind and metric in record]
    values = (_number(record[metric]) for record in records)
    y = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return np.array([place(record) for record in records], dtype=np.float64), y


def _format_axes(ax: Axes, metric: str, x: XAxis, *, is_lowest: bool) -> None:
    ax.set_title(plain_text(_LABELS.get(metric, metric)), loc="left", fontsize=11)
    ax.tick_params(labelbottom=is_lowest)
    if is_lowest:
        ax.set_xlabel(_LABELS[x])
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=x != "hours"))
    if x == "update":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlim(left=0)
    if metric in _FROM_ZERO:
        ax.set_ylim(bottom=0)
    if metric in _LOGARITHMIC:
        ax.set_yscale("log")
    if metric == "lr":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif metric == _SPEED:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    elif isinstance(formatter := ax.yaxis.get_major_formatter(), ScalarFormatter):
        formatter.set_useOffset(False)


def _add_legends(figure: Figure, runs: Sequence[RunRecords]) -> None:
    """Name the runs by their colours, with what the best checkpoint reached, and below the kinds of lines."""
    named = []
    for run, (colour, dashes) in zip(runs, itertools.cycle(_STYLES), strict=False):
        label = plain_text(run.name)
        if (best := run.best) is not None and (metric := run.best_metric) is not None:
            name = "loss" if metric == "loss" else plain_text(_LABELS.get(metric, metric))
            label += f": best {name} {best[metric]:.4g} at update {best['update']:,}"
        named.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=2.5, label=label))
    longest = max(len(str(line.get_label())) for line in named)
    in_a_row = max(1, int(figure.get_figwidth() * _CHARACTERS_AN_INCH) // (longest + 8))
    style = {"frameon": False, "fontsize": 9.5}
    figure.legend(handles=named, loc="outside upper center", ncols=min(in_a_row, len(named)), **style)
    grey = "0.35"
    kinds = [
        Line2D([], [], color=grey, linewidth=0.9, label="training"),
        Line2D([], [], color=grey, linewidth=1.6, marker="o", markersize=3.2, label="validation"),
        Line2D([], [], color=grey, linestyle="", marker="*", markersize=11, label="best checkpoint"),
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=len(kinds), **style)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return for each folder the fewest last parts of its path that tell it from the others."""
    for length in itertools.count(1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return [n if len(n) <= _LONGEST_NAME else f"{n[:12]}…{n[-(_LONGEST_NAME - 13) :]}" for n in names]


def plain_text(text: str) -> str:
    """Return text that matplotlib shows letter by letter.

    Otherwise it takes dollar signs as the ends of a formula, leaves labels that begin with an underscore out of
    the legend, and fails at characters that no font can show, such as a lone surrogate.
    """
    visible = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return (" " if visible.startswith("_") else "") + visible.replace("$", r"\$")


@contextmanager
def without_font_warnings() -> Iterator[None]:
    """Draw a character that no installed font has as a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield
