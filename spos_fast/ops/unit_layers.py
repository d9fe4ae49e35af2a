"""The layers that a fused unit consists of: which slice of which weight, and what comes out.

A layer is a convolution and batch normalisation; 1x1 convolutions are followed by ReLU, depthwise ones are not. A chain
alternates the two. A unit is a main chain beside the channels that pass, or beside a projection (a second chain).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import DTYPES
from spos_fast.ops.groups import check_groups, each

Projection = tuple[Tensor | None, Tensor | None]


class Layer(NamedTuple):
    """A convolution and batch normalisation.

    Attributes:
        name: of the argument that holds the weight.
        weight: as stored: [rows, columns, k, k], of which the first rows and columns may be used.
        made: channels that come out.
        read: channels that go in.
        depthwise: whether every channel has a filter of its own; otherwise a 1x1 convolution with ReLU.
        stride: of the convolution.
    """

    name: str
    weight: Tensor
    made: int
    read: int
    depthwise: bool
    stride: int = 1

    @property
    def slice(self) -> Tensor:
        """The weight that is used, a view."""
        return self.weight[: self.made] if self.depthwise else self.weight[: self.made, : self.read]

    @property
    def padding(self) -> int:
        """On each side, so that stride 1 keeps the size."""
        return self.weight.shape[2] // 2

    @property
    def groups(self) -> int:
        """As torch counts them."""
        return self.made if self.depthwise else 1


class Unit(NamedTuple):
    """A unit's input and its layers.

    Attributes:
        x: [groups * N, C, H, W].
        main: the layers of the main branch.
        projection: those of the other branch; none if the even channels of x pass instead.
        stride: of the unit.
        groups: how many runs of N images x holds, each with statistics of its own.
    """

    x: Tensor
    main: tuple[Layer, ...]
    projection: tuple[Layer, ...]
    stride: int
    groups: int = 1

    @property
    def layers(self) -> tuple[Layer, ...]:
        """In the order in which their statistics lie: main branch, projection."""
        return self.main + self.projection

    @property
    def sizes(self) -> list[int]:
        """Channels of every layer's batch normalisation."""
        return [layer.made for layer in self.layers]

    @property
    def normalised(self) -> int:
        """Channels of all batch normalisation together."""
        return sum(self.sizes)

    @property
    def beside(self) -> int:
        """Channels in front of the main branch's: those that pass, or the projection's."""
        return self.x.shape[1] if self.projection else self.x.shape[1] // 2

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[groups * N, C', H', W'] of the unit's output."""
        height, width = ((size - 1) // self.stride + 1 for size in self.x.shape[2:])
        return self.x.shape[0], self.beside + self.main[-1].made, height, width

    @property
    def samples(self) -> int:
        """Images of one group."""
        return self.x.shape[0] // self.groups

    @property
    def saved_shapes(self) -> list[tuple[int, int, int, int]]:
        """Shapes of the convolutions' outputs, of one group."""
        shapes = []
        for chain in (self.main, self.projection):
            size = tuple(self.x.shape[2:])
            for layer in chain:
                size = tuple((side - 1) // layer.stride + 1 for side in size)
                shapes.append((self.samples, layer.made, *size))
        return shapes  # type: ignore[return-value]

    @property
    def saved_size(self) -> int:
        """Values in the convolutions' outputs, of one group."""
        return sum(math.prod(shape) for shape in self.saved_shapes)

    def each(self, size: int) -> list[int]:
        """The shape of what every group has ``size`` values of."""
        return each(self.groups, size)

    def runs(self) -> list[Unit]:
        """A unit of its own for every group."""
        return [self._replace(x=x, groups=1) for x in self.x.chunk(self.groups)]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What goes into the main branch, and what passes or goes into the projection."""
        return (self.x, self.x) if self.projection else (self.x[:, 1::2], self.x[:, ::2])


Chain = Callable[[Sequence[Tensor], int, int, int], tuple[Layer, ...]]


def shuffle_chain(weights: Sequence[Tensor], channels: int, mid: int, stride: int) -> tuple[Layer, ...]:
    """1x1 convolution to ``mid`` channels, depthwise convolution, 1x1 convolution."""
    pw1, dw, pw2 = weights
    return (
        Layer("pw1", pw1, mid, channels, False),
        Layer("dw", dw, mid, mid, True, stride),
        Layer("pw2", pw2, pw2.shape[0], mid, False),
    )


def xception_chain(weights: Sequence[Tensor], channels: int, mid: int, stride: int) -> tuple[Layer, ...]:
    """Three times a depthwise convolution and a 1x1 convolution."""
    dw1, pw1, dw2, pw2, dw3, pw3 = weights
    return (
        Layer("dw1", dw1, channels, channels, True, stride),
        Layer("pw1", pw1, mid, channels, False),
        Layer("dw2", dw2, mid, mid, True),
        Layer("pw2", pw2, mid, mid, False),
        Layer("dw3", dw3, mid, mid, True),
        Layer("pw3", pw3, pw3.shape[0], mid, False),
    )


NAMES: dict[Chain, tuple[str, ...]] = {
    shuffle_chain: ("pw1", "dw", "pw2"),
    xception_chain: ("dw1", "pw1", "dw2", "pw2", "dw3", "pw3"),
}


def make_unit(
    chain: Chain,
    x: Tensor,
    weights: Sequence[Tensor],
    projection: Projection,
    mid: int,
    stride: int,
    *,
    on_batch: bool,
    groups: int = 1,
) -> Unit:
    """The unit that an op's arguments describe.

    Args:
        chain: which unit.
        x, weights, projection, mid, stride, groups: the op's arguments.
        on_batch: whether it takes the variance of its batch, for which one pixel is too few.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, ``mid`` or ``stride`` out of range, groups of different sizes, or a
            single pixel.
    """
    proj_dw, proj_pw = projection
    named = [("x", x), *zip(NAMES[chain], weights, strict=True)]
    named += [(name, value) for name, value in (("proj_dw", proj_dw), ("proj_pw", proj_pw)) if value is not None]
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
        if value.dim() != 4:
            raise InputError(f"{name} must have 4 dimensions, got shape {list(value.shape)}")
    if (proj_dw is None) != (proj_pw is None):
        raise InputError("proj_dw and proj_pw: one of them is missing; a projection needs both")
    if not isinstance(stride, int) or stride not in (1, 2):
        raise InputError(f"stride must be 1 or 2, got {stride!r}")
    if proj_dw is None and stride != 1:
        raise InputError(f"stride must be 1 for a unit without projection, got {stride}")
    if proj_dw is None and x.shape[1] % 2:
        raise InputError(f"x must have an even number of channels, got shape {list(x.shape)}")
    check_groups(groups, x)
    channels = x.shape[1] if proj_dw is not None else x.shape[1] // 2
    beside: tuple[Layer, ...] = ()
    if proj_dw is not None and proj_pw is not None:
        beside = (
            Layer("proj_dw", proj_dw, channels, channels, True, stride),
            Layer("proj_pw", proj_pw, channels, channels, False),
        )
    unit = Unit(x, chain(weights, channels, mid, stride), beside, stride, groups)
    _check_weights(unit, mid, channels)
    _, _, height, width = unit.out_shape
    if on_batch and (x.numel() == 0 or unit.samples * height * width < 2):
        each = f" for {groups} groups" if groups > 1 else ""
        raise InputError(f"x must give at least two pixels, which a variance needs, got shape {list(x.shape)}{each}")
    if x.numel() == 0:
        raise InputError(f"x must hold at least one pixel, got shape {list(x.shape)}")
    return unit


def _check_weights(unit: Unit, mid: int, channels: int) -> None:
    last = unit.main[-1]
    stored = next(layer for layer in unit.main if not layer.depthwise).weight.shape[0]
    out = last.weight.shape[0]
    read = channels
    for layer in unit.main:
        made = read if layer.depthwise else out if layer is last else stored
        _check_weight(layer, made, read)
        read = made
    for layer in unit.projection:
        _check_weight(layer, channels, channels)
    if not 1 <= mid <= stored:
        raise InputError(f"mid must be from 1 to {stored}, the channels that are stored, got {mid}")


def _check_weight(layer: Layer, made: int, read: int) -> None:
    """Refuse a weight that is not stored for ``read`` channels in and ``made`` channels out."""
    shape = layer.weight.shape
    k = shape[2] if layer.depthwise else 1
    if shape != (made, 1 if layer.depthwise else read, k, k):
        wanted = [made, 1, k, k] if layer.depthwise else [made, read, 1, 1]
        raise InputError(f"{layer.name} must be {wanted} to fit the other arguments, got {list(shape)}")
    if k % 2 == 0:
        raise InputError(f"{layer.name} must have an odd kernel size, got {k}")


def check_vector(name: str, value: Tensor | None, unit: Unit, *, grouped: bool = False) -> None:
    """Refuse what is no floating-point vector with one entry for every normalised channel (grouped: of every group)."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}")
    wanted = unit.each(unit.normalised) if grouped else [unit.normalised]
    if list(value.shape) != wanted:
        raise InputError(f"{name} must be {wanted}, one entry a channel of every layer, got {list(value.shape)}")


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for the others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
