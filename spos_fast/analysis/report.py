"""The HTML report of a run: one file without scripts and without anything to load, for a browser, a phone or print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch

import spos_fast
from spos_fast.analysis.commands import again_commands, stage_command
from spos_fast.analysis.drawing import bit_operations, milliseconds, short_number
from spos_fast.analysis.keys import COST_KEY, PARETO_KEY, SEARCH_KEY, row_style
from spos_fast.analysis.page import card, document, figure_key
from spos_fast.analysis.page import tiles as page_tiles
from spos_fast.analysis.plots import (
    COSTS,
    accuracy_against_cost,
    choice_map,
    retraining_curves,
    search_curve,
    training_curves,
)
from spos_fast.analysis.run_data import RunData, read_run
from spos_fast.analysis.summary import Row, accuracy_floor, comparison, wilson_interval
from spos_fast.analysis.tables import comparison_table, front_table, interval_text, percent, settings_tables
from spos_fast.checkpoint import write_whole


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run folder from whatever it holds so far; no other file is touched.

    The same content of the folder gives the same bytes. Another process may be working in the folder.

    Returns:
        Path of the report.

    Raises:
        InputError: the folder is no run folder.
        CheckpointError: the report could not be written; the one that was there is untouched.
    """
    data = read_run(Path(run))
    path = data.path / "report.html"
    write_whole(path, page(data).encode())
    return path


def page(data: RunData) -> str:
    """The report as an HTML document."""
    rows = comparison(data)
    name = data.path.resolve().name
    sections = [
        _head(data, rows),
        _comparison(data, rows),
        _search(data, rows),
        _supernet(data),
        _retraining(data, rows),
        _settings(data),
    ]
    return document(f"{name}: architecture search on {data.config.data.name}", sections)


def _head(data: RunData, rows: Sequence[Row]) -> str:
    problems = "".join(f'<p class="missing">{escape(problem)}</p>' for problem in data.problems)
    return f"""<h1>Single-path one-shot search on {escape(data.config.data.name)}</h1>
<p class="path">Run folder <code>{escape(str(data.path))}</code></p>
<p class="lead">{_headline(data, rows)}</p>
{problems}{_tiles(data, rows)}"""


def _headline(data: RunData, rows: Sequence[Row]) -> str:
    """The result in two or three sentences, with no claim that the intervals do not carry."""
    found = {row.label: row for row in rows}
    evolution, other = found.get("evolution"), found.get("random_search")
    if evolution is None or evolution.scored is None:
        if not data.supernet:
            return "The supernet has no finished steps on record yet; every later result builds on it."
        last = data.supernet[-1]
        return (
            f"The supernet is trained for {last.step:,} of {last.steps:,} steps; its sampled paths reach "
            f"{percent(last.accuracy, 1)} training accuracy. No architecture has been searched for yet."
        )
    best = evolution.scored
    so_far = "" if data.search_finished else " so far"
    text = (
        f"Evolution scored {len(data.evolution):,} architectures{so_far}. Its best reaches "
        f"<b>{percent(best.accuracy, best.images)}</b> validation accuracy with the supernet's weights at "
    )
    cost = (
        f"<b>{short_number(best.macs)}</b> MACs"
        if best.bitops is None
        else f"<b>{bit_operations(best.bitops)}</b> BitOps"
    )
    text += cost
    if evolution.result is None:
        return text + "; it has not been retrained yet."
    how = "from scratch" if data.config.retrain.init == "scratch" else "from the supernet's weights"
    result = evolution.result
    text += (
        f". Retrained {how} it gets <b>{percent(result.accuracy, result.images)}</b> of the test images right "
        f"(95% interval {interval_text(result)})"
    )
    if other is None or other.result is None:
        return text + "."
    margin = 100 * (result.accuracy - other.result.accuracy)
    side = "level with" if margin == 0 else f"{abs(margin):.1f} points {'above' if margin > 0 else 'below'}"
    ours = wilson_interval(result.accuracy, result.images)
    theirs = wilson_interval(other.result.accuracy, other.result.images)
    overlap = ours[0] <= theirs[1] and theirs[0] <= ours[1]
    verdict = "; the intervals overlap, so this run alone does not tell them apart" if overlap and margin else ""
    return f"{text}, {side} the best of random search{verdict}."


def _tiles(data: RunData, rows: Sequence[Row]) -> str:
    evolution = next((row for row in rows if row.label == "evolution"), None)
    tiles: list[tuple[str, str, str]] = []
    if evolution and evolution.scored:
        best = evolution.scored
        below = f"best of evolution, {best.images:,} images"
        tiles.append(("Validation accuracy", percent(best.accuracy, best.images), below))
    if evolution and evolution.result:
        result = evolution.result
        below = f"retrained; interval {interval_text(result)}"
        tiles.append(("Test accuracy", percent(result.accuracy, result.images), below))
    if evolution and evolution.macs is not None and evolution.params is not None:
        everything = [c.macs for c in data.scored] or [evolution.macs]
        scale = f"scored ones: {short_number(min(everything))} to {short_number(max(everything))}"
        tiles.append(("MACs", short_number(evolution.macs), scale))
        tiles.append(("Params", short_number(evolution.params), "convolutions and classifier"))
    if evolution and evolution.bitops is not None:
        counts = [c.bitops for c in data.scored if c.bitops is not None] or [evolution.bitops]
        scale = f"scored ones: {bit_operations(min(counts))} to {bit_operations(max(counts))}"
        tiles.append(("BitOps", bit_operations(evolution.bitops), scale))
    if evolution and evolution.latency_ms is not None:
        tiles.append(("Latency", milliseconds(evolution.latency_ms), "predicted by the latency table"))
    if data.scored:
        parts = f"{len(data.evolution):,} evolution, {len(data.random_search):,} random search"
        parts += f", {len(data.pareto):,} Pareto search" if data.pareto else ""
        tiles.append(("Candidates scored", f"{len(data.scored):,}", parts))
    if data.supernet:
        last = data.supernet[-1]
        speed = float(np.median([row.images_per_second for row in data.supernet]))
        speed_text = f", {speed:,.0f} images/s" if math.isfinite(speed) else ""
        tiles.append(("Supernet steps", f"{last.step:,}", f"of {last.steps:,}{speed_text}"))
    return page_tiles(tiles)


def _comparison(data: RunData, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    images = sorted({row.scored.images for row in rows if row.scored})
    on_images = f" on {', '.join(f'{count:,}' for count in images)} images" if images else ""
    return f"""<h2>Comparison</h2>
{comparison_table(rows, data)}
<p class="note">Validation accuracy is measured with weights inherited from the supernet{on_images}; the best of a
search is a maximum over many candidates and so flatters its architecture. A dash means that the search did not meet the
architecture. The interval is Wilson's 95% score interval for the test images; it does not cover another seed of
training. MACs and params count convolutions and the classifier.{_further_costs(data, rows)}</p>"""


def _further_costs(data: RunData, rows: Sequence[Row]) -> str:
    """What bit operations and a predicted latency are, if there are any."""
    text = ""
    if any(row.bitops is not None for row in rows):
        text = (
            " BitOps are MACs times bits of the weights times bits of the activations, over quantized convolutions; "
            "G is 2<sup>30</sup>, M is 2<sup>20</sup>."
        )
    if not data.config.search.latency_table:
        return text
    return f"{text} Latency is the sum of the medians of the run's latency table, <code>search/latency.json</code>."


def _search(data: RunData, rows: Sequence[Row]) -> str:
    parts = ["<h2>Search</h2>"]
    scored = data.scored
    if not scored:
        return parts[0] + _missing("The search has not run yet", data, "search")
    if not data.search_finished:
        done = f"{len(data.evolution):,} candidates of evolution and {len(data.random_search):,} of random search"
        done += f" and {len(data.pareto):,} of the Pareto search" if data.config.search.objectives else ""
        wanted = f"{data.budget:,} each" if data.config.search.random_search else f"{data.budget:,}"
        what = f"The search has not finished: {done} are scored, of at most {wanted}; to go on"
        parts.append(_missing(what, data, "search"))
    floor = accuracy_floor(c.accuracy for c in scored)
    below = sum(c.accuracy < floor for c in scored)
    hidden = f" {below:,} of {len(scored):,} candidates lie below the axis." if below else ""
    nans = sum(math.isnan(c.accuracy) for c in scored)
    hidden += f" {nans:,} candidates have no accuracy." if nans else ""
    failed, stopped = sum(c.failed for c in scored), sum(c.stopped for c in scored)
    hidden += f" Failed (NaN or infinity): {failed:,}." if failed else ""
    hidden += f" Stopped early, shown as far as they got: {stopped:,}." if stopped else ""
    curve = ""
    if data.evolution or data.random_search:
        caption = "Lines: best validation accuracy so far. Dots: single candidates. Vertical lines: generations."
        curve = card("Best so far", search_curve(data), caption + hidden, figure_key(SEARCH_KEY))
    parts.append(f'<div class="pair">{curve}{"".join(_against_cost(data, hidden))}</div>')
    if data.front:
        names = ", ".join(data.config.search.objectives)
        parts.append(
            f"<h2>Pareto search</h2>{front_table(data)}"
            f'<p class="note">NSGA-II for {escape(names)}: what it scored and no other candidate of it beats. A label '
            f"is what <code>spos-fast retrain --arch</code> takes; <code>front</code> stands for all of them.</p>"
        )
    top = min(data.config.search.top_k, len(data.evolution))
    above = f"Above: share of every choice among the {top} best architectures of evolution, layer by layer. "
    caption = (above if top else "") + "Below: the compared architectures."
    caption += " Thick lines part the stages." if hasattr(data.config.space, "stage_repeats") else ""
    for kind in data.kinds:
        drawn = card("", choice_map(data, rows, kind), caption, wide=True)
        parts.append(f"<h2>Which {kind} where</h2>{drawn}")
    return "\n".join(parts)


def _against_cost(data: RunData, hidden: str) -> Iterator[str]:
    key = (*COST_KEY, PARETO_KEY) if data.pareto else COST_KEY
    front = "Dots: candidates. The Pareto front joins those that none beats in both accuracy and"
    titles = {"macs": "cost", "bitops": "bit operations", "latency_ms": "latency"}
    for metric, (name, _, _) in COSTS.items():
        if all(getattr(candidate, metric) is not None for candidate in data.scored):
            drawing = accuracy_against_cost(data, metric)
            yield card(f"Accuracy against {titles[metric]}", drawing, f"{front} {name}.{hidden}", figure_key(key))


def _supernet(data: RunData) -> str:
    parts = ["<h2>Supernet training</h2>"]
    if data.supernet:
        last = data.supernet[-1]
        if last.step < last.steps:
            parts.append(_missing(f"Training is at step {last.step:,} of {last.steps:,}; to go on", data, "train"))
        loss, accuracy = training_curves(data.supernet, "supernet")
        parts.append(f'<div class="pair">{card("Loss", loss)}{card("Accuracy", accuracy)}</div>')
        note = "Means since the row before, on augmented training images, over uniformly sampled paths."
        train = data.config.train
        if train.widening_end:
            first, all_in = (round(share * train.steps) for share in (train.widening_start, train.widening_end))
            if len(data.names("width")) <= 2:
                all_in = first  # the one smaller ratio joins when the widest is no longer alone
            note += f" Blocks run at their widest for {first:,} steps; all widths are drawn from step {all_in:,} on."
        parts.append(f'<p class="note">{note}</p>')
    elif data.config.search.supernet:
        published = escape(data.config.search.supernet)
        parts.append(f"<p>The search uses the published supernet <code>{published}</code>.</p>")
    else:
        parts.append(_missing("Training has not reported its first steps yet", data, "train"))
    return "\n".join(parts)


def _retraining(data: RunData, rows: Sequence[Row]) -> str:
    parts = ["<h2>Retraining</h2>"]
    if not data.retrained:
        parts.append(_missing("Nothing has been retrained yet", data, "retrain"))
    elif any(entry.result is None for entry in data.retrained):
        parts.append(_missing("Retraining has not finished; to go on", data, "retrain"))
    if any(entry.metrics for entry in data.retrained):
        loss, accuracy = retraining_curves(rows, data)
        key = dict.fromkeys(row_style(row, data) for row in rows if row.retrained and row.retrained.metrics)
        steep = any(len(entry.metrics) >= 5 for entry in data.retrained)
        outside = " The steep beginning lies outside the axes." if steep else ""
        parts.append(f'<div class="pair">{card("Loss", loss)}{card("Accuracy", accuracy)}</div>{figure_key(key)}')
        note = "On augmented images of the whole training part; the test images are seen once, at the end."
        parts.append(f'<p class="note">{note}{outside}</p>')
    return "\n".join(parts)


def _settings(data: RunData) -> str:
    commands = escape("\n".join(again_commands(data)))
    return f"""<h2>Settings</h2>
<details><summary>Every setting that the run stores (bold: differs from the default)</summary>
{settings_tables(data)}</details>
<details><summary>Commands for the same run in another folder</summary><pre>{commands}</pre></details>
<footer class="note">Seed {data.config.seed}. Written by spos_fast {escape(spos_fast.__version__)} with PyTorch
{escape(torch.__version__)}. Method: Guo et al., Single Path One-Shot Neural Architecture Search with Uniform Sampling,
<a href="https://arxiv.org/abs/1904.00420">arXiv 1904.00420</a>.</footer>"""


def _missing(what: str, data: RunData, stage: str) -> str:
    return f'<p class="missing">{escape(what)}: <code>{escape(stage_command(data, stage))}</code></p>'
