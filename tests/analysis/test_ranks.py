"""Rank statistics against SciPy, against sampling, and against measured lines of NAS-Bench-201."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from spos_fast import InputError
from spos_fast.analysis.ranks import (
    kendall_tau,
    partial_kendall_tau,
    rank_statistics,
    spearman_rho,
    tau_interval,
    top_k,
    truly_best,
)
from spos_fast.nasbench import NASBench201, NASBenchMacro

# Parameters, 12 epochs of training and the ceiling on CIFAR-10, CIFAR-100 and ImageNet16-120, to three digits.
LINES = {
    "cifar10": (0.578, 0.594, 0.892),
    "cifar100": (0.553, 0.645, 0.933),
    "imagenet16-120": (0.520, 0.644, 0.939),
}
# Operations left out: cells, tau of the parameters on the three data sets, ceiling on CIFAR-10.
REDUCED = {
    ("none",): (4096, (0.631, 0.600, 0.580), 0.888),
    ("avg_pool_3x3",): (4096, (0.539, 0.509, 0.462), 0.845),
    ("nor_conv_1x1",): (4096, (0.604, 0.599, 0.557), 0.900),
    ("skip_connect",): (4096, (0.578, 0.545, 0.461), 0.900),
    ("none", "avg_pool_3x3"): (729, (0.576, 0.547, 0.469), 0.760),
    ("nor_conv_1x1", "avg_pool_3x3"): (729, (0.524, 0.530, 0.412), 0.766),
    ("none", "nor_conv_1x1"): (729, (0.783, 0.788, 0.754), 0.924),
    ("none", "nor_conv_1x1", "avg_pool_3x3"): (64, (0.651, 0.687, 0.543), 0.866),
}


@pytest.fixture(scope="module")
def table(shared_data: Path) -> NASBench201:
    return NASBench201(shared_data / "nasbench201" / "nasbench201.npz")


def _pair(n: int, ties: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    x = y + rng.normal(size=n)
    return (np.round(x), np.round(y * 2)) if ties else (x, y)


@pytest.mark.parametrize(("n", "ties"), list(itertools.product((2, 7, 60), (False, True))))
def test_correlations_are_those_of_the_definitions(n: int, ties: bool) -> None:
    """tau-b by counting all pairs, Spearman as SciPy has it; ties included."""
    for seed in range(5):
        x, y = _pair(n, ties, seed)
        dx, dy = (np.sign(values[:, None] - values) for values in (x, y))
        norm = np.sqrt((dx**2).sum() * (dy**2).sum())
        expected = (dx * dy).sum() / norm if norm else np.nan
        assert kendall_tau(x, y) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        if norm:
            assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
            assert spearman_rho(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_a_constant_list_has_no_correlation() -> None:
    """A supernet that gives every architecture the same accuracy says nothing: NaN, not 0 or 1."""
    ones, y = np.ones(5), np.arange(5.0)
    assert np.isnan(kendall_tau(ones, y)) and np.isnan(spearman_rho(ones, y))
    assert np.isnan(partial_kendall_tau(ones, y, [1, 2, 0, 4, 3]))
    assert np.isnan(tau_interval(np.ones(20), np.arange(20.0), resamples=5)).all()


def test_partial_tau_takes_out_what_the_third_explains() -> None:
    """Kendall's formula, on SciPy's taus; where the third ranks as one of the two, nothing is left to correlate."""
    x, y = _pair(60, False, 0)
    z = np.random.default_rng(9).normal(size=60)
    t = {
        pair: stats.kendalltau(*values).statistic for pair, values in {"xy": (x, y), "xz": (x, z), "yz": (y, z)}.items()
    }
    expected = (t["xy"] - t["xz"] * t["yz"]) / np.sqrt((1 - t["xz"] ** 2) * (1 - t["yz"] ** 2))
    assert partial_kendall_tau(x, y, z) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(partial_kendall_tau(x, y, 3 * x + 1))


def test_the_interval_is_seeded_and_covers() -> None:
    """The same seed gives the same ends; about 95 of 100 intervals hold the true tau (2/pi arcsin rho of a normal)."""
    x, y = _pair(200, False, 0)
    assert tau_interval(x, y, resamples=50, seed=1) == tau_interval(x, y, resamples=50, seed=1)
    assert tau_interval(x, y, resamples=50, seed=1) != tau_interval(x, y, resamples=50, seed=2)
    truth = 2 / np.pi * np.arcsin(1 / np.sqrt(2))
    inside = 0
    for seed in range(100):
        low, high = tau_interval(*_pair(100, False, seed), resamples=100, seed=seed)
        inside += low <= truth <= high
    assert 88 <= inside <= 99
    with pytest.raises(InputError, match="confidence"):
        tau_interval(x, y, confidence=95)


def test_few_architectures_have_no_interval() -> None:
    """A bootstrap over a handful gives ends that mean nothing; from 10 architectures on there are some."""
    x, y = _pair(10, False, 0)
    assert np.isfinite(tau_interval(x, y, resamples=50)).all()
    assert np.isnan(tau_interval(x[:9], y[:9], resamples=50)).all()
    statistics = rank_statistics(x[:9], y[:9], resamples=50)
    assert np.isnan(statistics.interval).all() and np.isfinite(statistics.tau)


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_the_top_is_the_expected_one_where_there_are_ties(k: int) -> None:
    """Precision, best and mean are averages over every way to break the predictor's ties."""
    x, y = np.array([3, 2, 2, 2, 1, 1, 0, 3.0]), np.array([0.5, 0.9, 0.2, 0.7, 0.8, 0.1, 0.3, 0.6])
    ways = [chosen for chosen in itertools.combinations(range(8), k) if sorted(x[list(chosen)]) == sorted(x)[8 - k :]]
    truly = set(np.argsort(-y)[:k].tolist())
    found = top_k(x, y, k)
    assert found.precision == pytest.approx(np.mean([len(truly & set(way)) / k for way in ways]))
    assert found.best == pytest.approx(np.mean([max(y[list(way)]) for way in ways]))
    assert found.mean == pytest.approx(np.mean([np.mean(y[list(way)]) for way in ways]))
    assert found.regret == pytest.approx(0.9 - found.best)


def test_all_statistics_at_once() -> None:
    """Each field is the function of its name; k may be a share; more than there are is left out."""
    x, y = _pair(60, True, 3)
    params = _pair(60, False, 4)[0]
    got = rank_statistics(x, y, params, top=(1, 0.1, 6, 100), resamples=20, seed=5)
    assert (got.architectures, got.tau, got.spearman) == (60, kendall_tau(x, y), spearman_rho(x, y))
    assert got.interval == tau_interval(x, y, resamples=20, seed=5)
    assert got.partial_tau == partial_kendall_tau(x, y, params)
    assert got.tau_top_half == kendall_tau(*truly_best(x, y, 0.5))
    few, many = (rank_statistics(*_pair(n, False, 3), resamples=1) for n in (90, 100))
    assert np.isnan(few.tau_top_tenth) and many.tau_top_tenth == kendall_tau(*truly_best(*_pair(100, False, 3), 0.1))
    assert [entry.k for entry in got.top] == [1, 6] and got.top[0] == top_k(x, y, 1)
    assert np.isnan(rank_statistics(x, y, resamples=1).partial_tau)


@pytest.mark.parametrize(
    ("x", "y"),
    [([1.0], [1.0]), ([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2]), ([1, 2], [np.inf, 1]), ([[1, 2]], [[1, 2]])],
)
def test_lists_that_cannot_be_ranked_are_refused(x: list, y: list) -> None:
    """Too short, of unequal length, not finite."""
    with pytest.raises(InputError, match=r"predicted|true"):
        rank_statistics(x, y)


def test_reference_lines_of_nasbench201(table: NASBench201) -> None:
    """All 15,625 cells: parameters, 12 epochs and the ceiling have the taus that were measured elsewhere."""
    for dataset, expected in LINES.items():
        found = [kendall_tau(line.predicted, line.true) for line in table.references(dataset)]
        assert found == pytest.approx(expected, abs=6e-4), dataset
    for share, lines in {0.5: (0.388, 0.350, 0.743), 0.1: (0.079, 0.350, 0.508)}.items():
        restricted = [kendall_tau(*truly_best(line.predicted, line.true, share)) for line in table.references()]
        assert restricted == pytest.approx(lines, abs=6e-4)


@pytest.mark.parametrize("without", REDUCED)
def test_reference_lines_of_the_reduced_spaces(table: NASBench201, without: tuple[str, ...]) -> None:
    """The same for the spaces without some operations."""
    count, params, ceiling = REDUCED[without]
    dropped = [table.OPS.index(name) for name in without]
    kept = ~np.isin(table.genes, dropped).any(1)
    assert kept.sum() == count
    found = [kendall_tau(table.params[kept], table.truth(dataset)[kept]) for dataset in table.datasets]
    assert found == pytest.approx(params, abs=6e-4)
    last = table.references()[-1]
    assert kendall_tau(last.predicted[kept], last.true[kept]) == pytest.approx(ceiling, abs=6e-4)


def test_spread_of_tau_over_samples_of_cells(table: NASBench201) -> None:
    """Scoring 500 cells and not all costs a deviation of 0.023; the bootstrap of one sample says about the same."""
    line, rng = table.references()[1], np.random.default_rng(0)
    draws = [rng.choice(len(table), 500, replace=False) for _ in range(200)]
    taus = [kendall_tau(line.predicted[drawn], line.true[drawn]) for drawn in draws]
    assert np.mean(taus) == pytest.approx(0.594, abs=0.006) and np.std(taus) == pytest.approx(0.023, abs=0.004)
    low, high = tau_interval(line.predicted[draws[0]], line.true[draws[0]], resamples=300)
    assert (high - low) / 3.92 == pytest.approx(0.023, abs=0.006)


def test_reference_lines_of_nasbench_macro(shared_data: Path) -> None:
    """FLOPs 0.556, parameters 0.218; a training against others of the same networks is above a single pair's 0.88."""
    table = NASBenchMacro(shared_data / "nasbench_macro" / "nas_bench_macro.csv")
    params, flops, ceiling = (kendall_tau(line.predicted, line.true) for line in table.references())
    assert (params, flops) == pytest.approx((0.218, 0.556), abs=6e-4)
    seeds = [kendall_tau(table.trainings[:, a], table.trainings[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert all(0.8795 <= tau <= 0.8825 for tau in seeds) and max(seeds) < ceiling < 0.91
