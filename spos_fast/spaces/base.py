"""What every search space offers: sampling, checking, cost, supernet and stand-alone networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture, integer_genes
from spos_fast.errors import InputError
from spos_fast.supernet import Supernet

METRICS = ("macs", "params", "latency_ms")


@dataclass(frozen=True)
class Cost:
    """What one forward of one image costs.

    Attributes:
        macs: multiply-accumulates of convolutions and linear layers (the field's "FLOPs").
        params: as the publications of the space count them. ShuffleNetV2: weights of convolutions and linear layers,
            without the scale and shift of batch normalisation (which add 0.8 % to the published network).
            NAS-Bench-201 and NAS-Bench-Macro: all parameters.
        latency_ms: predicted milliseconds of one inference on the device, and with the batch, of the latency table that
            the space was given (:class:`spos_fast.LatencyTable`); None without one.
    """

    macs: int
    params: int
    latency_ms: float | None = None

    def known(self) -> dict[str, int | float]:
        """The metrics that have a value, by name: what is recorded of a candidate."""
        values = {name: getattr(self, name) for name in METRICS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class CostTable:
    """One metric of :class:`Cost`, additive over layers: ``fixed + sum(layers[i][genes of layer i])``.

    Attributes:
        fixed: what every architecture pays (stem and head).
        layers: one int64 array a layer, with one axis for each of the layer's genes: the genes of a layer may act on
            its cost together (the width of a block matters more in one kind of block than in another).
        per_unit: how many of these integers make one of the metric, for metrics that are no whole numbers: a
            millisecond is counted as a million nanoseconds.
    """

    fixed: int
    layers: tuple[np.ndarray, ...]
    per_unit: int = 1

    def totals(self, genes: np.ndarray) -> np.ndarray:
        """The metric of many architectures: integers ``[n, genes]`` to int64 ``[n]``."""
        total, first = np.full(len(genes), self.fixed, dtype=np.int64), 0
        for layer in self.layers:
            total += layer[tuple(genes[:, first : first + layer.ndim].T)]
            first += layer.ndim
        return total

    def value(self, total: float) -> float:
        """A total in units of the metric."""
        return total if self.per_unit == 1 else total / self.per_unit

    def limits(self, low: float, high: float) -> tuple[float, float]:
        """Ends of a range of the metric as totals: those between them are the totals whose :meth:`value` is inside."""
        least, most = low * self.per_unit, high * self.per_unit
        # A product may fall on the wrong side of a whole number; the value next to it decides.
        if self.per_unit > 1 and abs(least) < 2**52:
            least = np.floor(least) - 1
            while self.value(least) < low:
                least += 1
        if self.per_unit > 1 and abs(most) < 2**52:
            most = np.ceil(most) + 1
            while self.value(most) > high:
                most -= 1
        return least, most

    @property
    def smallest(self) -> int:
        """Least value over the whole space."""
        return self.fixed + sum(int(layer.min()) for layer in self.layers)

    @property
    def largest(self) -> int:
        """Greatest value over the whole space."""
        return self.fixed + sum(int(layer.max()) for layer in self.layers)


class Space(ABC):
    """A search space. Subclasses set the attributes and build the networks.

    Attributes:
        name: what the space is called in architectures, configuration files and on the command line.
        kinds: what the genes of a layer decide, in order: ``("block",)``, ``("width",)``, ``("block", "width")``.
            Every layer has one gene of each kind; its genes stand together, layer after layer.
        choices: for every gene the names of its candidates, in the order of their indices.
        cost_tables: ``{"macs": CostTable, "params": CostTable}``, and ``"latency_ms"`` once
            :meth:`spos_fast.LatencyTable.attach` has put it there.
    """

    name: str
    kinds: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    cost_tables: dict[str, CostTable]

    @property
    def size(self) -> int:
        """Number of architectures."""
        size = 1
        for candidates in self.choices:
            size *= len(candidates)
        return size

    @property
    def layer_names(self) -> tuple[str, ...]:
        """For every layer what reports call it: its number from 1 on, unless the space has better names."""
        return tuple(str(layer + 1) for layer in range(len(self.choices) // len(self.kinds)))

    def isomorphism_key(self, genes: Sequence[int]) -> str:
        """Equal for genes whose networks are the same; in most spaces no two are."""
        return "-".join(map(str, genes))

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A uniformly random architecture. For ranges of cost see :class:`spos_fast.UniformSampler`."""
        return Architecture(self.name, tuple(int(rng.integers(len(candidates))) for candidates in self.choices))

    def architecture(self, genes: Sequence[int] | Architecture) -> Architecture:
        """The architecture with these genes.

        Args:
            genes: one choice index a gene; an :class:`Architecture` is checked and returned.

        Raises:
            InputError: another space, another number of genes, or a gene out of range.
        """
        if isinstance(genes, Architecture):
            if genes.space != self.name:
                raise InputError(f"architecture: belongs to space {genes.space!r}; this space is {self.name!r}")
            genes = genes.genes
        values = integer_genes(genes)
        if len(values) != len(self.choices):
            raise InputError(f"genes: got {len(values)} genes; space {self.name!r} has {len(self.choices)}")
        for position, (gene, candidates) in enumerate(zip(values, self.choices, strict=True)):
            if not 0 <= gene < len(candidates):
                raise InputError(f"genes: gene {position} is {gene}; it must be 0 to {len(candidates) - 1}")
        return Architecture(self.name, values)

    def everywhere(self, *choice: int) -> Architecture:
        """The architecture whose layers all have the same genes, one of each of :attr:`kinds`."""
        return self.architecture(choice * (len(self.choices) // len(self.kinds)))

    def cost(self, arch: Architecture) -> Cost:
        """Cost of one forward of one image, in closed form.

        Raises:
            InputError: the architecture is not of this space.
        """
        genes = np.array([self.architecture(arch).genes])
        totals = {name: table.value(int(table.totals(genes)[0])) for name, table in self.cost_tables.items()}
        return Cost(**totals)  # type: ignore[arg-type]

    @abstractmethod
    def baselines(self) -> dict[str, Architecture]:
        """The uniform networks that a search is compared with, by label."""

    @abstractmethod
    def supernet(self) -> Supernet:
        """A freshly initialised supernet (draws from torch's global generator)."""

    @abstractmethod
    def build(self, arch: Architecture) -> nn.Module:
        """A freshly initialised stand-alone network of one architecture (draws from torch's global generator)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's keywords: ``type(space)(**space.config())`` is the same space."""
