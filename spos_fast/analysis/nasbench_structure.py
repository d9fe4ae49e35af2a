"""Sections of the NAS-Bench-101 report on what a cell's structure is worth: operations, shape, neighbours. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spos_fast.analysis import nasbench_figures as figures
from spos_fast.analysis.nasbench_text import (
    absent,
    accuracy_and_interval,
    known,
    listed,
    percent,
    rank_and_interval,
    spaced,
)
from spos_fast.analysis.page import card, figure_key, table
from spos_fast.nasbench import statistics
from spos_fast.nasbench.locality import Autocorrelation, Locality, noise_distance
from spos_fast.nasbench.results import CellResults

_OPS = ("conv3x3", "conv1x1", "maxpool3x3")
_OP_COLOURS = ("choice-1", "choice-3", "choice-4")


def operations_section(results: CellResults) -> str:
    """What each operation is worth: by how often it occurs, and in pairs of cells that differ in one."""
    groups = statistics.by_operation(results)
    series = [(name, colour, group) for name, colour, group in zip(_OPS, _OP_COLOURS, groups, strict=True)]
    first = card(
        "How often an operation occurs",
        figures.group_figure("operations", series, "times in the cell"),
        "Dots: mean; bars: quartiles. The table below says how many cells each dot rests on.",
        figure_key((name, colour, "dot") for name, colour, _ in series),
    )
    effects = statistics.replacements(results)
    if any(len(entry.accuracy) for entry in effects):
        second = card(
            "One operation replaced by another",
            figures.replacement_figure("replacement", effects, _OPS),
            "Pairs of cells with the same graph that differ in one operation: "
            + listed(f"{len(e.accuracy):,} for {_OPS[e.before]} to {_OPS[e.after]}" for e in effects)
            + ". Thick: middle 50%; thin: middle 90%.",
            figure_key((("mean", "evolution", "diamond"), ("pairs", "random", "line"))),
        )
    else:
        second = absent("One operation replaced by another", "no two cells of this file differ in one operation only")
    rows = []
    for entry in effects:
        for sign, before, after in ((1, entry.before, entry.after), (-1, entry.after, entry.before)):
            mean, time = (
                sign * float(values.mean()) if len(values) else math.nan for values in (entry.accuracy, entry.time)
            )
            rows.append(
                (
                    f"{_OPS[before]} to {_OPS[after]}",
                    f"{len(entry.accuracy):,}",
                    known(mean, f"{100 * mean:+.2f}"),
                    known(entry.interval, f"± {100 * entry.interval:.2f}"),
                    known(time, f"{time:+,.0f} s"),
                )
            )
    effect = table(
        ("Replacement", "Pairs", "Mean change, points", "95% interval", "Mean change of time"), rows,
        "The interval takes pairs as independent; pairs that share a cell are not, so it is somewhat too narrow.",
    )  # fmt: skip
    counts = table(
        ("Times in the cell", *(str(number) for number in range(6))),
        [
            (f"{name}: {what}", *(text(by.get(number)) for number in range(6)))
            for name, group in zip(_OPS, groups, strict=True)
            for by in [{entry.value: entry for entry in group}]
            for what, text in (
                ("accuracy", lambda g: "–" if g is None else percent(g.mean)),
                ("cells", lambda g: "0" if g is None else f"{g.count:,}"),
                ("mean time", lambda g: "–" if g is None else known(g.time, f"{g.time:,.0f} s")),
            )
        ],
    )
    return f"""<h2>Operations</h2>
<div class="pair">{first}{second}</div>
{spaced(effect)}{spaced(counts)}"""


def shape_section(results: CellResults) -> str:
    """Accuracy by depth and by width of the cell."""
    drawn = []
    for title, label, groups in (
        ("Depth", "edges on the longest path", statistics.by_depth(results)),
        ("Width", "edges of the largest directed cut", statistics.by_width(results)),
    ):
        counts = listed(f"{group.value}: {percent(group.mean)} over {group.count:,}" for group in groups)
        svg = figures.group_figure(title.lower(), [("", "evolution", groups)], label)
        drawn.append(card(title, svg, f"Dots: mean; bars: quartiles. Means and numbers of cells: {counts}."))
    return f'<h2>Depth and width</h2>\n<div class="pair">{"".join(drawn)}</div>'


def locality_section(found: Locality, results: CellResults) -> str:
    """How alike the accuracies of neighbouring cells are, by steps of a random walk and by edits."""
    key = figure_key((("accuracies", "evolution", "line"), ("ranks", "random", "dashed")))
    drawn = [
        card(
            title, figures.autocorrelation_figure(name, series, label),
            f"Bands: 95% intervals. {_noise_text(series)}", key,
        )
        for title, name, series, label in (
            ("Along random walks", "by-step", found.by_step, "steps of the walk"),
            ("By edits between two cells", "by-edit", found.by_edit, "edits between the cells"),
        )
    ]  # fmt: skip
    rows = [
        (
            str(a.distance),
            f"{a.pairs:,}",
            accuracy_and_interval(a),
            rank_and_interval(a),
            f"{b.pairs:,}",
            accuracy_and_interval(b),
            rank_and_interval(b),
        )
        for a, b in zip(found.by_step, found.by_edit, strict=True)
    ]
    head = ("Distance", "Pairs, steps", "Accuracies", "Ranks", "Pairs, edits", "Accuracies", "Ranks")
    share = "" if results.complete else f" Of the later ones {found.known:.1%} are in this file, and only those count."
    note = (
        f"{found.walks:,} walks of {found.steps} steps, each from another cell of the file; a step adds or removes an "
        "edge or replaces an operation, and leads to another cell of the space. Pairs are of a walk's first cell and a "
        f"later one.{share} Correlation of validation accuracies, and of their ranks, in which a diverged training "
        "weighs no more than another bad one. Intervals: 95%, by resampling walks. Edits are counted in the walk's "
        "numbering of the vertices."
    )
    return f"""<h2>Locality</h2>
<div class="pair">{"".join(drawn)}</div>
{spaced(table(head, rows, note))}"""


def _noise_text(series: Sequence[Autocorrelation]) -> str:
    parts = []
    for quantity, title in (("accuracy", "accuracies"), ("rank", "ranks")):
        distance = noise_distance(list(series), quantity)
        where = "stays above zero throughout" if distance is None else f"first reaches zero at distance {distance}"
        parts.append(f"that of {title} {where}")
    return f"The interval: {'; '.join(parts)}."
