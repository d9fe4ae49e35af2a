"""The figures of the NAS-Bench-101 reports, each a function from arrays to inline SVG. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from spos_fast.analysis.drawing import SMALL, dots, new_figure, percent_ticks, short_number
from spos_fast.analysis.page import DASHES, WIDTHS
from spos_fast.analysis.svg import COLOURS, inline_svg
from spos_fast.nasbench.locality import Autocorrelation
from spos_fast.nasbench.statistics import Group, Replacement, ecdf, pareto_front

Values = NDArray[np.float64]
# (name, colour, shape of the line, values)
Series = tuple[str, str, str, Values]

_POINTS = 300  # of a curve: more than pixels tell apart


def ecdf_figure(name: str, series: Sequence[Series], label: str, low: float | None = None) -> str:
    """Share of cells at or below each value; from ``low`` on."""
    figure, axes = new_figure()
    for _, colour, shape, values in series:
        ordered, _ = ecdf(values)
        if len(ordered):
            shares = np.linspace(0, 1, min(_POINTS, len(ordered)))
            _line(axes, np.quantile(ordered, shares), shares, colour, shape)
    axes.set_ylim(0, 1.01)
    if low is not None:
        axes.set_xlim(left=low)
    axes.xaxis.set_major_formatter(percent_ticks())
    axes.yaxis.set_major_formatter(percent_ticks())
    axes.set_xlabel(label)
    axes.set_ylabel("share of cells at or below")
    middles = "; ".join(
        f"{title} {np.nanmedian(values):.2%}" for title, _, _, values in series if np.isfinite(values).any()
    )
    return inline_svg(figure, name, f"Cumulative distribution of {label}; medians: {middles}.")


def cost_figure(
    name: str, cost: Values, accuracy: Values, label: str, named: Sequence[tuple[int, str]], seconds: bool = False
) -> str:
    """Accuracy against a cost, with the Pareto front and named cells ``(row, mark)``."""
    figure, axes = new_figure()
    known = np.isfinite(cost) & np.isfinite(accuracy)
    _cloud(axes, cost[known], accuracy[known])
    front = pareto_front(cost, accuracy)
    axes.plot(cost[front], accuracy[front], drawstyle="steps-post", color=COLOURS["ink"], lw=1.4, zorder=3)
    for row, mark in named:
        axes.plot(cost[row], accuracy[row], "o", color=COLOURS["choice-3"], ms=8, mec=COLOURS["ink"], mew=1, zorder=5)
        axes.annotate(
            mark, (cost[row], accuracy[row]), xytext=(8, -11), textcoords="offset points", fontsize=SMALL, zorder=6,
            color=COLOURS["ink"], weight="bold",
        )  # fmt: skip
    _accuracy_limits(axes, accuracy[known])
    axes.yaxis.set_major_formatter(percent_ticks())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if seconds else short_number(value)))
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("validation accuracy")
    return inline_svg(
        figure, name,
        f"Validation accuracy against {label} of {int(known.sum()):,} cells; {len(front)} are on the Pareto front.",
    )  # fmt: skip


def scatter_figure(name: str, x: Values, y: Values, labels: tuple[str, str]) -> str:
    """Two accuracies of every cell against each other, and the line on which they are equal."""
    figure, axes = new_figure()
    known = np.isfinite(x) & np.isfinite(y)
    _cloud(axes, x[known], y[known])
    for limits, values in ((axes.set_xlim, x[known]), (axes.set_ylim, y[known])):
        low, high = _span(values)
        limits(low, high)
    ends = np.array([max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])])
    axes.plot(ends, ends, color=COLOURS["muted"], lw=1.2, ls=DASHES["dashed"], zorder=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(percent_ticks())
        axis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return inline_svg(figure, name, f"{labels[1]} against {labels[0]} of {int(known.sum()):,} cells.")


def group_figure(name: str, series: Sequence[tuple[str, str, Sequence[Group]]], label: str) -> str:
    """Mean accuracy and quartiles by a whole number; series are (name, colour, groups)."""
    figure, axes = new_figure()
    for place, (_, colour, groups) in enumerate(series):
        shift = 0.12 * (place - (len(series) - 1) / 2)
        x = np.array([group.value for group in groups]) + shift
        mean = [group.mean for group in groups]
        axes.vlines(x, [g.low for g in groups], [g.high for g in groups], color=COLOURS[colour], lw=4, alpha=0.35)
        axes.plot(x, mean, "o-", color=COLOURS[colour], lw=1.6, ms=6, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(percent_ticks())
    axes.set_xlabel(label)
    axes.set_ylabel("validation accuracy")
    told = "; ".join(
        f"{title + ': ' if title else ''}{', '.join(f'{g.value} {g.mean:.1%} ({g.count:,} cells)' for g in groups)}"
        for title, _, groups in series
    )
    return inline_svg(figure, name, f"Mean validation accuracy by {label}. {told}.")


def replacement_figure(name: str, replacements: Sequence[Replacement], names: Sequence[str]) -> str:
    """Change of accuracy when one operation replaces another: mean, and the middle 50% and 90% of the pairs."""
    figure, axes = new_figure(height=250)
    shown = [entry for entry in replacements if len(entry.accuracy)]
    for place, entry in enumerate(shown):
        low, lower, upper, high = np.quantile(entry.accuracy, (0.05, 0.25, 0.75, 0.95))
        axes.hlines(place, low, high, color=COLOURS["random"], lw=2)
        axes.hlines(place, lower, upper, color=COLOURS["random"], lw=9)
        axes.plot(entry.accuracy.mean(), place, "D", color=COLOURS["evolution"], ms=8, mec=COLOURS["ink"], zorder=4)
    axes.axvline(0, color=COLOURS["ink"], lw=1)
    axes.set_yticks(range(len(shown)), [f"{names[e.before]} to {names[e.after]}" for e in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", color=COLOURS["line"], lw=0.8)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.4g}"))
    axes.set_xlabel("change of validation accuracy, points")
    told = "; ".join(
        f"{names[e.before]} to {names[e.after]} {100 * e.accuracy.mean():+.2f} points over {len(e.accuracy):,} pairs"
        for e in shown
    )
    return inline_svg(figure, name, f"Mean change of accuracy by replacing one operation: {told}.")


def autocorrelation_figure(name: str, series: Sequence[Autocorrelation], label: str) -> str:
    """Correlation of accuracies and of ranks by distance, with 95% intervals."""
    figure, axes = new_figure()
    for quantity, colour, shape in (("rank", "random", "dashed"), ("accuracy", "evolution", "line")):
        known = [entry for entry in series if np.isfinite(getattr(entry, quantity))]
        x = [entry.distance for entry in known]
        low, high = np.array([getattr(entry, f"{quantity}_interval") for entry in known]).reshape(-1, 2).T
        axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.2, lw=0)
        _line(axes, np.array(x), np.array([getattr(entry, quantity) for entry in known]), colour, shape, "o")
    axes.axhline(0, color=COLOURS["ink"], lw=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("correlation")
    told = ", ".join(f"{entry.distance}: {entry.accuracy:.2f} ({entry.pairs:,} pairs)" for entry in series)
    return inline_svg(figure, name, f"Correlation of accuracies by {label}: {told}.")


def budget_figure(name: str, epochs: Sequence[int], series: Sequence[tuple[str, str, str, Sequence[float]]]) -> str:
    """Rank correlation with the longest budget, by budget."""
    figure, axes = new_figure()
    places = np.arange(len(epochs))
    for _, colour, shape, values in series:
        _line(axes, places, np.array(values), colour, shape, "o")
    axes.axhline(0, color=COLOURS["ink"], lw=1)
    axes.set_xticks(places, [str(budget) for budget in epochs])
    axes.set_ylim(top=1)
    axes.set_xlabel("epochs")
    axes.set_ylabel("Spearman's correlation with the longest")
    told = "; ".join(f"{title}: {', '.join(f'{v:.2f}' for v in values)}" for title, _, _, values in series)
    return inline_svg(figure, name, f"Spearman's rank correlation by epochs. {told}.")


def regret_figure(
    name: str, grid: Values, series: Sequence[tuple[str, str, str, dict[float, Values]]], label: str
) -> str:
    """Median regret against simulated seconds, both on logarithmic axes, with a band of quartiles.

    Series are (name, colour, shape, quantile to regret ``[G]``).
    """
    figure, axes = new_figure(height=420, width=900)
    for _, colour, shape, quantiles in series:
        low, middle, high = (np.maximum(quantiles[q], 1e-5) for q in (0.25, 0.5, 0.75))
        axes.fill_between(grid, low, high, color=COLOURS[colour], alpha=0.2, lw=0)
        _line(axes, grid, middle, colour, shape)
    axes.set(xscale="log", yscale="log", xlabel="simulated seconds of training", ylabel=label)
    medians = np.array([quantiles[0.5] for _, _, _, quantiles in series])
    if np.isfinite(medians).any():
        # From the first median on; bands that begin with a diverged training leave the axis.
        axes.set_xlim(left=grid[np.isfinite(medians).any(0).argmax()])
        axes.set_ylim(top=1.3 * np.nanmax(medians))
    axes.set_xlim(right=grid[-1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    ends = ", ".join(f"{title} {100 * quantiles[0.5][-1]:.3f} points" for title, _, _, quantiles in series)
    return inline_svg(figure, name, f"{label} against simulated seconds; median at the end: {ends}.")


def _line(axes: Axes, x: NDArray[Any], y: NDArray[Any], colour: str, shape: str, marker: str = "") -> None:
    axes.plot(x, y, color=COLOURS[colour], ls=DASHES[shape], lw=WIDTHS[shape], marker=marker, ms=5)


def _cloud(axes: Axes, x: Values, y: Values) -> None:
    """Dots of all cells: fainter, the more there are."""
    dots(axes, x, y, "evolution", opacity=float(np.clip(600 / max(len(x), 1), 0.03, 0.35)))


def _span(values: Values) -> tuple[float, float]:
    """Limits that leave out at most 1% of the values at the lower end: diverged trainings."""
    low, high = float(np.quantile(values, 0.01)), float(values.max())
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def _accuracy_limits(axes: Axes, values: Values) -> None:
    axes.set_ylim(*_span(values))
    axes.yaxis.set_major_locator(MaxNLocator(6))
