"""What the report says about a run, as numbers: best so far, Pareto front, shares of choices, intervals, the table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from spos_fast.analysis.run_data import Retrained, RunData, Scored, Tested

# 97.5% point of the standard normal distribution.
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Row:
    """One architecture of the comparison.

    Attributes:
        label: as on the command line: evolution, random_search, all_NAME, random_N, ...
        title: the label in words.
        note: where the architecture came from.
        genes: None while a custom architecture is still being trained.
        scored: its score in the supernet, if the search met it.
        result: its test after retraining, if that has finished.
        retrained: its training, if that has begun.
    """

    label: str
    title: str
    note: str
    genes: tuple[int, ...] | None
    scored: Scored | None
    result: Tested | None
    retrained: Retrained | None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates, if known."""
        return self.result.macs if self.result else self.scored.macs if self.scored else None

    @property
    def params(self) -> int | None:
        """Number of weights, if known."""
        return self.result.params if self.result else self.scored.params if self.scored else None

    @property
    def bitops(self) -> int | None:
        """Bit operations, if known."""
        return self.result.bitops if self.result else self.scored.bitops if self.scored else None

    @property
    def latency_ms(self) -> float | None:
        """Predicted latency, if known."""
        return self.result.latency_ms if self.result else self.scored.latency_ms if self.scored else None


def ranked(candidates: Iterable[Scored]) -> list[Scored]:
    """Best first: accuracy, then less loss, then the earlier one, as the search ranks; NaN comes last."""
    return sorted(candidates, key=lambda c: (-_or(c.accuracy, -math.inf), _or(c.loss, math.inf)))


def best_so_far(candidates: Iterable[Scored]) -> list[float]:
    """Highest accuracy among the first n candidates, for every n; NaN until the first number."""
    out: list[float] = []
    highest = math.nan
    for candidate in candidates:
        if not candidate.accuracy <= highest and not math.isnan(candidate.accuracy):
            highest = candidate.accuracy
        out.append(highest)
    return out


def pareto_front(candidates: Iterable[Scored], metric: str = "macs") -> list[Scored]:
    """Candidates that no other one beats in both accuracy and a cost, cheapest first; of equals the earlier one. Those
    that failed or were stopped early have no accuracy to compare.
    """
    front: list[Scored] = []
    complete = [candidate for candidate in candidates if not (candidate.failed or candidate.stopped)]
    for candidate in sorted(complete, key=lambda c: (getattr(c, metric), -_or(c.accuracy, -math.inf))):
        if candidate.accuracy > (front[-1].accuracy if front else -math.inf):
            front.append(candidate)
    return front


def choice_shares(chosen: Sequence[Sequence[int]], layers: int, choices: int) -> np.ndarray:
    """Share of every choice at every layer, from the choices of architectures at their layers.

    Returns:
        float64 ``[choices, layers]``; every column sums to 1, or is 0 if there is no architecture.
    """
    shares = np.zeros((choices, layers))
    for indices in chosen:
        shares[list(indices), range(layers)] += 1 / len(chosen)
    return shares


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """95% score interval (Wilson 1927) of a proportion that was seen on ``images`` independent images.

    Unlike one standard error it holds near 0 and 1: 360 of 360 right images do not give an interval of no width.
    It covers the choice of test images only, not another seed of training.
    """
    if images < 1 or not 0 <= share <= 1:
        return math.nan, math.nan
    spread = _Z95**2 / images
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_floor(accuracies: Iterable[float]) -> float:
    """Where an accuracy axis may begin without a few failed networks flattening the rest: three quartile ranges below
    the first quartile, or the least value if that is higher.
    """
    finite = np.array([value for value in accuracies if math.isfinite(value)])
    if not len(finite):
        return 0.0
    low, high = np.percentile(finite, [25, 75])
    return float(max(finite.min(), low - 3 * max(high - low, 0.01)))


def choice_tags(names: Sequence[str]) -> list[str]:
    """Few characters for every choice: the two digits of bits such as 3W4A; the number that its name ends with or, for
    a ratio such as 0.6x, is; else its first letter; the index where these are not all different.
    """
    tags = []
    for name in names:
        bits = re.fullmatch(r"(\d)W(\d)A", name)
        if bits:
            tags.append(bits[1] + bits[2])
            continue
        number = re.search(r"^[\d.]+(?=x$)|\d{1,2}$", name)
        tags.append(number[0] if number else name[:1])
    return tags if len(set(tags)) == len(tags) else [str(index) for index in range(len(names))]


def comparison(data: RunData) -> list[Row]:
    """The rows of the table: what the search found, then whatever else was retrained."""
    scores = {candidate.genes: candidate for candidate in reversed(data.scored)}
    retrained = {entry.label: entry for entry in data.retrained}
    rows = []
    for label, candidates in (("evolution", data.evolution), ("random_search", data.random_search)):
        entry, best = retrained.pop(label, None), next(iter(ranked(candidates)), None)
        if entry is None and best is None:
            continue
        result = entry.result if entry else None
        genes = result.genes if result else best.genes if best else None
        scored = best if best and best.genes == genes else scores.get(genes or ())
        note = _origin(label, best, len(candidates)) if best and best.genes == genes else ""
        rows.append(Row(label, _title(label), note, genes, scored, result, entry))
    for label, entry in retrained.items():
        result = entry.result
        genes = result.genes if result else data.baselines.get(label)
        scored = scores.get(genes) if genes else None
        rows.append(Row(label, _title(label), "", genes, scored, result, entry))
    return rows


def _title(label: str) -> str:
    if label in ("evolution", "random_search"):
        return {"evolution": "Evolution", "random_search": "Random search"}[label]
    if label.startswith("all_"):
        return f"{label.removeprefix('all_')} everywhere"
    number = re.fullmatch(r"(random|pareto)_(\d+)", label)
    if number:
        return f"{number[1].capitalize()} {number[2]}"
    return "Custom" if label.startswith("genes_") else label


def _origin(label: str, best: Scored, count: int) -> str:
    note = f"best of {count:,}"
    return note + (f"; {best.origin}, generation {best.generation}" if label == "evolution" and best.origin else "")


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
