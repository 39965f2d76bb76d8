"""A picture of how each piece of a translation attends to its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nmt.errors import UserError

# Each character is shown in the first of these fonts that is installed and has it. The first font is always there.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Noto Sans Arabic",
    "Noto Sans",
)
_INCHES_PER_PIECE = 0.24
_MARGIN_INCHES = 0.7  # in addition to the labels
_INCHES_PER_CHARACTER = 0.095  # of a label
_LONGEST_SIDE = 40.0  # inches; labels of very long sentences shrink
_FONT_SIZE = 9.0


def check_plotting() -> None:
    """Raise a `UserError` if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "matplotlib must be installed for `plot-attention`, but is missing. Run pip install matplotlib."
        ) from None


def plot_attention(
    path: Path, weights: NDArray[np.float32], source: Sequence[str], target: Sequence[str], *, title: str
) -> None:
    """Draw a heatmap as PNG: the source from left to right, the translation from top to bottom.

    Args:
        path: The file to write.
        weights: (T, S), each row summing to 1.
        source: The S pieces of the source.
        target: The T pieces of the translation.
        title: Shown below the heatmap.
    """
    # Without pyplot, which would look for a window system and keep the figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nmt.run.plot import plain_text, without_font_warnings

    longest_source, longest_target = (max(map(len, side), default=1) for side in (source, target))
    width = len(source) * _INCHES_PER_PIECE + longest_target * _INCHES_PER_CHARACTER + _MARGIN_INCHES
    height = len(target) * _INCHES_PER_PIECE + longest_source * _INCHES_PER_CHARACTER + _MARGIN_INCHES
    shrink = min(1.0, _LONGEST_SIDE / max(width, height))
    figure = Figure(
        figsize=(max(width, 2.5) * shrink, max(height, 2.0) * shrink), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    font = {"fontfamily": _installed_fonts(), "fontsize": _FONT_SIZE * shrink}
    axes.set_xticks(range(len(source)), [plain_text(piece) for piece in source], rotation=90, **font)
    axes.set_yticks(range(len(target)), [plain_text(piece) for piece in target], **font)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(-0.5, len(source)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(target)), minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(title, fontfamily=_installed_fonts(), fontsize=_FONT_SIZE * shrink)
    with without_font_warnings():
        figure.savefig(path, format="png")


def _installed_fonts() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [font for font in _FONTS if font in installed] or ["sans-serif"]
