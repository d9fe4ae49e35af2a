"""Locality of the space: how alike cells are that lie few edits apart (Ying et al. 2019, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spos_fast.nasbench import graphs
from spos_fast.nasbench.results import CELLS, CellResults

_RESAMPLES = 400
_TRIES = 500


@dataclass(frozen=True)
class Autocorrelation:
    """Correlation of two cells' accuracies at one distance.

    Attributes:
        distance: steps of a walk, or edits.
        pairs: pairs of cells that it rests on.
        accuracy, rank: correlation of the accuracies, and of their ranks among all cells.
        accuracy_interval, rank_interval: 95%, by resampling whole walks.
    """

    distance: int
    pairs: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    rank: float
    rank_interval: tuple[float, float]


@dataclass(frozen=True)
class Locality:
    """Autocorrelation along random walks.

    Attributes:
        walks, steps: number and length of the walks.
        known: share of the cells after a walk's first that have an accuracy.
        by_step: between the first cell of a walk and the one after so many steps.
        by_edit: by the number of edits between those, counted in the walk's form of the cells: steps that undo each
            other do not count. Two cells may be nearer than that through another numbering of their vertices.
    """

    walks: int
    steps: int
    known: float
    by_step: list[Autocorrelation]
    by_edit: list[Autocorrelation]


def noise_distance(series: list[Autocorrelation], quantity: str = "accuracy") -> int | None:
    """The smallest distance at which the 95% interval reaches down to zero; None if it never does."""
    for entry in series:
        if getattr(entry, f"{quantity}_interval")[0] <= 0:
            return entry.distance
    return None


def locality(results: CellResults, *, walks: int = 30_000, steps: int = 12, seed: int = 0) -> Locality:
    """Random-walk autocorrelation of the validation accuracy.

    A walk begins at a cell drawn uniformly from those that are there, and every step is one random edit (an edge added
    or removed, or an operation replaced) that leads to another cell of the space, drawn anew until it does. Pairs are
    of a walk's first cell and a later one. The walk needs no accuracies, so it runs through the whole space also where
    only a sample is known; a pair counts where its later cell is known. For a uniform sample that estimates the same
    correlation from fewer pairs. A walk that comes back to its first cell is known for certain, where others are known
    by the share of the sample; it is weighted down accordingly.

    Args:
        results: the cells.
        walks: how many; each from another cell, at most as many as there are.
        steps: length of a walk.
        seed: of the walks and of the resampling.
    """
    rng = np.random.default_rng([seed, 101])
    genes, rows = _walk(results, min(walks, len(results)), steps, rng)
    accuracy = results.mean("validation")
    series = [_standardised(accuracy), _standardised(_ranks(accuracy))]
    known = (rows >= 0) & np.isfinite(accuracy)[rows]
    known &= known[:, :1]
    values = [np.where(known, entry[rows], 0.0) for entry in series]
    density = min(1.0, float(np.isfinite(accuracy).sum()) / CELLS)
    weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _RESAMPLES).astype(np.float32)
    step_sums = np.zeros((steps + 1, len(rows), 2, 7))
    edit_sums = np.zeros((steps + 1, len(rows), 2, 7))
    count = np.arange(len(rows))
    for gap in range(1, steps + 1):
        weight = known[:, gap] * np.where(rows[:, gap] == rows[:, 0], density, 1.0)
        sums = np.stack([_sums(entry[:, 0], entry[:, gap], weight) for entry in values], axis=1)
        step_sums[gap] = sums
        edits = (genes[:, gap] != genes[:, 0]).sum(1)
        np.add.at(edit_sums, (edits, count), sums)
    return Locality(
        len(rows),
        steps,
        float(known[:, 1:].mean()),
        [_estimate(gap, step_sums[gap], weights) for gap in range(1, steps + 1)],
        [_estimate(edits, edit_sums[edits], weights) for edits in range(1, steps + 1)],
    )


def _walk(
    results: CellResults, walks: int, steps: int, rng: np.random.Generator
) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """Gene forms int8 ``[walks, steps + 1, 26]`` and rows int64 ``[walks, steps + 1]``, -1 for an unknown cell."""
    from spos_fast.nasbench import hash_cells

    rows = np.empty((walks, steps + 1), dtype=np.int64)
    rows[:, 0] = rng.permutation(len(results))[:walks]
    start = rows[:, 0]
    genes = np.empty((walks, steps + 1, len(graphs.CHOICES)), dtype=np.int8)
    genes[:, 0] = graphs.genes_of(results.adjacency[start], results.ops[start], results.vertices[start])
    names = np.array([results.hashes[row] for row in start], dtype=object)
    for step in range(1, steps + 1):
        genes[:, step], rows[:, step] = genes[:, step - 1], -1
        waiting = np.arange(walks)
        # A cell of 31 edits has left long before, unless none of them leads to another cell: that of two vertices,
        # where a walk ends.
        for _ in range(_TRIES):
            if not len(waiting):
                break
            tried = graphs.one_edit(genes[waiting, step - 1], rng)
            inside = graphs.in_space(tried)
            reached, tried = waiting[inside], tried[inside]
            found = np.array(hash_cells(*graphs.cells_of(tried)), dtype=object)
            moved = found != names[reached]
            genes[reached[moved], step] = tried[moved]
            rows[reached[moved], step] = [results.row_of.get(name, -1) for name in found[moved]]
            names[reached[moved]] = found[moved]
            stays = np.ones(walks, dtype=bool)
            stays[reached[moved]] = False
            waiting = waiting[stays[waiting]]
    return genes, rows


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, nan_policy="omit"))


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0 and deviation 1, so that sums of squares lose no digits."""
    deviation = np.nanstd(values)
    return (values - np.nanmean(values)) / (deviation if deviation > 0 else np.nan)


def _sums(a: NDArray[np.float64], b: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[walks, 7]``: weighted n, sums of a, b, a^2, b^2 and ab over the known pairs, and their number."""
    terms = (np.ones_like(a), a, b, a * a, b * b, a * b)
    return np.stack([*(term * weight for term in terms), (weight > 0).astype(np.float64)], axis=1)


def _estimate(distance: int, sums: NDArray[np.float64], weights: NDArray[np.float32]) -> Autocorrelation:
    total = sums.sum(0)
    drawn = np.einsum("rw,wqs->rqs", weights.astype(np.float64), sums, optimize=True)
    point, spread = _pearson(total), _pearson(drawn)
    if np.isfinite(point).all() and total[0, 6] > 2:
        low, high = np.nanquantile(spread, (0.025, 0.975), axis=0)
    else:
        low = high = np.full(2, np.nan)
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Autocorrelation(distance, int(total[0, 6]), float(point[0]), intervals[0], float(point[1]), intervals[1])


def _pearson(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    n, a, b, aa, bb, ab, _ = np.moveaxis(sums, -1, 0)
    spread = (n * aa - a * a) * (n * bb - b * b)
    # Equal values, up to rounding, have no correlation.
    defined = (n > 0) & (spread > 1e-9 * np.maximum(n, 1e-9) ** 4)
    return np.divide(
        n * ab - a * b, np.sqrt(np.where(defined, spread, 1.0)), out=np.full(n.shape, np.nan), where=defined
    )
