"""Blocks of NAS-Bench-201 networks (Dong and Yang 2020, arXiv 2001.00326, figure 1): a cell that is a small graph, and
the residual block between two stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.nasbench.nasbench201_cells import EDGES, NODES, OPS

# Operations with weights, by kernel size.
CONVOLUTIONS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}


class Cell(nn.Module):
    """Four nodes, each the sum of what the nodes before it give through one operation an edge.

    Every edge holds the weights of all its operations; which one runs is said call by call. Operations: ``none`` gives
    zeros, ``skip_connect`` the node itself, ``nor_conv_1x1`` and ``nor_conv_3x3`` are ReLU, convolution and batch
    normalisation, ``avg_pool_3x3`` leaves its padding out of the averages. What the output does not read is not run:
    the same output, and gradients of None there.

    Args:
        channels: of all nodes.
        ops: for every edge of :data:`EDGES` its operations, in the order of the genes.
        affine: whether batch normalisation has scale and shift.
    """

    def __init__(self, channels: int, ops: Sequence[Sequence[str]], affine: bool) -> None:
        super().__init__()
        for name in (name for names in ops for name in names):
            if name not in OPS:
                raise InputError(f"ops: there is no operation {name!r}; expected some of {', '.join(OPS)}")
        self.ops = tuple(tuple(names) for names in ops)
        self.edges = nn.ModuleList(
            nn.ModuleDict(
                {name: _convolution(channels, CONVOLUTIONS[name], affine) for name in names if name in CONVOLUTIONS}
            )
            for names in self.ops
        )
        if all(len(names) == 1 for names in self.ops):
            # What is never read never gets a gradient, and DistributedDataParallel waits for all that are asked for.
            self.edges.requires_grad_(False)
            for module in self.running((0,) * len(EDGES)):
                module.requires_grad_(True)

    def forward(self, x: Tensor, genes: Sequence[int] = (0,) * len(EDGES)) -> Tensor:
        """Shapes ``[N, channels, H, W] -> [N, channels, H, W]``.

        Args:
            x: the first node.
            genes: for every edge the index of its operation.
        """
        nodes: list[Tensor | None] = [x, *[None] * (NODES - 1)]  # None is all zeros
        rectified: dict[int, Tensor] = {}  # the convolutions of a node's edges share its ReLU
        for edge, name in self._running(genes):
            source, target = EDGES[edge]
            value = nodes[source]
            if value is None:
                value = x.new_zeros(()).expand_as(x)
            if name in CONVOLUTIONS:
                if source not in rectified:
                    rectified[source] = functional.relu(value)
                value = self.edges[edge][name](rectified[source])  # type: ignore[index]
            elif name == "avg_pool_3x3":
                value = functional.avg_pool2d(value, 3, 1, 1, count_include_pad=False)
            before = nodes[target]
            nodes[target] = value if before is None else before + value
        out = nodes[-1]
        return x.new_zeros(x.shape) if out is None else out

    def running(self, genes: Sequence[int]) -> list[nn.Module]:
        """The modules that run with these genes."""
        return [self.edges[edge][name] for edge, name in self._running(genes) if name in CONVOLUTIONS]  # type: ignore[index]

    def _running(self, genes: Sequence[int]) -> Iterator[tuple[int, str]]:
        """The edges whose operation the output reads, with its name, inputs of a node before its outputs."""
        names = [names[gene] for names, gene in zip(self.ops, genes, strict=True)]
        read = {NODES - 1}
        for (source, target), name in zip(reversed(EDGES), reversed(names), strict=True):
            if target in read and name != "none":
                read.add(source)
        for edge, name in enumerate(names):
            if EDGES[edge][1] in read and name != "none":
                yield edge, name


class ResidualReduction(nn.Module):
    """The residual block that halves the image and widens the channels: two 3x3 convolutions, each behind a ReLU and
    before batch normalisation, beside an average of 2 x 2 pixels and a 1x1 convolution.

    Args:
        in_channels, out_channels: of the images that come and go.
        affine: whether batch normalisation has scale and shift.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        self.conv_a = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )
        self.conv_b = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: Tensor, _setting: int = 0) -> Tensor:
        """Shapes ``[N, in_channels, H, W] -> [N, out_channels, H / 2, W / 2]``, H and W even. It has one setting."""
        return self.downsample(x) + self.conv_b(self.conv_a(x))


def _convolution(channels: int, kernel_size: int, affine: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size, 1, kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )
