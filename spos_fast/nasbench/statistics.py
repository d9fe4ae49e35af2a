"""The analysis of the NAS-Bench-101 paper (Ying et al. 2019, arXiv 1902.09635, sections 3 and 4) over arrays.

Every number comes with how many cells or pairs it rests on. Accuracies are shares, means over the known repeats at the
longest budget unless said otherwise; NaN is unknown and left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spos_fast.nasbench import graphs
from spos_fast.nasbench.results import CellResults

Values = NDArray[np.float64]

# 97.5% point of the standard normal distribution.
Z95 = 1.959963984540054

NAMED_CELLS = {
    "02e5a0247bbdcf2860b7e96f74961594": "best mean test accuracy of the benchmark",
    "b5fb4f6193360330b6ff6a52cbf0cad7": "ResNet-like",
    "28cfc7874f6d200472e1a9dcd8650aa0": "Inception-like",
    "043721b9c7fe8c5fad811d47d83132ec": "smallest: input to output",
}


@dataclass(frozen=True)
class Correlation:
    """How two quantities go together over ``count`` pairs; NaN where fewer than three are known."""

    pearson: float
    spearman: float
    kendall: float
    count: int


@dataclass(frozen=True)
class Group:
    """Cells that share a property.

    Attributes:
        value: of the property.
        count: cells.
        mean: of the accuracy.
        low, high: quartiles of the accuracy.
        time: mean seconds of training.
    """

    value: int
    count: int
    mean: float
    low: float
    high: float
    time: float


@dataclass(frozen=True, eq=False)
class Replacement:
    """Pairs of cells that differ in one operation.

    Attributes:
        before, after: labels of the operation.
        accuracy: change of the accuracy in every pair, float64 ``[pairs]``.
        time: change of the seconds of training, likewise.
    """

    before: int
    after: int
    accuracy: Values
    time: Values

    @property
    def interval(self) -> float:
        """Half the width of the 95% interval of the mean change, pairs taken as independent."""
        count = len(self.accuracy)
        return float(Z95 * self.accuracy.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")


def ecdf(values: Values) -> tuple[Values, Values]:
    """Known values ascending, and the share of values not above each."""
    ordered = np.sort(values[np.isfinite(values)])
    return ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1)


def correlation(first: Values, second: Values) -> Correlation:
    """Pearson, Spearman and Kendall (tau-b) over the pairs in which both are known."""
    from scipy import stats

    known = np.isfinite(first) & np.isfinite(second)
    a, b = first[known], second[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(np.nan, np.nan, np.nan, len(a))
    return Correlation(
        float(np.corrcoef(a, b)[0, 1]),
        float(stats.spearmanr(a, b).statistic),
        float(stats.kendalltau(a, b).statistic),
        len(a),
    )


def budget_correlations(results: CellResults, best: float = 1.0) -> dict[tuple[int, int], Correlation]:
    """Correlation of validation accuracies between all pairs of budgets.

    Args:
        results: the cells.
        best: only this share of the cells, those with the highest accuracy at the longest budget.
    """
    longest = results.mean("validation")
    order = np.argsort(-np.where(np.isfinite(longest), longest, -np.inf), kind="stable")
    chosen = order[: round(best * int(np.isfinite(longest).sum()))]
    means = {epochs: results.mean("validation", epochs)[chosen] for epochs in results.epochs}
    return {
        (short, long): correlation(means[short], means[long])
        for index, short in enumerate(results.epochs)
        for long in results.epochs[index + 1 :]
    }


def noise(results: CellResults, quantity: str = "validation", epochs: int | None = None) -> Values:
    """Standard deviation over the repeats (n - 1 in the denominator) of each cell with two or more: float64 ``[M]``."""
    values = results.each(quantity, epochs).astype(np.float64)
    values = values[np.isfinite(values).sum(1) >= 2]
    return np.nanstd(values, axis=1, ddof=1) if len(values) else np.empty(0)


def repeat_correlation(results: CellResults, quantity: str = "validation") -> Correlation:
    """Between the first and the second repeat of every cell: what any predictor of one training can reach."""
    values = results.each(quantity).astype(np.float64)
    if values.shape[1] < 2:
        return Correlation(np.nan, np.nan, np.nan, 0)
    return correlation(values[:, 0], values[:, 1])


def grouped(property_: NDArray[np.int64], results: CellResults) -> list[Group]:
    """Accuracy and time by a whole-numbered property of the cells, ascending."""
    accuracy, time = results.mean("validation"), results.mean("time")
    out = []
    for value in np.unique(property_).tolist():
        inside = (property_ == value) & np.isfinite(accuracy)
        if not inside.any():
            continue
        low, high = np.quantile(accuracy[inside], (0.25, 0.75)).tolist()
        seconds = time[inside][np.isfinite(time[inside])]
        mean_time = float(seconds.mean()) if len(seconds) else float("nan")
        out.append(Group(value, int(inside.sum()), float(accuracy[inside].mean()), low, high, mean_time))
    return out


def by_depth(results: CellResults) -> list[Group]:
    """By the number of edges on the longest path from input to output."""
    return grouped(graphs.depth(results.adjacency, results.vertices), results)


def by_width(results: CellResults) -> list[Group]:
    """By the edges of the largest directed cut."""
    return grouped(graphs.width(results.adjacency), results)


def by_operation(results: CellResults) -> list[list[Group]]:
    """By how often each of the three operations occurs."""
    counts = graphs.op_counts(results.ops)
    return [grouped(counts[:, label], results) for label in range(3)]


def pareto_front(cost: Values, accuracy: Values) -> NDArray[np.int64]:
    """Cells that no other one beats in both cost (less is better) and accuracy, cheapest first: int64 rows."""
    known = np.flatnonzero(np.isfinite(cost) & np.isfinite(accuracy))
    order = known[np.lexsort((-accuracy[known], cost[known]))]
    best = np.maximum.accumulate(accuracy[order]) if len(order) else accuracy[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = accuracy[order][1:] > best[:-1]
    return order[first]


def replacements(results: CellResults) -> list[Replacement]:
    """Effect of replacing one operation by another, the graph unchanged, over all pairs of cells that are there.

    A pair counts once for every kind of replacement, whichever vertex it was found by. The three directions with a
    smaller label before; the others are the same with the sign changed.
    """
    accuracy, time = results.mean("validation"), results.mean("time")
    genes = graphs.genes_of(results.adjacency, results.ops, results.vertices)
    out = []
    for before, after in ((0, 1), (0, 2), (1, 2)):
        found = []
        for place in range(graphs.SIZE - 2):
            # A vertex is in use if it is not behind the output in the table's form.
            rows = np.flatnonzero((genes[:, graphs.EDGES + place] == before) & (results.vertices - 2 > place))
            changed = genes[rows]
            changed[:, graphs.EDGES + place] = after
            others = results.find(changed)
            found.append(np.stack((rows, others), axis=1)[others >= 0])
        pairs = np.unique(np.concatenate(found), axis=0)
        pairs = pairs[np.isfinite(accuracy[pairs]).all(1)]
        first, second = pairs.T
        out.append(Replacement(before, after, accuracy[second] - accuracy[first], time[second] - time[first]))
    return out
