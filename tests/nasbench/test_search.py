"""Search baselines: what a run sees and pays, and that the methods are what they are called."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spos_fast.errors import InputError
from spos_fast.nasbench import graphs, search
from spos_fast.nasbench.results import CellResults
from spos_fast.nasbench.search import METHODS, Runs, regret_of


@pytest.mark.parametrize("method", list(METHODS))
def test_runs_pay_for_what_they_train(small_space: CellResults, method: str) -> None:
    """Times rise by the time of some cell, end within the budget, the incumbent's mean accuracy is near the best seen,
    and the same seed gives the same runs."""
    budget = 1e5
    runs = search.search(small_space, [method], budget, runs=20, seed=1)[method]
    ended = runs.seconds <= budget
    assert (ended.sum(1) == runs.trainings(budget)).all()
    times = np.unique(small_space.each("time"))
    for run, kept in zip(runs.seconds, ended, strict=True):
        spent = np.diff(run[kept], prepend=0.0)
        assert np.abs(spent[:, None] - times).min(1).max() < 1e-3
        assert np.isinf(run[~kept]).all()
        assert budget - run[kept][-1] <= times.max()
    again = search.search(small_space, list(METHODS), budget, runs=20, seed=1)[method]
    assert np.array_equal(again.seconds, runs.seconds)
    assert np.array_equal(again.incumbents, runs.incumbents)
    assert not np.array_equal(search.search(small_space, [method], budget, runs=20)[method].seconds, runs.seconds)


def test_evolution_beats_random_search(small_space: CellResults) -> None:
    """With a budget of some hundred trainings both evolutions come nearer to the best than random search."""
    regret = regret_of(small_space)
    assert regret.quantity == "test"
    assert regret.values.min() == 0
    found = search.search(small_space, list(METHODS), 4e5, runs=60)
    last = {name: runs.curve(regret.values, np.array([4e5])).mean() for name, runs in found.items()}
    assert last["SPOS evolution"] < last["random search"]
    assert last["regularized evolution"] < last["random search"]


def test_incumbent_is_by_validation(small_space: CellResults) -> None:
    """The incumbent is the cell with the best validation accuracy that was seen, whatever its test accuracy."""
    log = search._Log(100.0, 2)
    rows = np.array([[3, 5, 4], [7, 8, 9]])
    log.add(rows, np.array([[0.5, 0.7, 0.6], [0.9, 0.1, -np.inf]]), np.full((2, 3), 10.0))
    log.add(np.array([[1], [2]]), np.array([[0.7], [0.95]]), np.full((2, 1), 80.0))
    seconds, incumbents = log.finish()
    assert incumbents.tolist() == [[3, 5, 5, 5], [7, 7, 7, 2]]
    assert seconds[:, :3].tolist() == [[10, 20, 30]] * 2
    assert np.isinf(seconds[:, 3]).all()
    runs = Runs("x", seconds, incumbents)
    curve = runs.curve(np.arange(10.0), np.array([5.0, 10, 25, 1000]))
    assert curve[0].tolist()[1:] == [3, 5, 5]
    assert np.isnan(curve[:, 0]).all()


def test_spos_trains_no_cell_twice(small_space: CellResults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the SPOS evolution trains every cell at most once, until it has met all that it can."""
    trained = []
    train = search._Bench.train

    def watched(self, rows):
        trained.append(rows.copy())
        return train(self, rows)

    monkeypatch.setattr(search._Bench, "train", watched)
    search.search(small_space, ["SPOS evolution"], 5e5, runs=5)
    for run in np.concatenate(trained, axis=1):
        kept = run[run >= 0]
        assert len(kept) > 200
        assert len(np.unique(kept)) == len(kept)


def test_official_draws(small_space: CellResults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a complete benchmark random cells are drawn as in the official notebook, which meets small cells more often;
    over a sample evenly. Either way genes and rows belong together."""
    for complete in (True, False):
        if complete:
            monkeypatch.setattr("spos_fast.nasbench.results.CELLS", len(small_space))
        else:
            monkeypatch.undo()
        bench = search._Bench(small_space, 1.0, 0)
        genes, rows = bench.random(4000)
        assert np.array_equal(small_space.find(genes), rows)
        small = (small_space.vertices[rows] <= 3).mean()
        assert small > 0.1 if complete else small < 0.02


def test_mutation() -> None:
    """Edges flip with probability 1/7; an operation becomes another one with probability 1/5, either equally often."""
    genes = np.zeros((20_000, 26), dtype=np.int8)
    changed = search._official_mutation(genes, np.random.default_rng(0))
    assert changed[:, : graphs.EDGES].mean(0) == pytest.approx(1 / 7, abs=0.015)
    for label in (1, 2):
        assert (changed[:, graphs.EDGES :] == label).mean(0) == pytest.approx(0.1, abs=0.015)
    pooling = np.full((2_000, 26), 2, dtype=np.int8)
    pooling[:, : graphs.EDGES] = 1
    assert set(np.unique(search._official_mutation(pooling, np.random.default_rng(0)))) == {0, 1, 2}


def test_tournaments_are_of_different_entrants() -> None:
    """Ten different ones of a hundred, all equally likely."""
    drawn = search._distinct(np.random.default_rng(0), 20_000, 100, 10)
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    assert np.bincount(drawn.ravel(), minlength=100) == pytest.approx(2000, rel=0.12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["grid"]}, "method: got 'grid'; expected one of random search"),
        ({"budget": 0}, "budget: got 0"),
        ({"runs": 0}, "runs: got 0"),
    ],
)
def test_errors(small_space: CellResults, settings, message) -> None:
    """Settings that make no search are refused by name."""
    with pytest.raises(InputError, match=message):
        search.search(small_space, **{"methods": ["random search"], "budget": 1e5, **settings})


def test_summary_is_json(small_space: CellResults) -> None:
    """The summary holds plain numbers, its regret falls with time, and the table says what the summary says."""
    from spos_fast.analysis.nasbench_search_report import page, rows_of, summarise, text_of

    found = search.search(small_space, list(METHODS), 1e5, runs=30)
    summary = summarise(small_space, found, 1e5, 0)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for entry in summary["methods"].values():
        middle = np.array([np.inf if value is None else value for value in entry["quantiles"]["0.5"]])
        assert middle[0] > middle[-1] > 0
    head, rows = rows_of(summary)
    assert [row[0] for row in rows] == list(METHODS)
    assert all(len(row) == len(head) for row in rows)
    assert f"{100 * summary['methods']['random search']['quantiles']['0.5'][-1]:.3f}" in rows[0]
    assert "Median test regret" in text_of(summary)
    html = page(summary)
    assert all(name in html for name in METHODS)
    assert "thinned out" in html
