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


@dataclass(frozen=True)
class Cost:
    """What one forward of one image costs.

    Attributes:
        macs: multiply-accumulates of convolutions and linear layers (the field's "FLOPs").
        params: weights of convolutions and linear layers. As in the published numbers, the scale and shift of
            batch normalisation are not counted (they add 0.8 % to the published network).
    """

    macs: int
    params: int


@dataclass(frozen=True)
class CostTable:
    """One metric of :class:`Cost`, additive over layers: ``fixed + sum(layers[i][genes of layer i])``.

    Attributes:
        fixed: what every architecture pays (stem and head).
        layers: one int64 array a layer, with one axis for each of the layer's genes: the genes of a layer may act on
            its cost together (the width of a block matters more in one kind of block than in another).
    """

    fixed: int
    layers: tuple[np.ndarray, ...]

    def totals(self, genes: np.ndarray) -> np.ndarray:
        """The metric of many architectures: integers ``[n, genes]`` to int64 ``[n]``."""
        total, first = np.full(len(genes), self.fixed, dtype=np.int64), 0
        for layer in self.layers:
            total += layer[tuple(genes[:, first : first + layer.ndim].T)]
            first += layer.ndim
        return total

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
        kinds: what the genes of a layer decide, in order: ``("block",)``, ``("width",)`` or ``("block", "width")``.
            Every layer has one gene of each kind; its genes stand together, layer after layer.
        choices: for every gene the names of its candidates, in the order of their indices.
        cost_tables: ``{"macs": CostTable, "params": CostTable}``.
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
        return Cost(**{name: int(table.totals(genes)[0]) for name, table in self.cost_tables.items()})

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
