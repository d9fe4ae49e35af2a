"""The figures of the rank consistency report, each a function from rankings to inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from spos_fast.analysis.drawing import SMALL, dots, new_figure, percent_ticks
from spos_fast.analysis.page import DASHES, WIDTHS
from spos_fast.analysis.ranks import RankStatistics
from spos_fast.analysis.svg import COLOURS, inline_svg

# (name, statistics, whether it is the supernet's)
Entry = tuple[str, RankStatistics, bool]
# (name, tau, shape of the line)
Level = tuple[str, float, str]


def tau_figure(entries: Sequence[Entry]) -> str:
    """Kendall's tau of every predictor with its interval, one below the other."""
    figure, axes = new_figure(height=60 + 30 * len(entries), width=900)
    for place, (_, statistics, own) in enumerate(entries):
        colour = COLOURS["evolution" if own else "random"]
        axes.hlines(place, *statistics.interval, color=colour, lw=7, alpha=0.4)
        axes.plot(statistics.tau, place, "D" if own else "o", color=colour, ms=8, mec=COLOURS["ink"], zorder=4)
    axes.axvline(0, color=COLOURS["ink"], lw=1)
    axes.set_yticks(range(len(entries)), [name for name, *_ in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    low = min([0.0, *(value for _, each, _ in entries for value in (*each.interval, each.tau) if value == value)])
    axes.set_xlim(low - 0.03, 1)
    axes.grid(axis="x", color=COLOURS["line"], lw=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Kendall's tau with the true ranking")
    told = "; ".join(f"{name} {statistics.tau:.3f}" for name, statistics, _ in entries)
    return inline_svg(figure, "taus", f"Kendall's tau with the true ranking: {told}.")


def scatter_figure(name: str, predicted: np.ndarray, true: np.ndarray, labels: tuple[str, str]) -> str:
    """A dot for every architecture: what a predictor says across, the truth upwards."""
    figure, axes = new_figure()
    dots(axes, predicted, true, "evolution", opacity=float(np.clip(250 / len(true), 0.05, 0.45)))
    for limits, values in ((axes.set_xlim, predicted), (axes.set_ylim, true)):
        limits(*_span(values))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(percent_ticks())
        axis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return inline_svg(figure, name, f"{labels[1]} against {labels[0]} of {len(true):,} architectures.")


def images_figure(points: Sequence[tuple[int, RankStatistics]], levels: Sequence[Level]) -> str:
    """Tau against the number of calibration images."""
    figure, axes = new_figure()
    _curve(axes, points, levels)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([images for images, _ in points], [f"{images:,}" for images, _ in points])
    axes.set_xlabel("calibration images")
    return inline_svg(figure, "images", f"Kendall's tau by calibration images: {_told(points)}.")


def training_figure(points: Sequence[tuple[int, RankStatistics]], levels: Sequence[Level]) -> str:
    """Tau against the steps of the supernet's training."""
    figure, axes = new_figure()
    _curve(axes, points, levels)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("steps of the supernet's training")
    return inline_svg(figure, "training", f"Kendall's tau by steps of training: {_told(points)}.")


def _curve(axes: Axes, points: Sequence[tuple[int, RankStatistics]], levels: Sequence[Level]) -> None:
    x = [value for value, _ in points]
    low, high = np.array([statistics.interval for _, statistics in points]).T
    axes.fill_between(x, low, high, color=COLOURS["evolution"], alpha=0.2, lw=0)
    axes.plot(x, [statistics.tau for _, statistics in points], "o-", color=COLOURS["evolution"], lw=2.4, ms=5)
    axes.axhline(0, color=COLOURS["ink"], lw=1)
    for _, tau, shape in levels:
        axes.axhline(tau, color=COLOURS["muted"], ls=DASHES[shape], lw=WIDTHS[shape])
    axes.set_ylim(top=1)
    axes.set_ylabel("Kendall's tau")
    axes.tick_params(labelsize=SMALL)


def _told(points: Sequence[tuple[int, RankStatistics]]) -> str:
    return "; ".join(f"{value:,}: {statistics.tau:.3f}" for value, statistics in points)


def _span(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin
