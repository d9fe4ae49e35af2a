"""What the report says in numbers: intervals, curves, fronts, shares and formats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from spos_fast.analysis.plots import short_number
from spos_fast.analysis.run_data import Scored, read_run
from spos_fast.analysis.summary import (
    accuracy_floor,
    best_so_far,
    choice_shares,
    choice_tags,
    pareto_front,
    ranked,
    wilson_interval,
)
from spos_fast.analysis.tables import percent


def scored(accuracy: float, macs: int = 1, genes: tuple[int, ...] = (0,), loss: float = 1.0) -> Scored:
    return Scored(genes, accuracy, loss, 100, macs, 1, 0)


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (355, 360), (38210, 50000), (1, 2)])
def test_the_interval_is_wilsons(right: int, images: int) -> None:
    """Against scipy's own; a normal interval would leave 0..1 or have no width at the ends."""
    expected = binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / images, images) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_interval_without_images() -> None:
    """Damaged results give no interval rather than a division by zero."""
    for share, images in ((0.5, 0), (math.nan, 10), (1.5, 10)):
        assert all(math.isnan(end) for end in wilson_interval(share, images))


def test_best_so_far() -> None:
    """The curve never falls, and neither NaN nor a failed network moves it."""
    values = [math.nan, 0.2, 0.1, math.nan, 0.5, 0.4]
    np.testing.assert_array_equal(best_so_far(map(scored, values)), [math.nan, 0.2, 0.2, 0.2, 0.5, 0.5])


def test_the_best_is_the_searchs_best(full_run: Path, paper_run: Path) -> None:
    """The report ranks as the search does, ties included, so that both name the same architecture."""
    for run in (full_run, paper_run):
        data, best = read_run(run), json.loads((run / "search/best.json").read_text())
        assert list(ranked(data.evolution)[0].genes) == best["evolution"]["genes"]
        assert list(ranked(data.random_search)[0].genes) == best["random_search"]["genes"]
    tied = [scored(0.5, 1, (1,), math.nan), scored(0.5, 1, (2,), 2.0), scored(0.5, 1, (3,), 2.0), scored(math.nan)]
    assert [c.genes[0] for c in ranked(tied)] == [2, 3, 1, 0]


def test_pareto_front_against_its_definition() -> None:
    """Nobody on the front is beaten in both, and everybody off it is."""
    rng = np.random.default_rng(0)
    points = [scored(float(rng.integers(9) / 9), int(rng.integers(1, 30))) for _ in range(80)]
    front = pareto_front([*points, scored(math.nan, 0)])

    def beaten(point: Scored) -> bool:
        others = [(o.accuracy, -o.macs) for o in points]
        own = (point.accuracy, -point.macs)
        return any(a >= own[0] and m >= own[1] and (a, m) != own for a, m in others)

    assert {(p.accuracy, p.macs) for p in front} == {(p.accuracy, p.macs) for p in points if not beaten(p)}
    assert [p.macs for p in front] == sorted({p.macs for p in front})


def test_choice_shares_count() -> None:
    """Columns are layers, rows are choices."""
    shares = choice_shares([(0, 1), (0, 2), (1, 2), (0, 2)], layers=2, choices=3)
    np.testing.assert_allclose(shares, [[0.75, 0], [0.25, 0.25], [0, 0.75]])
    assert not choice_shares([], layers=2, choices=2).any()


def test_axes_are_not_stretched_by_failures() -> None:
    """One network at 0 must not flatten the rest into a line; without failures nothing is cut."""
    usual = [0.90, 0.91, 0.92, 0.93]
    assert accuracy_floor(usual) == 0.90
    assert 0.8 < accuracy_floor([0.0, *usual * 5]) < 0.90
    assert accuracy_floor([math.nan]) == 0


def test_tags_of_choices_differ() -> None:
    """Cells carry a letter beside the colour, for those who do not tell the colours apart."""
    assert choice_tags(("shuffle_k3", "shuffle_k5", "shuffle_k7", "xception")) == ["3", "5", "7", "x"]
    assert choice_tags(("skip", "shuffle")) == ["0", "1"]
    assert choice_tags(("0.2x", "1x", "1.25x")) == ["0.2", "1", "1.25"]


def test_short_numbers() -> None:
    """Three digits, no jump to four at the edge of a unit."""
    shown = [short_number(value).replace("\N{NO-BREAK SPACE}", " ") for value in (0, 999, 1234, 99_960, 999_600, 1.5e9)]
    assert shown == ["0", "999", "1.23 k", "100 k", "1.00 M", "1.50 G"]
    assert percent(0.98765, 360) == "98.8%" and percent(0.98765, 50000) == "98.77%"
