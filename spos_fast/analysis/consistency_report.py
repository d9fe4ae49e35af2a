"""The HTML report of rank consistency: how a supernet's ranking agrees with networks that were trained one by one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import spos_fast
from spos_fast.analysis.commands import again_commands
from spos_fast.analysis.consistency_figures import Level, images_figure, scatter_figure, tau_figure, training_figure
from spos_fast.analysis.page import card, document, figure_key, table, tiles
from spos_fast.analysis.ranks import RankStatistics
from spos_fast.analysis.run_data import read_run
from spos_fast.analysis.tables import settings_tables
from spos_fast.checkpoint import write_whole
from spos_fast.consistency import Consistency, Ranking, Way

NAME = "report_consistency.html"


def write_consistency_report(run: str | Path, result: Consistency) -> Path:
    """Write ``report_consistency.html`` into a run folder.

    Returns:
        Path of the report.

    Raises:
        CheckpointError: it could not be written.
    """
    path = Path(run) / NAME
    write_whole(path, page(Path(run), result).encode())
    return path


def page(run: Path, result: Consistency) -> str:
    """The report as an HTML document."""
    sections = [_head(run, result), _tables(result), _scatters(result), _curves(result), _settings(run)]
    return document(f"{run.resolve().name}: rank consistency on {result.space}", sections)


def title(way: Way) -> str:
    """A way to score in words."""
    how = f"{way.mode}, {way.images:,} images" if way.images else "no recalibration"
    return how if way.step is None else f"{how}, step {way.step:,}"


def tau_text(statistics: RankStatistics) -> str:
    """Tau and its interval, if it has one: ``0.540 (0.512 to 0.566)``."""
    interval = _interval(statistics)
    return f"{_number(statistics.tau)} ({interval})" if interval else _number(statistics.tau)


def _head(run: Path, result: Consistency) -> str:
    return f"""<h1>Rank consistency on {escape(result.space)}</h1>
<p class="path">Run folder <code>{escape(str(run))}</code></p>
<p class="lead">{_headline(result)}</p>
{_missing(result)}{tiles(_tiles(result))}
<h2>Predictors of the ranking</h2>
{card("", _taus(result), _TAU_CAPTION, _TAU_KEY, wide=True)}"""


_TAU_CAPTION = (
    "Bars: 95% bootstrap intervals over architectures (random order: of unrelated lists). They do not cover another "
    "seed of training."
)
_TAU_KEY = figure_key((("this supernet", "evolution", "diamond"), ("without a supernet", "random", "dot")))


def _headline(result: Consistency) -> str:
    """The result in a few sentences, with no claim that the intervals do not carry."""
    first = result.scored[0]
    of = "all" if result.n == result.size else f"{result.n:,} of"
    text = (
        f"With {escape(_said(first))} the supernet ranks {of} {result.size:,} architectures with Kendall's tau "
        f"<b>{tau_text(first.statistics)}</b> against their own test accuracy on {escape(result.dataset)}"
    )
    bare = next((each for each in result.scored if each.way and not each.way.images and each.way.step is None), None)
    if bare is not None and bare is not first:
        text += f"; without recalibration, {tau_text(bare.statistics)}"
    text += "."
    costs = [each for each in result.references if each.name in ("parameters", "FLOPs")]
    if math.isnan(first.statistics.tau):
        text += " All of them have the same score, so there is no ranking."
    elif costs:
        low, high = first.statistics.interval
        best = max(costs, key=lambda each: each.statistics.tau)
        tau = best.statistics.tau
        verdict = "above" if low > tau else "below" if high < tau else "not told apart from"
        text += f" Their {best.name} alone reach {_number(tau)} on the same ones; the supernet is {verdict} that."
    failed = sum(result.failed.values())
    if failed:
        text += f" {failed:,} scores failed (NaN or infinity) and count as accuracy 0."
    return text


def _missing(result: Consistency) -> str:
    if not result.missing:
        return ""
    steps = ", ".join(f"{step:,}" for step in result.missing)
    return f'<p class="missing">States that training kept are missing and not scored: of step {steps}.</p>\n'


def _said(ranking: Ranking) -> str:
    way = ranking.way
    assert way is not None
    return f"statistics recalibrated ({title(way)})" if way.images else "the statistics that training left"


def _tiles(result: Consistency) -> list[tuple[str, str, str]]:
    statistics = result.scored[0].statistics
    interval = _interval(statistics)
    found = [
        ("Kendall's tau", _number(statistics.tau), f"interval {interval}" if interval else "no interval"),
        ("Partial tau", _number(statistics.partial_tau), "given the number of parameters"),
        ("Tau, best 50%", _number(statistics.tau_top_half), "of the truth"),
        ("Tau, best 10%", _number(statistics.tau_top_tenth), "of the truth"),
    ]
    for entry in statistics.top:
        if entry.k == 10:
            found.append(("Precision", f"{entry.precision:.0%}", "first 10 among the 10 best"))
            found.append(
                ("Best of the first 10", f"{entry.best:.2%}", f"{100 * entry.regret:.2f} points below the best")
            )
    return found


def _taus(result: Consistency) -> str:
    own = [(title(each.way), each.statistics, True) for each in result.scored if each.way and each.way.step is None]
    return tau_figure([*own, *((each.name, each.statistics, False) for each in result.references)])


def _tables(result: Consistency) -> str:
    rankings = [(title(each.way) if each.way else each.name, each.statistics) for each in _all(result)]
    correlations = table(
        ["", "tau", "95% interval", "Spearman", "tau, best 50%", "tau, best 10%", "partial tau"],
        [
            (
                name,
                _number(each.tau),
                _interval(each) or _number(math.nan),
                *map(_number, (each.spearman, each.tau_top_half, each.tau_top_tenth, each.partial_tau)),
            )
            for name, each in rankings
        ],
        "Kendall's tau-b. Best 50% and 10%: among the truly best only. Partial: given the number of parameters. A "
        "dash: not defined, as all are predicted alike, the predictor is the parameters, or there are fewer than 10.",
    )
    counts = [entry.k for entry in result.scored[0].statistics.top]
    head = ["", *(f"{what}, first {k:,}" for k in counts for what in (("accuracy",) if k == 1 else _TOP))]
    top = table(
        head,
        [(name, *(cell for entry in each.top for cell in _top_cells(entry.k, entry))) for name, each in rankings],
        f"By their true accuracy; the best of all {result.n:,} has {result.scored[0].true.max():.2%}. "
        "Precision: share that is among as many truly best ones. Ties at the cut: "
        "expected values.",
    )
    return f"<h2>Correlations</h2>{correlations}\n<h2>The architectures that come first</h2>{top}"


_TOP = ("precision", "best", "mean")


def _top_cells(k: int, entry: object) -> list[str]:
    precision, best, mean = (getattr(entry, name) for name in _TOP)
    return [f"{best:.2%}"] if k == 1 else [f"{precision:.0%}", f"{best:.2%}", f"{mean:.2%}"]


def _all(result: Consistency) -> Sequence[Ranking]:
    return (*result.scored, *result.references)


def _scatters(result: Consistency) -> str:
    # One a mode: of the trained supernet, the first number of images.
    shown: dict[str, Ranking] = {}
    for each in result.scored:
        if each.way and each.way.step is None:
            shown.setdefault(each.way.mode, each)
    cards = [
        card(
            title(each.way) if each.way else "",
            scatter_figure(
                f"scatter-{mode}",
                each.predicted,
                each.true,
                ("accuracy with the supernet's weights", "true test accuracy"),
            ),
            f"Kendall's tau {tau_text(each.statistics)}.",
        )
        for mode, each in shown.items()
    ]
    return f'<h2>Predicted against true</h2><div class="pair">{"".join(cards)}</div>'


def _curves(result: Consistency) -> str:
    shapes = {"parameters": "dashed", "ceiling": "dotted"}
    levels: list[Level] = [
        (each.name, each.statistics.tau, shapes.get(each.name.partition(":")[0], "thin"))
        for each in result.references[1:]  # the first is the random order, which is 0
    ]
    key = figure_key([("this supernet", "evolution", "line"), *((name, "muted", shape) for name, _, shape in levels)])
    cards = []
    final = [(each.way, each.statistics) for each in result.scored if each.way and each.way.step is None]
    main = next((way for way, _ in final if way.images), final[0][0])
    images = sorted((way.images, each) for way, each in final if way.mode == main.mode and way.images)
    if len(images) > 1:
        caption = f"Mode {main.mode}, with the 95% interval over architectures."
        cards.append(card("Number of calibration images", images_figure(images, levels), caption, key))
    steps = [(each.way.step, each.statistics) for each in result.scored if each.way and each.way.step is not None]
    if steps:
        trained = next(statistics for way, statistics in final if way == main)
        caption = f"States that training kept, scored with {title(main)}."
        points = [*sorted(steps, key=lambda point: point[0]), (result.steps, trained)]
        cards.append(card("Over the training", training_figure(points, levels), caption, key))
    return f'<h2>What it depends on</h2><div class="pair">{"".join(cards)}</div>' if cards else ""


def _settings(run: Path) -> str:
    data = read_run(run)
    commands = escape("\n".join(again_commands(data)))
    command = escape(shlex.join(["spos-fast", "consistency", "--folder", str(run)]))
    return f"""<h2>Settings</h2>
<details><summary>Every setting that the run stores (bold: differs from the default)</summary>
{settings_tables(data)}</details>
<details><summary>Commands for the same run in another folder</summary><pre>{commands}</pre></details>
<footer class="note">Seed {data.config.seed}; the same command goes on or adds ways to score:
<code>{command}</code>. Written by spos_fast {escape(spos_fast.__version__)}.</footer>"""


def _interval(statistics: RankStatistics) -> str:
    """Such as ``0.512 to 0.566``; empty where there is none."""
    low, high = statistics.interval
    return "" if math.isnan(low) else f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    # Adding 0 turns a rounded -0 into 0.
    return "–" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")
