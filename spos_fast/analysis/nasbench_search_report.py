"""The report on search baselines over a NAS-Bench-101 file: HTML, JSON and a table in plain text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

import spos_fast
from spos_fast.analysis.nasbench_figures import regret_figure
from spos_fast.analysis.page import card, document, figure_key, table
from spos_fast.nasbench.results import CELLS, CellResults
from spos_fast.nasbench.search import Regret, Runs, regret_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_STYLES = {
    "random search": ("random", "dashed"),
    "regularized evolution": ("choice-3", "thin"),
    "SPOS evolution": ("evolution", "line"),
}
_GRID = 120


def summarise(results: CellResults, runs: Mapping[str, Runs], budget: float, seed: int) -> dict[str, Any]:
    """Everything that the report shows, as plain values for JSON: regret quantiles over the runs on a grid of seconds.

    Regret is None where more than that share of the runs has not finished a training.
    """
    regret = regret_of(results)
    begin = float(np.nanmin(results.mean("time")))
    grid = np.geomspace(min(begin, budget / 10), budget, _GRID)
    return {
        "source": results.name,
        "cells": len(results),
        "regret_of": regret.quantity,
        "best": float(np.nanmax(results.mean(regret.quantity))),
        "epochs": results.epochs[-1],
        "budget_seconds": budget,
        "seed": seed,
        "seconds": grid.tolist(),
        "methods": {name: _method(entry, regret, grid, budget) for name, entry in runs.items()},
    }


def _method(runs: Runs, regret: Regret, grid: NDArray[np.float64], budget: float) -> dict[str, Any]:
    curves = runs.curve(regret.values, grid)
    # Without a training yet a run is worse than any that has one.
    quantiles = np.quantile(np.where(np.isfinite(curves), curves, np.inf), QUANTILES, axis=0, method="higher")
    last = curves[:, -1]
    return {
        "runs": len(curves),
        "median_trainings": float(np.median(runs.trainings(budget))),
        "found_best": float((last == 0).mean()),
        "quantiles": {
            f"{share:g}": [value if np.isfinite(value) else None for value in row.tolist()]
            for share, row in zip(QUANTILES, quantiles, strict=True)
        },
    }


def rows_of(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table: head and one row a method, with the median regret at a few times and its quartiles at the end."""
    grid = np.array(summary["seconds"])
    budget = summary["budget_seconds"]
    moments = [moment for moment in (1e4, 1e5, 1e6, 1e7) if grid[0] < moment < budget]
    head = ["Method", "Runs", "Trainings", *(f"at {moment:,.0f} s" for moment in moments), f"at {budget:,.0f} s"]
    head += ["Middle 50%", "Found the best"]
    out = []
    for name, entry in summary["methods"].items():
        quantiles = {share: _floats(values) for share, values in entry["quantiles"].items()}
        places = [int(np.searchsorted(grid, moment, side="right")) - 1 for moment in moments]
        medians = [_points(quantiles["0.5"][place]) for place in (*places, -1)]
        spread = f"{_points(quantiles['0.25'][-1])} to {_points(quantiles['0.75'][-1])}"
        counts = [f"{entry['runs']:,}", f"{entry['median_trainings']:,.0f}"]
        out.append([name, *counts, *medians, spread, f"{entry['found_best']:.1%}"])
    return head, out


def text_of(summary: Mapping[str, Any]) -> str:
    """The table in plain text."""
    head, rows = rows_of(summary)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join([f"Median {summary['regret_of']} regret in points", *lines])


def page(summary: Mapping[str, Any]) -> str:
    """The HTML document."""
    kind, cells = summary["regret_of"], summary["cells"]
    series = [
        (name, *_STYLES[name], {float(share): _floats(values) for share, values in entry["quantiles"].items()})
        for name, entry in summary["methods"].items()
    ]
    head, rows = rows_of(summary)
    missing = []
    if cells < CELLS:
        missing.append(
            f"The source holds {cells:,} of {CELLS:,} cells. Random cells are drawn evenly from those, and a child "
            "that the source does not hold costs nothing and is drawn anew: these are searches of a space thinned out "
            "at random, and the best cell is the best of the source."
        )
    if kind == "validation":
        missing.append("It holds no test accuracy: regret is of the validation accuracy, which the searches see.")
    notice = f'<p class="missing">{"<br>".join(map(escape, missing))}</p>' if missing else ""
    drawn = card(
        f"{kind.capitalize()} regret",
        regret_figure("regret", np.array(summary["seconds"]), series, f"{kind} regret"),
        f"Lines: median over the runs; bands: middle 50%. Regret: mean {kind} accuracy of the best cell "
        f"({100 * summary['best']:.3f}%) minus that of the cell with the best validation accuracy seen so far. One "
        "training is one random repeat and costs its training time. Values under 0.001 points are drawn there.",
        figure_key((name, colour, shape) for name, colour, shape, _ in series),
        wide=True,
    )
    note = f"Median {kind} regret in points of accuracy at three moments or fewer, and its quartiles at the end."
    sections = [
        f"""<h1>Search on NAS-Bench-101</h1>
<p class="path">Baselines over <code>{escape(summary["source"])}</code>, {summary["epochs"]} epochs a training, seed
{summary["seed"]}</p>
{notice}<h2>Regret against training time</h2>
{drawn}
<div style="margin-top: 14px">{table(head, rows, note)}</div>
<h2>Methods</h2>
<p><b>Random search</b>, on a complete benchmark, draws every edge with probability 1/2 and operations uniformly, as the
official notebook.
<b>Regularized evolution</b> (Real et al. 2018): population 100, the best of 10 random ones is mutated (each edge with
probability 1/7, each operation with 1/5) and replaces the oldest. <b>SPOS evolution</b> (Guo et al. 2019): populations
of 50, 25 by crossover and 25 by mutation (each of 26 genes with probability 0.1) of the 10 best so far, no cell
twice.</p>
<footer class="note">Written by spos_fast {escape(spos_fast.__version__)}.</footer>"""
    ]
    return document(f"Search on NAS-Bench-101: {summary['source']}", sections)


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _points(value: float) -> str:
    return f"{100 * value:.3f}" if np.isfinite(value) else "–"
