"""What all figures of the reports share: axes in the page's colours, clouds of dots, short numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter

from spos_fast.analysis.svg import COLOURS

# Two of them stand side by side on a wide screen and fill a phone's.
WIDTH, HEIGHT = 520, 330
SMALL = 11.5
# Above this many dots, a picture is smaller than the drawing.
MOST_DOTS = 8000


def new_figure(height: int = HEIGHT, width: int = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure of so many pixels and its axes."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLOURS["muted"])
    axes.tick_params(colors=COLOURS["muted"], labelcolor=COLOURS["ink"], labelsize=SMALL, length=3)
    axes.grid(axis="y", color=COLOURS["line"], lw=0.8)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=SMALL + 0.5, color=COLOURS["ink"])
    axes.yaxis.labelpad = 9
    return figure, axes


def dots(
    axes: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, colour: str, opacity: float = 0.35
) -> None:
    """A dot for every point: one path of round caps without length, a fifth of the size of as many markers."""
    points = np.column_stack((np.asarray(x, dtype=float), np.asarray(y, dtype=float)))
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) > MOST_DOTS:
        axes.scatter(points[:, 0], points[:, 1], s=14, color=COLOURS[colour], alpha=opacity, lw=0, rasterized=True)
        return
    if not len(points):
        return
    outline = Outline(np.repeat(points, 2, axis=0), [Outline.MOVETO, Outline.LINETO] * len(points))
    outline.should_simplify = False
    size = 4.5 if len(points) <= 500 else 3.6
    axes.add_patch(
        PathPatch(outline, fill=False, ec=COLOURS[colour], lw=size, alpha=opacity, capstyle="round", zorder=1.5)
    )


def percent_ticks() -> FuncFormatter:
    """Ticks of an axis of shares."""
    return FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


def short_number(value: float) -> str:
    """A count with three digits and a unit: ``328 M``."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale * 0.9995:
            scaled = value / scale
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}\N{NO-BREAK SPACE}{unit}"
    return f"{value:,.0f}"


def bit_operations(value: float) -> str:
    """Bit operations in the papers' unit, 2**30, or in 2**20 where they are few: ``14.21 G``."""
    unit, scale = ("G", 2**30) if value >= 0.995 * 2**30 else ("M", 2**20)
    return f"{value / scale:.2f}\N{NO-BREAK SPACE}{unit}"


def milliseconds(value: float) -> str:
    """A time with three digits: ``1.25 ms``."""
    digits = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}ms"
