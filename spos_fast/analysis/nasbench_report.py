"""The HTML report on a NAS-Bench-101 file: the analysis of the paper on whatever the file holds. Imports no torch."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

import spos_fast
from spos_fast.analysis import nasbench_figures as figures
from spos_fast.analysis.drawing import short_number
from spos_fast.analysis.nasbench_structure import locality_section, operations_section, shape_section
from spos_fast.analysis.nasbench_text import (
    absent,
    known,
    listed,
    median_and_range,
    percent,
    points,
    spaced,
    three_correlations,
)
from spos_fast.analysis.page import card, document, figure_key, table, tiles
from spos_fast.checkpoint import write_whole
from spos_fast.errors import InputError
from spos_fast.nasbench import statistics
from spos_fast.nasbench.locality import locality
from spos_fast.nasbench.results import CELLS, CellResults

_BUDGET_STYLES = (("random", "dotted"), ("choice-0", "thin"), ("choice-1", "dashed"), ("evolution", "line"))
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
# Below this a training on 10 classes has learned next to nothing.
_DIVERGED = 0.15
_PAPER = '<a href="https://arxiv.org/abs/1902.09635">arXiv 1902.09635</a>'


def write_statistics(results: CellResults, path: str | Path, *, walks: int = 30_000, seed: int = 0) -> Path:
    """Write the report on ``results`` to ``path``; the same arguments give the same bytes.

    Raises:
        InputError: no cell has a validation accuracy.
        CheckpointError: the report could not be written; a file that was there is untouched.
    """
    write_whole(path, page(results, walks=walks, seed=seed).encode())
    return Path(path)


def page(results: CellResults, *, walks: int = 30_000, seed: int = 0) -> str:
    """The report as an HTML document; ``walks`` random walks from ``seed`` measure locality."""
    if not np.isfinite(results.mean("validation")).any():
        raise InputError(f"{results.name}: no cell has a validation accuracy at {results.epochs[-1]} epochs")
    sections = [
        _head(results),
        _accuracy(results),
        _parts(results),
        _cost(results),
        operations_section(results),
        shape_section(results),
        locality_section(locality(results, walks=walks, seed=seed), results),
        _budgets(results),
        _foot(results, seed),
    ]
    return document(f"NAS-Bench-101: {results.name}", sections)


def _head(results: CellResults) -> str:
    accuracy = results.mean("validation")
    known = accuracy[np.isfinite(accuracy)]
    longest = results.epochs[-1]
    best = int(np.nanargmax(accuracy))
    whole = "all" if results.complete else f"{len(results) / CELLS:.2%}"
    trainings = f"{results.repeats} trainings" if results.repeats > 1 else "one training"
    lead = (
        f"{len(results):,} cells, {whole} of the space, with {trainings} of each. After {longest} epochs half of them "
        f"are above <b>{percent(np.median(known))}</b> validation accuracy; the best has "
        f"<b>{percent(known.max())}</b> (<code>{escape(results.hashes[best])}</code>)."
    )
    missing = "<br>".join(escape(text) for text in _missing(results))
    notice = f'<p class="missing">{missing}</p>' if missing else ""
    over = f"over {len(known):,} cells"
    low = int((known < _DIVERGED).sum())
    entries = [
        ("Best", percent(known.max()), f"validation accuracy, {over}"),
        ("Median", percent(np.median(known)), f"mean {percent(known.mean())}, deviation {points(known.std())}"),
        ("Above 90%", f"{(known > 0.9).mean():.1%}", f"above 94%: {(known > 0.94).mean():.2%}, {over}"),
        ("Diverged", f"{low:,}", f"{low / len(known):.2%} below 15%, {over}"),
        ("Parameters", short_number(float(np.median(results.params))), median_and_range(results.params)),
    ]
    if results.has("time"):
        time = results.mean("time")
        seconds = time[np.isfinite(time)]
        entries.append(("Training", f"{np.median(seconds):,.0f} s", f"{seconds.min():,.0f} to {seconds.max():,.0f} s"))
    return f"""<h1>NAS-Bench-101</h1>
<p class="path">What <code>{escape(results.name)}</code> says; budgets of {listed(results.epochs)} epochs</p>
<p class="lead">{lead}</p>
{notice}{tiles(entries)}"""


def _missing(results: CellResults) -> list[str]:
    """What this source cannot show, in sentences."""
    out = []
    if not results.complete:
        out.append(
            f"This file holds {len(results):,} of {CELLS:,} cells. If they are a uniform sample, distributions and "
            "means carry over to the space; figures over neighbouring cells rest on the few pairs of which both are "
            "here, and the best cell of the space need not be among them."
        )
    if not results.has("test"):
        out.append("It holds no test accuracy: correlation of validation and test and test regret cannot be shown.")
    if not results.has("train"):
        out.append("It holds no training accuracy.")
    if results.repeats < 2:
        out.append("It holds one training of each cell: the noise between repeats cannot be shown.")
    silent = [str(epochs) for epochs in results.epochs if not results.has("time", epochs)]
    if silent:
        out.append(f"It holds no training time for {listed(silent)} epochs.")
    if len(results.epochs) < 2:
        out.append(f"It holds {results.epochs[0]} epochs only: budgets cannot be compared.")
    return out


def _accuracy(results: CellResults) -> str:
    styles = _styles(len(results.epochs))
    series = [
        (f"{epochs} epochs", colour, shape, results.mean("validation", epochs))
        for epochs, (colour, shape) in zip(results.epochs, styles, strict=True)
    ]
    counts = ", ".join(f"{int(np.isfinite(values).sum()):,} cells at {name}" for name, _, _, values in series)
    first = card(
        "Validation accuracy", figures.ecdf_figure("ecdf", series, "validation accuracy"), f"{counts}.",
        figure_key((name, colour, shape) for name, colour, shape, _ in series),
    )  # fmt: skip
    noises = [
        (name, colour, shape, statistics.noise(results, name))
        for name, colour, shape in (("validation", "evolution", "line"), ("test", "random", "dashed"))
    ]
    noises = [entry for entry in noises if len(entry[3])]
    if noises:
        counted = ", ".join(f"{name} {len(values):,} cells" for name, _, _, values in noises)
        again = statistics.repeat_correlation(results)
        second = card(
            f"Noise between repeats, {results.epochs[-1]} epochs",
            figures.ecdf_figure("noise", noises, "standard deviation over repeats", low=0),
            f"{counted}. Medians: {listed(f'{name} {points(float(np.median(v)))}' for name, _, _, v in noises)}. "
            f"Spearman's correlation of the first two trainings: {again.spearman:.3f} over {again.count:,} cells.",
            figure_key((name, colour, shape) for name, colour, shape, _ in noises),
        )
    else:
        second = absent("Noise between repeats", "needs at least two trainings of a cell")
    rows = []
    for name, _, _, values in series:
        known = values[np.isfinite(values)]
        shares = [percent(value) for value in np.quantile(known, _QUANTILES)] if len(known) else ["–"] * 8
        rows.append((name, f"{len(known):,}", *shares, percent(known.max()) if len(known) else "–"))
    head = ("Budget", "Cells", *(f"{100 * share:g}%" for share in _QUANTILES), "Best")
    return f"""<h2>How good cells are</h2>
<div class="pair">{first}{second}</div>
{spaced(table(head, rows, "Quantiles of the validation accuracy, means over the repeats."))}"""


def _parts(results: CellResults) -> str:
    """Training, validation and test accuracy."""
    there = [name for name in ("train", "validation", "test") if results.has(name)]
    if len(there) < 2:
        return "<h2>Training, validation and test</h2>" + absent("", "needs training or test accuracies")
    means = {name: results.mean(name) for name in there}
    pairs = [
        (a, b) for a, b in (("validation", "test"), ("train", "validation"), ("train", "test")) if {a, b} <= {*there}
    ]
    drawn: list[str] = []
    rows = []
    for a, b in pairs:
        found = statistics.correlation(means[a], means[b])
        rows.append(
            (
                f"{a} and {b}",
                f"{found.count:,}",
                *three_correlations(found),
                points(float(np.nanmean(means[a] - means[b]))),
            )
        )
        if len(drawn) < 2:
            svg = figures.scatter_figure(f"{a}-{b}", means[a], means[b], (f"{a} accuracy", f"{b} accuracy"))
            drawn.append(card(f"{a} against {b}".capitalize(), svg, f"{found.count:,} cells; dashed: equal."))
    head = ("Accuracies", "Cells", "Pearson", "Spearman", "Kendall", "Mean difference")
    note = f"After {results.epochs[-1]} epochs, means over the repeats. Axes leave out the lowest 1%."
    return f"""<h2>Training, validation and test</h2>
<div class="pair">{"".join(drawn)}</div>
{spaced(table(head, rows, note))}"""


def _cost(results: CellResults) -> str:
    accuracy = results.mean("validation")
    marks = "ABCD"
    named = [
        (results.row_of[name], marks[index])
        for index, name in enumerate(statistics.NAMED_CELLS)
        if name in results.row_of
    ]
    costs = [("params", results.params.astype(np.float64), "trainable parameters", False)]
    if results.has("time"):
        costs.append(("time", results.mean("time"), f"seconds of training, {results.epochs[-1]} epochs", True))
    drawn = []
    for name, cost, label, seconds in costs:
        front = statistics.pareto_front(cost, accuracy)
        known = int((np.isfinite(cost) & np.isfinite(accuracy)).sum())
        drawn.append(
            card(
                f"Accuracy and {'training time' if seconds else 'parameters'}",
                figures.cost_figure(f"cost-{name}", cost, accuracy, label, named, seconds),
                f"{known:,} cells; {len(front)} on the Pareto front. The axis leaves out the lowest 1%.",
                figure_key((("cells", "evolution", "dot"), ("Pareto front", "ink", "thin"))),
            )
        )
    if len(drawn) < 2:
        drawn.append(absent("Accuracy and training time", "needs training times"))
    pairs = [("parameters and accuracy", costs[0][1], accuracy)]
    if len(costs) > 1:
        pairs += [("time and accuracy", costs[1][1], accuracy), ("parameters and time", costs[0][1], costs[1][1])]
    rows = []
    for title, first, second in pairs:
        found = statistics.correlation(first, second)
        rows.append((title, f"{found.count:,}", *three_correlations(found)))
    return f"""<h2>What accuracy costs</h2>
<div class="pair">{"".join(drawn)}</div>
{spaced(_named_cells(results, marks))}
{spaced(table(("Correlation", "Cells", "Pearson", "Spearman", "Kendall"), rows))}"""


def _named_cells(results: CellResults, marks: str) -> str:
    rows: list[tuple[str, ...]] = []
    for mark, (name, text) in zip(marks, statistics.NAMED_CELLS.items(), strict=True):
        row = results.row_of.get(name)
        if row is None:
            rows.append((f"{mark}: {text}", name[:8], "not in this file", "–", "–", "–"))
            continue
        values = [results.mean(kind)[row] for kind in ("validation", "test")]
        time = results.mean("time")[row]
        rows.append(
            (
                f"{mark}: {text}",
                name[:8],
                f"{results.params[row]:,}",
                known(time, f"{time:,.0f} s"),
                *(known(value, percent(value)) for value in values),
            )
        )
    return table(("Named cell", "Hash", "Parameters", "Training", "Validation", "Test"), rows)


def _budgets(results: CellResults) -> str:
    if len(results.epochs) < 2:
        return "<h2>Short budgets as a guide to long ones</h2>" + absent("", "needs more than one budget")
    shares = (
        ("all cells", 1.0, "evolution", "line"),
        ("best 10%", 0.1, "choice-1", "dashed"),
        ("best 1%", 0.01, "random", "dotted"),
    )
    found = {title: statistics.budget_correlations(results, share) for title, share, _, _ in shares}
    longest = results.epochs[-1]
    series = [
        (title, colour, shape, [found[title][epochs, longest].spearman for epochs in results.epochs[:-1]])
        for title, _, colour, shape in shares
    ]
    drawn = card(
        f"Rank correlation with {longest} epochs",
        figures.budget_figure("budgets", results.epochs[:-1], series),
        f"{listed(f'{title}: {found[title][results.epochs[0], longest].count:,}' for title, *_ in shares)}; "
        f"the best by accuracy after {longest} epochs.",
        figure_key((title, colour, shape) for title, colour, shape, _ in series),
    )
    rows = [
        (
            f"{short} and {long}",
            *(
                text
                for title, *_ in shares
                for text in (f"{found[title][short, long].spearman:.3f}", f"{found[title][short, long].kendall:.3f}")
            ),
        )
        for short, long in found["all cells"]
    ]
    head = ["Epochs"]
    for title, *_ in shares:
        head += [f"Spearman, {title}", f"Kendall, {title}"]
    short = results.epochs[-2]
    pair = (results.mean("validation", short), results.mean("validation"))
    beside = card(
        f"{longest} epochs against {short}",
        figures.scatter_figure(
            "short-long", *pair, (f"validation accuracy, {short}", f"validation accuracy, {longest}")
        ),
        f"{found['all cells'][short, longest].count:,} cells; axes leave out the lowest 1%.",
    )
    return f"""<h2>Short budgets as a guide to long ones</h2>
<div class="pair">{drawn}{beside}</div>
{spaced(table(head, rows, "Validation accuracies, means over the repeats."))}"""


def _foot(results: CellResults, seed: int) -> str:
    return f"""<footer class="note">Accuracies are means over the known repeats of a cell after {results.epochs[-1]}
epochs unless said otherwise. Random walks: seed {seed}. Written by spos_fast {escape(spos_fast.__version__)}. Analysis
after Ying et al., NAS-Bench-101: Towards Reproducible Neural Architecture Search, {_PAPER}.</footer>"""


def _styles(count: int) -> list[tuple[str, str]]:
    """Colours and lines of budgets; the longest has the strongest."""
    return [_BUDGET_STYLES[max(0, index + len(_BUDGET_STYLES) - count)] for index in range(count)]
