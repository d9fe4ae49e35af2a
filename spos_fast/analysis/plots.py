"""The figures of the report, each a function from data to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from spos_fast.analysis.drawing import (
    SMALL,
    bit_operations,
    dots,
    milliseconds,
    new_figure,
    percent_ticks,
    short_number,
)
from spos_fast.analysis.keys import SHADED, choice_shade, row_style, text_on
from spos_fast.analysis.page import DASHES, WIDTHS
from spos_fast.analysis.run_data import RunData, Scored
from spos_fast.analysis.summary import (
    Row,
    accuracy_floor,
    best_so_far,
    choice_shares,
    choice_tags,
    pareto_front,
    ranked,
)
from spos_fast.analysis.svg import COLOURS, DARK_ON, choice_colour, inline_svg
from spos_fast.training import Metrics

# For every cost: its name, the words on an axis, and how a value is written.
COSTS = {
    "macs": ("MACs", "MACs of one image", short_number),
    "bitops": ("BitOps", "bit operations of one image", bit_operations),
    "latency_ms": ("predicted latency", "predicted latency", milliseconds),
}


def search_curve(data: RunData) -> str:
    """Best accuracy so far against the number of candidates, with a faint dot for every candidate."""
    figure, axes = new_figure()
    phases = [("random search", "random", data.random_search), ("evolution", "evolution", data.evolution)]
    for _, colour, candidates in phases:
        if not candidates:
            continue
        numbers = np.arange(1, len(candidates) + 1)
        dots(axes, numbers, [c.accuracy for c in candidates], colour)
        best = best_so_far(candidates)
        shape = "line" if colour == "evolution" else "dashed"
        axes.plot(
            numbers, best, drawstyle="steps-post", color=COLOURS[colour], linestyle=DASHES[shape], lw=WIDTHS[shape]
        )
        axes.plot(numbers[-1:], best[-1:], "o", color=COLOURS[colour], ms=5)
    longest = max(data.evolution, data.random_search, key=len)
    for number in range(1, len(longest)):
        if longest[number].generation != longest[number - 1].generation:
            axes.axvline(number + 0.5, color=COLOURS["line"], lw=0.8, zorder=0)
    _accuracy_axis(axes, (*data.evolution, *data.random_search))
    margin = max(len(longest) * 0.02, 0.6)
    axes.set_xlim(1 - margin, len(longest) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("candidates scored")
    axes.set_ylabel("validation accuracy")
    ends = [f"{name} reaches {_percent(best_so_far(cs)[-1])} after {len(cs):,}" for name, _, cs in phases[::-1] if cs]
    return inline_svg(figure, "search", f"Best validation accuracy against candidates scored: {'; '.join(ends)}.")


def accuracy_against_cost(data: RunData, metric: str) -> str:
    """Every candidate by a cost and accuracy, the Pareto front, the best ones, and the allowed range of the cost.

    Args:
        data: the run.
        metric: one of :data:`COSTS`, which every candidate must have.
    """
    figure, axes = new_figure()
    everything = data.scored
    name, words, write = COSTS[metric]

    def costs(candidates: Iterable[Scored]) -> list[float]:
        return [getattr(candidate, metric) for candidate in candidates]

    phases = [("random", data.random_search), ("evolution", data.evolution), ("pareto", data.pareto)]
    for colour, candidates in phases:
        dots(axes, costs(candidates), [c.accuracy for c in candidates], colour, opacity=0.45)
    front = pareto_front(everything, metric)
    axes.plot(costs(front), [c.accuracy for c in front], drawstyle="steps-post", color=COLOURS["ink"], lw=1.2)
    marks = {"evolution": ("*", 14), "random": ("D", 7)}
    for colour, candidates in phases[:2]:
        best = next(iter(ranked(candidates)), None)
        if best is not None:
            mark, size = marks[colour]
            axes.plot(
                costs([best]), best.accuracy, mark, color=COLOURS[colour], ms=size, mec=COLOURS["ink"], mew=1, zorder=5
            )
    _accuracy_axis(axes, everything)
    limits = [(end, value) for end in ("min", "max") if (value := getattr(data.config.search, f"{metric}_{end}"))]
    for end, value in limits:
        axes.axvline(value, color=COLOURS["muted"], lw=1.2, ls=(0, (2, 2)))
        axes.annotate(
            f"{metric}_{end} {write(value)}", (value, 1.02), xycoords=("data", "axes fraction"), va="bottom",
            ha="right" if end == "max" else "left", fontsize=SMALL - 1, color=COLOURS["muted"],
        )  # fmt: skip
    ends = costs(everything) + [value for _, value in limits]
    margin = max((max(ends) - min(ends)) * 0.05, max(ends) * 0.01)
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.set_xlabel(words)
    axes.set_ylabel("validation accuracy")
    best = ranked(everything)[0]
    return inline_svg(
        figure, metric,
        f"Validation accuracy against {name} of {len(everything):,} candidates; the best has {_percent(best.accuracy)} "
        f"at {write(costs([best])[0])}; {len(front)} candidates are on the Pareto front.",
    )  # fmt: skip


def choice_map(data: RunData, rows: Sequence[Row], kind: str) -> str:
    """Share of every block, width or pair of bit-widths at every layer among the best of evolution, and below it the
    compared architectures.
    """
    layers, names = data.layers, data.names(kind)
    searched = names[: data.searched[kind]]
    tags = choice_tags(names)
    top = ranked(data.evolution)[: data.config.search.top_k]
    shares = choice_shares([data.of_kind(kind, candidate.genes) for candidate in top], layers, len(searched))
    shown = [row for row in rows if row.genes is not None]
    left, cell, height = 150, min(104, max(34, 890 // layers)), 25
    gap = 1.3 if top else 0.0
    heat_rows = len(searched) if top else 0
    total = heat_rows + gap + len(shown)
    width, tall = left + cell * layers + 12, height * total + 40
    figure = Figure(figsize=(width / 72, tall / 72), dpi=72)
    axes = figure.add_axes((left / width, 6 / tall, cell * layers / width, height * total / tall))
    axes.set(xlim=(0, layers), ylim=(total, 0), xticks=np.arange(layers) + 0.5, yticks=[])
    axes.set_xticklabels(data.layer_names, fontsize=SMALL, color=COLOURS["muted"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if top:
        for choice, name in enumerate(searched):
            _row_label(axes, choice, name)
            for layer in range(layers):
                share = shares[choice, layer]
                colour = kind if kind in SHADED else choice_colour(choice)
                full = share >= (0.45 if colour in DARK_ON else 0.75)
                text_colour = f"on-{colour}" if full else "ink"
                _cell(axes, layer, choice, colour, share, f"{share:.0%}" if share else "", text_colour)
        _row_label(axes, heat_rows + gap / 2 - 0.5, "chosen architecture:", muted=True)
    for index, row in enumerate(shown):
        y = heat_rows + gap + index
        _row_label(axes, y, row.title)
        for layer, choice in enumerate(data.of_kind(kind, row.genes or ())):
            if kind in SHADED:
                shade = choice_shade(kind, choice, names)
                _cell(axes, layer, y, kind, shade, tags[choice], text_on(kind, shade))
            else:
                _cell(axes, layer, y, choice_colour(choice), 1.0, tags[choice], f"on-{choice_colour(choice)}")
    for edge in np.cumsum(data.stages)[:-1]:
        axes.axvline(edge, color=COLOURS["ink"], lw=1.2)
    often = ", ".join(names[int(np.argmax(shares[:, layer]))] for layer in range(layers)) if top else "none"
    return inline_svg(
        figure, f"{kind}s",
        f"The {kind} of every layer. Most frequent among the {len(top)} best of evolution, from the first layer to the "
        f"last: {often}.",
    )  # fmt: skip


def training_curves(rows: Sequence[Metrics], name: str) -> tuple[str, str]:
    """Loss and accuracy of the supernet against the step."""
    steps = [row.step for row in rows]
    out = []
    for quantity, values in (("loss", [row.loss for row in rows]), ("accuracy", [row.accuracy for row in rows])):
        figure, axes = new_figure(height=260)
        axes.plot(steps, values, color=COLOURS["evolution"], lw=1.8, marker="o" if len(rows) == 1 else "")
        _step_axis(axes, quantity, rows[-1].steps)
        description = f"Training {quantity} of the {name}: {values[-1]:.4g} at step {steps[-1]:,}."
        out.append(inline_svg(figure, f"{name}-{quantity}", description))
    return out[0], out[1]


def retraining_curves(rows: Sequence[Row], data: RunData) -> tuple[str, str]:
    """Loss and accuracy of every retrained architecture against the step.

    The axes span the values after the first fifth of the rows: networks differ at the end, not in the steep beginning.
    """
    trained = [(row, row.retrained.metrics) for row in rows if row.retrained and row.retrained.metrics]
    out = []
    for quantity in ("loss", "accuracy"):
        figure, axes = new_figure(height=330)
        settled: list[float] = []
        for row, metrics in trained:
            _, colour, shape = row_style(row, data)
            values = [getattr(point, quantity) for point in metrics]
            axes.plot(
                [point.step for point in metrics], values, color=COLOURS[colour], linestyle=DASHES[shape],
                lw=WIDTHS[shape], marker="o" if len(metrics) == 1 else "", zorder=4 if shape == "line" else 2,
            )  # fmt: skip
            settled += values[len(values) // 5 :]
        settled = [value for value in settled if math.isfinite(value)]
        if settled and max(settled) > min(settled):
            margin = 0.05 * (max(settled) - min(settled))
            axes.set_ylim(min(settled) - margin, max(settled) + margin)
        _step_axis(axes, quantity, data.config.retrain.steps)
        names = ", ".join(f"{row.title} {getattr(metrics[-1], quantity):.4g}" for row, metrics in trained)
        out.append(inline_svg(figure, f"retrain-{quantity}", f"Training {quantity} at the last step: {names}."))
    return out[0], out[1]


def _accuracy_axis(axes: Axes, candidates: Sequence[Scored]) -> None:
    values = [c.accuracy for c in candidates if math.isfinite(c.accuracy)] or [0.0]
    low, high = accuracy_floor(values), max(values)
    margin = max((high - low) * 0.06, 0.004)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(percent_ticks())


def _step_axis(axes: Axes, quantity: str, steps: int) -> None:
    axes.set_xlim(0, steps * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step")
    axes.set_ylabel(f"training {quantity}")
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(percent_ticks())


def _row_label(axes: Axes, y: float, text: str, muted: bool = False) -> None:
    text = text if len(text) <= 22 else text[:21] + "…"
    axes.text(
        -0.15, y + 0.5, text, ha="right", va="center", fontsize=SMALL, color=COLOURS["muted" if muted else "ink"],
        parse_math=False,
    )  # fmt: skip


def _cell(axes: Axes, layer: int, y: float, colour: str, opacity: float, text: str, text_colour: str) -> None:
    box = (layer + 0.03, y + 0.06)
    axes.add_patch(Rectangle(box, 0.94, 0.88, fc=COLOURS[colour], lw=0, alpha=max(opacity, 0.04)))
    if text:
        axes.text(layer + 0.5, y + 0.53, text, ha="center", va="center", fontsize=SMALL - 1, color=COLOURS[text_colour])


def _percent(value: float) -> str:
    return "no number" if math.isnan(value) else f"{value:.1%}"
