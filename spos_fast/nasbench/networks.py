"""The PyTorch network of a NAS-Bench-101 cell.

Ying et al. 2019 (arXiv 1902.09635), section 2, and model_builder.py of google-research/nasbench.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.nasbench.cell import OPERATIONS

# base_ops.py: TensorFlow's momentum 0.997 of the running statistics is 1 - 0.997 in PyTorch's sense.
BN_MOMENTUM, BN_EPSILON = 0.003, 1e-5
# Standard deviation of a standard normal cut off at two of its own: TensorFlow's variance_scaling_initializer divides
# by it.
_TRUNCATED_STD = 0.87962566103423978


class Spec(Protocol):
    """What a network is built from: a :class:`spos_fast.nasbench.api.ModelSpec`."""

    valid_spec: bool
    matrix: Any
    ops: list[str]


def network(
    spec: Spec,
    *,
    stem_channels: int = 128,
    stacks: int = 3,
    cells_per_stack: int = 3,
    num_classes: int = 10,
    in_channels: int = 3,
) -> CellNetwork:
    """The network of a cell: a 3x3 stem, stacks of equal cells, global average pooling and a linear classifier.

    Before every stack but the first a 2x2 max-pool halves the image, and that stack has twice the channels. With the
    default sizes the number of parameters is the benchmark's ``trainable_parameters``. Initial weights follow the
    official code (truncated normal of variance 1 / fan-in, Glorot-uniform classifier), drawn from torch's generator.

    Args:
        spec: the cell, as ModelSpec prunes it.
        stem_channels, stacks, cells_per_stack: size of the network; the benchmark's by default.
        num_classes, in_channels: of the data.

    Returns:
        A module from float images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``.

    Raises:
        InputError: an invalid cell, an unknown operation, or a size below 1.
    """
    sizes = {"stem_channels": stem_channels, "stacks": stacks, "cells_per_stack": cells_per_stack}
    for name, value in {**sizes, "num_classes": num_classes, "in_channels": in_channels}.items():
        if value < 1:
            raise InputError(f"{name}: got {value}; expected a positive number")
    if not spec.valid_spec:
        raise InputError("spec: no path leads from its input to its output; such a cell has no network")
    for op in spec.ops[1:-1]:
        if op not in OPERATIONS:
            raise InputError(f"spec: unknown operation {op!r}; expected one of {', '.join(OPERATIONS)}")
    edges = [[bool(edge) for edge in row] for row in spec.matrix.tolist()]
    if sum(row[-1] for row in edges[1:]) > stem_channels:
        raise InputError(f"stem_channels: got {stem_channels}; too few to split over the vertices before the output")
    return CellNetwork(edges, spec.ops, in_channels, stem_channels, stacks, cells_per_stack, num_classes)


def vertex_channels(input_channels: int, output_channels: int, edges: Sequence[Sequence[bool]]) -> list[int]:
    """Channels of every vertex of a pruned cell.

    The output's channels are split evenly over the vertices that are concatenated there, the first ones taking one more
    each until the remainder is used up; every other vertex has as many as the widest vertex it feeds.
    """
    vertices = len(edges)
    channels = [input_channels] + [0] * (vertices - 2) + [output_channels]
    joined = [vertex for vertex in range(1, vertices - 1) if edges[vertex][-1]]
    for place, vertex in enumerate(joined):
        share, remainder = divmod(output_channels, len(joined))
        channels[vertex] = share + (place < remainder)
    for vertex in range(vertices - 3, 0, -1):
        if not edges[vertex][-1]:
            channels[vertex] = max(
                channels[target] for target in range(vertex + 1, vertices - 1) if edges[vertex][target]
            )
    return channels


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU; the image keeps its size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels, eps=BN_EPSILON, momentum=BN_MOMENTUM),
            nn.ReLU(inplace=True),
        )


class Cell(nn.Module):
    """One cell: what flows into a vertex is added up, what flows into the output is concatenated.

    The cell's input reaches a vertex, and the output, through a 1x1 projection of its own and is always added. A vertex
    that has one channel more than its reader gives the first ones.
    """

    def __init__(
        self, edges: Sequence[Sequence[bool]], ops: Sequence[str], in_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        self.output = len(edges) - 1
        self.channels = vertex_channels(in_channels, out_channels, edges)
        # Interior vertices that each vertex reads; the input is apart.
        self.sources = [
            [source for source in range(1, target) if edges[source][target]] for target in range(self.output + 1)
        ]
        self.projections = nn.ModuleDict(
            {
                str(target): ConvBNReLU(in_channels, self.channels[target], 1)
                for target in range(1, self.output + 1)
                if edges[0][target]
            }
        )
        self.ops = nn.ModuleList(_operation(ops[v], self.channels[v]) for v in range(1, self.output))

    def forward(self, images: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``."""
        values = [images]
        for vertex, op in enumerate(self.ops, 1):
            width = self.channels[vertex]
            terms = [values[source][:, :width] for source in self.sources[vertex]]
            values.append(op(self._sum(terms, images, vertex)))
        joined = [values[source] for source in self.sources[self.output]]
        return self._sum([torch.cat(joined, 1)] if joined else [], images, self.output)

    def _sum(self, terms: list[Tensor], images: Tensor, vertex: int) -> Tensor:
        if str(vertex) in self.projections:
            terms.append(self.projections[str(vertex)](images))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class CellNetwork(nn.Module):
    """See :func:`network`."""

    def __init__(
        self,
        edges: Sequence[Sequence[bool]],
        ops: Sequence[str],
        in_channels: int,
        stem_channels: int,
        stacks: int,
        cells_per_stack: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = ConvBNReLU(in_channels, stem_channels, 3)
        self.stacks = nn.ModuleList()
        channels = stem_channels
        for stack in range(stacks):
            widened = channels if stack == 0 else 2 * channels
            first = Cell(edges, ops, channels, widened)
            others = [Cell(edges, ops, widened, widened) for _ in range(cells_per_stack - 1)]
            self.stacks.append(nn.Sequential(first, *others))
            channels = widened
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(1 / module.weight[0].numel()) / _TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        values = self.stem(images)
        for index, stack in enumerate(self.stacks):
            if index:
                # ceil_mode: padding at the far edge of an odd size, as TensorFlow's "same".
                values = functional.max_pool2d(values, 2, ceil_mode=True)
            values = stack(values)
        logits: Tensor = self.classifier(values.mean((2, 3)))
        return logits


def _operation(name: str, channels: int) -> nn.Module:
    if name == "maxpool3x3":
        return nn.MaxPool2d(3, stride=1, padding=1)
    return ConvBNReLU(channels, channels, 3 if name == "conv3x3-bn-relu" else 1)
