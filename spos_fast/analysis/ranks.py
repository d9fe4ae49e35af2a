"""How well a predictor ranks architectures: rank correlations with the truth, and what its best ones are worth.

Kendall's tau-b and Spearman's rho are SciPy's, which scikit-learn brings along anyway. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from spos_fast.errors import InputError

Values = NDArray[np.float64]
# A tau of fewer says nothing, and neither does a bootstrap over them.
_FEWEST = 10


@dataclass(frozen=True)
class TopK:
    """The architectures that a predictor puts first.

    Where the predictor has ties at the cut, it may take any of the tied; the numbers are expected values over that.

    Attributes:
        k: how many.
        precision: share of them that are among the k truly best.
        best: true value of the best of them.
        mean: mean of their true values.
        regret: how much less ``best`` is than the truly best of all.
    """

    k: int
    precision: float
    best: float
    mean: float
    regret: float


@dataclass(frozen=True)
class RankStatistics:
    """How a predictor's ranking agrees with the true one. A correlation is NaN where one side is constant, and among
    the truly best where these are fewer than 10.

    Attributes:
        architectures: how many.
        tau: Kendall's tau-b.
        interval: ends of its bootstrap interval (percentiles) over architectures; NaN for fewer than 10.
        spearman: Spearman's rho.
        tau_top_half: tau-b among the truly best 50 %.
        tau_top_tenth: tau-b among the truly best 10 %.
        partial_tau: partial tau given the number of parameters; NaN without these.
        top: the first architectures, one entry a ``k``.
    """

    architectures: int
    tau: float
    interval: tuple[float, float]
    spearman: float
    tau_top_half: float
    tau_top_tenth: float
    partial_tau: float
    top: tuple[TopK, ...]


def rank_statistics(
    predicted: ArrayLike,
    true: ArrayLike,
    params: ArrayLike | None = None,
    *,
    top: Sequence[int | float] = (1, 10, 0.1),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankStatistics:
    """All statistics of one predictor.

    Args:
        predicted: [n], higher is better.
        true: [n], higher is better.
        params: [n], for the partial correlation; None leaves it out.
        top: numbers of architectures, or shares of them below 1; those that are more than n are left out.
        resamples: of the bootstrap.
        confidence: of its interval.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than two architectures, unequal lengths, NaN or infinity.
    """
    x, y = _checked(predicted=predicted, true=true)
    counts = sorted({max(1, round(k * len(x))) if 0 < k < 1 else int(k) for k in top})
    partial = partial_kendall_tau(x, y, params) if params is not None else float("nan")
    return RankStatistics(
        architectures=len(x),
        tau=kendall_tau(x, y),
        interval=tau_interval(x, y, resamples=resamples, confidence=confidence, seed=seed),
        spearman=spearman_rho(x, y),
        tau_top_half=_tau_of_best(x, y, 0.5),
        tau_top_tenth=_tau_of_best(x, y, 0.1),
        partial_tau=partial,
        top=tuple(top_k(x, y, k) for k in counts if k <= len(x)),
    )


def kendall_tau(predicted: ArrayLike, true: ArrayLike) -> float:
    """Kendall's tau-b of two lists [n], in O(n log n); NaN where one is constant or shorter than two."""
    x, y = np.asarray(predicted), np.asarray(true)
    return float(stats.kendalltau(x, y).statistic) if len(x) > 1 else float("nan")


def spearman_rho(predicted: ArrayLike, true: ArrayLike) -> float:
    """Spearman's rank correlation of two lists [n]: that of the ranks, ties sharing theirs. NaN if one is constant."""
    x, y = (stats.rankdata(values) for values in (predicted, true))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else float("nan")


def partial_kendall_tau(predicted: ArrayLike, true: ArrayLike, given: ArrayLike) -> float:
    """Kendall's partial tau of two lists [n] given a third (Kendall 1942, "Partial rank correlation"); NaN where one of
    them is constant, or where one of the two ranks as the third does.

    Raises:
        InputError: unequal lengths, or NaN.
    """
    x, y, z = _checked(predicted=predicted, true=true, given=given)
    xy, xz, yz = kendall_tau(x, y), kendall_tau(x, z), kendall_tau(y, z)
    rest = (1 - xz * xz) * (1 - yz * yz)
    # A tau of 1 may come out a rounding below it.
    return (xy - xz * yz) / rest**0.5 if rest > 1e-12 else float("nan")


def tau_interval(
    predicted: ArrayLike, true: ArrayLike, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of tau-b over architectures. Two copies of one architecture are tied on both sides,
    and tau-b leaves them out. NaN for fewer than 10 architectures, which such an interval would be too narrow for.

    Args:
        predicted: [n].
        true: [n].
        resamples: how many times n architectures are drawn with replacement.
        confidence: share of the resamples' taus inside.
        seed: of the draws.

    Raises:
        InputError: unequal lengths, NaN, or a confidence that is no share.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise InputError(f"confidence, resamples: got {confidence} and {resamples}; expected such as 0.95 and 1000")
    # Ranks, for integers sort faster; tau-b does not change.
    x, y = (np.unique(values, return_inverse=True)[1] for values in _checked(predicted=predicted, true=true))
    if len(x) < _FEWEST:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    taus = np.empty(resamples)
    for number in range(resamples):
        drawn = rng.integers(len(x), size=len(x))
        taus[number] = kendall_tau(x[drawn], y[drawn])
    if np.isnan(taus).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(taus, ((1 - confidence) / 2, (1 + confidence) / 2)).tolist()
    return low, high


def truly_best(predicted: ArrayLike, true: ArrayLike, share: float) -> tuple[Values, Values]:
    """Both lists restricted to the truly best share of the architectures; those that tie with the last are in it."""
    x, y = _checked(predicted=predicted, true=true)
    last = np.sort(y)[-max(1, round(share * len(y)))]
    return x[y >= last], y[y >= last]


def top_k(predicted: ArrayLike, true: ArrayLike, k: int) -> TopK:
    """What the k architectures are worth that a predictor puts first.

    Raises:
        InputError: k is not 1 to n, unequal lengths, or NaN.
    """
    x, y = _checked(predicted=predicted, true=true)
    if not 1 <= k <= len(x):
        raise InputError(f"k: got {k}; expected 1 to {len(x)}")
    chosen, truly = _chance_of_top(x, k), _chance_of_top(y, k)
    best = _expected_best(y[chosen == 1], y[(chosen > 0) & (chosen < 1)], k)
    return TopK(k, float((chosen * truly).sum()) / k, best, float((chosen * y).sum()) / k, float(y.max()) - best)


def _tau_of_best(x: Values, y: Values, share: float) -> float:
    best = truly_best(x, y, share)
    return kendall_tau(*best) if len(best[0]) >= _FEWEST else float("nan")


def _chance_of_top(values: Values, k: int) -> Values:
    """For each value the chance to be among the k greatest, where ties are broken at random."""
    last = np.sort(values)[-k]
    above, tied = values > last, values == last
    return above + tied * ((k - above.sum()) / tied.sum())


def _expected_best(certain: Values, tied: Values, k: int) -> float:
    """Expected greatest of the certain values and of k - len(certain) that are drawn from the tied ones."""
    floor = certain.max() if len(certain) else -np.inf
    draws, best, left = k - len(certain), 0.0, 1.0
    values = np.sort(tied)[::-1]
    if not len(values) or values[0] <= floor:
        return float(floor)
    # The greatest drawn is values[at] if that is drawn and none before it is.
    for at, value in enumerate(values):
        chance = draws / (len(values) - at)
        best += left * chance * max(float(value), float(floor))
        left *= 1 - chance
        if left <= 0:
            break
    return best


def _checked(**lists: ArrayLike) -> list[Values]:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in lists.items()}
    lengths = {name: len(values) if values.ndim == 1 else -1 for name, values in arrays.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        told = ", ".join(f"{name} {list(values.shape)}" for name, values in arrays.items())
        raise InputError(f"{', '.join(arrays)}: got {told}; expected lists of one length, 2 or more")
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise InputError(f"{name}: holds NaN or infinity")
    return list(arrays.values())
