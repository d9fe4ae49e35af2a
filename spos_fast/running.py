"""Running statistics of many parts at once: one call a batch merges all of them, another one folds them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast import ops
from spos_fast.calibration import Mode
from spos_fast.nn.parts import Moments, Part, Statistics


class RunningStatistics:
    """Statistics of parts, merged batch by batch as :func:`spos_fast.recalibrate` does, in float64.

    Memory does not grow with the number of batches.

    Args:
        parts: whose statistics they are; a part may occur many times.
        mode: how batches are averaged.
    """

    def __init__(self, parts: Sequence[Part], mode: Mode) -> None:
        self._parts, self._mode = parts, mode
        self._batches = 0
        # One entry a vector of the parts' moments; in mode pooled the second moments in place of variances.
        self._mean: list[Tensor] = []
        self._var: list[Tensor] = []
        self._count: list[int] = []
        self._vectors: list[int] = []  # of each part

    def merge(self, moments: Sequence[Moments]) -> None:
        """Add the moments of one batch, one of each part."""
        if not any(each.mean for each in moments):  # there is no normalisation
            self._vectors = [0] * len(moments)
            return
        mean, var, count = (list(itertools.chain.from_iterable(lists)) for lists in zip(*moments, strict=True))
        done = self._count or [0] * len(count)
        self._mean, self._var = ops.bn_merge(
            self._mean, self._var, done, mean, var, count, mode=self._mode, batches=self._batches, biased=True
        )
        self._count = [before + new for before, new in zip(done, count, strict=True)]
        self._vectors = [len(each.mean) for each in moments]
        self._batches += 1

    def take_own(self) -> None:
        """Take what the layers of the parts carry themselves, in place of batches."""
        layers = [pair for part in self._parts for pair in zip(part.norms, part.widths, strict=True)]
        # Parts' layers have running statistics.
        self._mean = [cast(Tensor, layer.running_mean)[:width].double() for layer, width in layers]
        self._var = [cast(Tensor, layer.running_var)[:width].double() for layer, width in layers]
        self._vectors = [len(part.norms) for part in self._parts]

    def statistics(self) -> list[Statistics]:
        """What the parts normalise by, one of each part."""
        variances = self._var
        if self._mode == "pooled":
            variances = [m2 / max(count - 1, 1) for m2, count in zip(self._var, self._count, strict=True)]
        spans = list(itertools.pairwise(itertools.accumulate(self._vectors, initial=0)))
        means = [_joined(self._mean[a:b]) for a, b in spans]
        variances = [_joined(variances[a:b]) for a, b in spans]
        scales: dict[int, Tensor] = {}
        shifts: dict[int, Tensor] = {}
        fusing = [at for at, part in enumerate(self._parts) if part.fuses]
        for eps in {self._parts[at].norms[0].eps for at in fusing}:
            places = [at for at in fusing if self._parts[at].norms[0].eps == eps]
            gamma, beta = zip(*(self._parts[at].affine() for at in places), strict=True)
            folded = ops.bn_finalize([means[at] for at in places], [variances[at] for at in places], gamma, beta, eps)
            for found, values in zip((scales, shifts), folded, strict=True):
                found.update(zip(places, values, strict=True))
        return [
            Statistics(mean, var, scales.get(at), shifts.get(at))
            for at, (mean, var) in enumerate(zip(means, variances, strict=True))
        ]

    def finite(self) -> Tensor:
        """For every part whether its statistics are numbers: bool ``[parts]``."""
        sizes = [sum(part.widths) for part in self._parts]
        if not self._mean:
            return torch.ones(len(self._parts), dtype=torch.bool)
        bad = ~(torch.cat(self._mean).isfinite() & torch.cat(self._var).isfinite())
        # Differences of running sums: the vectors of a part stand one behind the other.
        ends = torch.tensor(list(itertools.accumulate(sizes, initial=0)), device=bad.device)
        return functional.pad(bad.cumsum(0), (1, 0))[ends].diff() == 0


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors)) if vectors else torch.empty(0)
