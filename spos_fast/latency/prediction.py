"""How well the sums of a latency table predict whole networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.latency.table import LatencyTable, Spread
from spos_fast.latency.timing import Clock, Compiler, Part, Progress, deployed, images_for, quiet
from spos_fast.sampling import UniformSampler
from spos_fast.spaces import Space


@dataclass(frozen=True)
class Prediction:
    """Predicted and measured milliseconds of networks, one entry a network.

    Attributes:
        genes: the networks.
        predicted: sums of the table's entries.
        measured, p20, p80: median and quantiles of whole networks.
    """

    genes: tuple[tuple[int, ...], ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    p20: tuple[float, ...]
    p80: tuple[float, ...]

    @property
    def spearman(self) -> float:
        """Rank correlation; NaN if one side is constant."""
        return float(stats.spearmanr(self.predicted, self.measured).statistic)

    @property
    def kendall(self) -> float:
        """Kendall's tau-b; NaN if one side is constant."""
        return float(stats.kendalltau(self.predicted, self.measured).statistic)

    @property
    def mean_error(self) -> float:
        """Mean of \\|predicted - measured\\| / measured."""
        return float(np.mean(np.abs(self._relative())))

    @property
    def bias(self) -> float:
        """Mean of (predicted - measured) / measured: what all predictions share, which no ranking sees."""
        return float(np.mean(self._relative()))

    def _relative(self) -> np.ndarray:
        measured = np.array(self.measured)
        return (np.array(self.predicted) - measured) / measured

    def plain(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {
            "spearman": self.spearman,
            "kendall": self.kendall,
            "mean_relative_error": self.mean_error,
            "bias": self.bias,
            **{field.name: list(getattr(self, field.name)) for field in dataclasses.fields(self)},
        }


def compare(
    space: Space,
    table: LatencyTable,
    networks: int = 50,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Prediction:
    """Measure random whole networks in the way of the table and set them beside its predictions. Nothing is fitted.

    Networks take turns, in an order drawn each round; one runs once untimed and then once timed.

    Args:
        space: of the table.
        table: its settings and seed are used again.
        networks: how many different ones, uniformly random.
        device: that of the table.
        progress: hears (rounds done, rounds in all), warm-up included.

    Raises:
        InputError: the table is of another space, or fewer than 2 networks.
    """
    if networks < 2:
        raise InputError(f"networks: got {networks}; a correlation needs at least 2")
    table.check_space(space)
    settings, device, predicted = table.settings, torch.device(device), table.cost_table()
    rng, sampler = np.random.default_rng([settings.seed, 1]), UniformSampler(space)
    chosen: dict[Architecture, None] = {}
    while len(chosen) < min(networks, space.size):
        chosen[sampler.sample(rng)] = None
    archs = list(chosen)
    with quiet(settings):
        runs: list[Part] = [deployed(space, arch, settings, device) for arch in archs]
        if settings.compiled:
            compiler = Compiler()
            runs = [compiler(run, arch) for run, arch in zip(runs, archs, strict=True)]
        samples = _sample(runs, images_for(space, settings, device), table, Clock(device), rng, progress)
    spread = Spread.of(samples)
    totals = predicted.totals(np.array([arch.genes for arch in archs]))
    columns = (totals, spread.median, spread.p20, spread.p80)
    return Prediction(
        tuple(arch.genes for arch in archs),
        *(tuple((column / predicted.per_unit).tolist()) for column in columns),
    )


def _sample(
    runs: list[Part],
    images: torch.Tensor,
    table: LatencyTable,
    clock: Clock,
    rng: np.random.Generator,
    progress: Progress | None,
) -> np.ndarray:
    """Seconds [rounds, networks]."""
    rounds, warmup = table.settings.rounds, table.settings.warmup
    samples = np.empty((rounds, len(runs)))
    for number in range(warmup + rounds):
        for index in rng.permutation(len(runs)):
            (spent,) = clock.chain([runs[index]], images)
            if number >= warmup:
                samples[number - warmup, index] = spent
        if progress is not None:
            progress(number + 1, warmup + rounds)
    return samples
