"""What every search space offers: sampling, checking, cost, supernet and stand-alone networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture, integer_genes
from spos_fast.errors import InputError
from spos_fast.supernet import Supernet

METRICS = ("macs", "params", "bitops", "latency_ms")


@dataclass(frozen=True)
class Cost:
    """What one forward of one image costs.

    Attributes:
        macs: multiply-accumulates of convolutions and linear layers (the field's "FLOPs").
        params: as the publications of the space count them. ShuffleNetV2: weights of convolutions and linear layers,
            without the scale and shift of batch normalisation (which add 0.8 % to the published network).
            NAS-Bench-201 and NAS-Bench-Macro: all parameters.
        bitops: bit operations: multiply-accumulates times bits of the weights times bits of the activations, over all
            quantized convolutions (arXiv 1904.00420, section 4.3, whose G is 2**30); None in a space without
            quantization.
        latency_ms: predicted milliseconds of one inference on the device, and with the batch, of the latency table that
            the space was given (:class:`spos_fast.LatencyTable`); None without one.
    """

    macs: int
    params: int
    bitops: int | None = None
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

    def cut(self, shapes: Sequence[tuple[int, ...]]) -> CostTable:
        """The table of the first choices, so many of every gene of every layer."""
        pairs = zip(self.layers, shapes, strict=True)
        return replace(self, layers=tuple(layer[tuple(map(slice, shape))] for layer, shape in pairs))

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


def scaled_channels(channels: int, ratio: float) -> int:
    """``floor(channels * ratio)``, the rounding of the published list of widths (``int(...)``), in exact arithmetic.

    The ratio stands for the fraction nearest to it with a denominator of at most 1,000: 0.6 and 3 * 0.2 (which is
    greater by 1e-16) are both three fifths, so no product falls below the whole number that it should be.
    """
    return int(channels * Fraction(ratio).limit_denominator(1000))


def without_metric(name: str) -> InputError:
    """What to say where a space has no table of a metric."""
    if name == "bitops":
        return InputError("bitops: the space has none; choose a quantized one, such as quant_resnet18, or give it bits")
    return InputError(f"{name}: the space has no table of it; attach one that `spos-fast latency` wrote")


class Space(ABC):
    """A search space. Subclasses set the attributes and build the networks.

    Attributes:
        name: what the space is called in architectures, configuration files and on the command line.
        kinds: what the genes of a layer decide, in order, such as ``("block", "width")`` or ``("bits", "width")``.
            Every layer has one gene of each kind; its genes stand together, layer after layer.
        choices: for every gene the names of the candidates that are searched, in the order of their indices.
        references: by kind, the names of candidates that only :meth:`baselines` use, such as a pair of bit-widths
            that the search leaves out: no search draws them. Their indices follow those of the choices.
        cost_tables: ``{"macs": CostTable, "params": CostTable}``, ``"bitops"`` in a quantized space, references
            included; and ``"latency_ms"`` once :meth:`spos_fast.LatencyTable.attach` has put it there, without them.
    """

    name: str
    kinds: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    references: Mapping[str, tuple[str, ...]] = MappingProxyType({})
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

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """For every layer how many choices each of its genes has."""
        genes, step = [len(names) for names in self.choices], len(self.kinds)
        return [tuple(genes[first : first + step]) for first in range(0, len(genes), step)]

    def isomorphism_key(self, genes: Sequence[int]) -> str:
        """Equal for genes whose networks are the same; in most spaces no two are."""
        return "-".join(map(str, genes))

    def candidates(self, gene: int) -> tuple[str, ...]:
        """Names of what a gene can be: its choices, then the references of its kind."""
        return self.choices[gene] + self.references.get(self.kinds[gene % len(self.kinds)], ())

    def searched_costs(self, metric: str) -> CostTable:
        """The table of a metric over what is searched, without references.

        Raises:
            InputError: the space has none; the message says what gives one.
        """
        if metric not in self.cost_tables:
            raise without_metric(metric)
        return self.cost_tables[metric].cut(self.layer_shapes)

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
        for position, gene in enumerate(values):
            most = len(self.candidates(position)) - 1
            if not 0 <= gene <= most:
                raise InputError(f"genes: gene {position} is {gene}; it must be 0 to {most}")
        return Architecture(self.name, values)

    def everywhere(self, *choice: int) -> Architecture:
        """The architecture whose layers all have the same genes, one of each of :attr:`kinds`."""
        return self.architecture(choice * (len(self.choices) // len(self.kinds)))

    def cost(self, arch: Architecture) -> Cost:
        """Cost of one forward of one image, in closed form; of a reference without the latency, which is not measured.

        Raises:
            InputError: the architecture is not of this space.
        """
        genes = np.array([self.architecture(arch).genes])
        searched = (genes[0] < [len(names) for names in self.choices]).all()
        tables = {name: table for name, table in self.cost_tables.items() if searched or name != "latency_ms"}
        totals = {name: table.value(int(table.totals(genes)[0])) for name, table in tables.items()}
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
