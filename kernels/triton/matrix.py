"""What the kernels of the building blocks share: images as matrices, tiles of them, and arithmetic on a tile.

A channels-last image is a matrix of pixels x channels. A kernel's program walks a chunk of its rows, BLOCK_PIXELS rows
at a time, for one block of columns. How many chunks there are depends on sizes alone, so every GPU gives the same bits.

Passes forwards take several groups at once: runs of equally many rows with statistics, scale and shift of their own.
The grid's third axis is the group. Chunks are those of a group alone, and so are its bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # about what fills a GPU of 132 processors


class Input(NamedTuple):
    """What a convolution reads: channels first, first + step, ... of data, normalised and clipped on load.

    Attributes:
        data: [groups * pixels, ...], rows of unit distance between channels.
        scale, shift: [channels], or [groups, channels], in the statistics' dtype, or None: applied in this order.
        relu: whether ReLU follows.
        channels: how many the sizes provide for.
        width: how many of them are used, int32 [] on the device; None for all.
        first, step: which channels of data.
        groups: runs of rows that data holds.
    """

    data: Tensor
    scale: Tensor | None
    shift: Tensor | None
    relu: bool
    channels: int
    width: Tensor | None
    first: int = 0
    step: int = 1
    groups: int = 1


class Output(NamedTuple):
    """What a layer made, seen from the backward pass: all that its dz is computed from on load.

    Attributes:
        grad: [pixels, channels], the gradient behind batch norm (and ReLU, if relu).
        z: [pixels, channels], the convolution's output.
        norm: [5, channels], see convolution_gradient.
        channels, width: as of Input.
    """

    grad: Tensor
    z: Tensor
    norm: Tensor
    relu: bool
    channels: int
    width: Tensor | None


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums over x: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tl_wide(x: Tensor) -> tl.dtype:
    """The same as Triton names it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def matrix(x: Tensor) -> Tensor:
    """[N, C, H, W] as a view [N * H * W, C] whose rows have one distance.

    Packed channels-last images and slices of their channels lie so already; anything else is copied.
    """
    samples, channels, height, width = x.shape
    distance = (
        x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0) if samples > 1 else max(channels, 1)
    )
    # Strides of dimensions of one element say nothing.
    regular = (
        (channels == 1 or x.stride(1) == 1)
        and (height == 1 or x.stride(2) == width * distance)
        and (samples == 1 or x.stride(0) == height * width * distance)
    )
    if not regular:
        x, distance = x.contiguous(memory_format=torch.channels_last), channels
    return x.as_strided((samples * height * width, channels), (distance, 1))


def image(x: Tensor, channels: int, height: int, width: int, zeros: bool = False) -> Tensor:
    """A new channels-last [N, channels, height, width] with the samples, dtype and device of x."""
    size = (x.shape[0], channels, height, width)
    new = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return new.zero_() if zeros else new


def multiple(*sizes: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all sizes: how many neighbours the kernels may load at once.

    It is all of the sizes that kernels are compiled for.
    """
    return next(step for step in (8, 4, 2, 1) if all(size % step == 0 for size in sizes))


def chunking(pixels: int, block: int, columns: int) -> tuple[int, int]:
    """(chunks, rows of a chunk) for programs of ``columns`` column blocks."""
    tiles = triton.cdiv(pixels, block)
    tiles_per_chunk = triton.cdiv(tiles, max(1, PROGRAMS // columns))
    return triton.cdiv(tiles, tiles_per_chunk), tiles_per_chunk * block


def distance_of_groups(groups: int, *vectors: Tensor | None) -> int | None:
    """Elements from one group's row to the next in vectors [groups, channels], the same in all; None for one group."""
    if groups == 1:
        return None
    return next((vector.stride(0) for vector in vectors if vector is not None), 0)


@triton.jit
def row_of_group(group_distance):
    """Where vectors [groups, channels] have the row of this program's group."""
    return 0 if group_distance is None else tl.program_id(2) * group_distance


@triton.jit
def chunk_of_group(rows, pixels, group_distance):
    """Where this program's chunk begins and ends in its group's ``pixels`` rows."""
    first = 0 if group_distance is None else tl.program_id(2) * pixels
    begin = first + tl.program_id(0) * rows
    return begin, tl.minimum(begin + rows, first + pixels)


@triton.jit
def known(size, MULTIPLE: tl.constexpr):
    """The size itself, which MULTIPLE divides: written so that the compiler knows."""
    return size // MULTIPLE * MULTIPLE


@triton.jit
def present(channels, width):
    """How many channels are there: what ``width`` in device memory says, if there is one."""
    if width is not None:
        channels = tl.minimum(channels, tl.load(width))
    return channels


@triton.jit
def activation(a, scale, shift, column, mask, RELU: tl.constexpr):
    """A tile normalised: scale * a + shift (each if there is one), then ReLU, which lets NaN through."""
    if scale is not None:
        a *= tl.load(scale + column, mask=mask, other=0.0)[None, :]
    if shift is not None:
        a += tl.load(shift + column, mask=mask, other=0.0)[None, :]
    if RELU:
        a = tl.where(a < 0, 0.0, a)
    return a


@triton.jit
def convolution_gradient(grad, z, norm, channels, column, mask, RELU: tl.constexpr):
    """The dz of a tile, from the gradient behind batch norm (and ReLU): scale * (grad - offset - slope * (z - mean)).

    norm: [5, channels], the rows scale, shift, mean, offset and slope.
    """
    norm += column
    scale = tl.load(norm, mask=mask, other=0.0)[None, :]
    if RELU:
        shift = tl.load(norm + channels, mask=mask, other=0.0)[None, :]
        grad = tl.where(scale * z + shift > 0, grad, 0.0)
    mean = tl.load(norm + 2 * channels, mask=mask, other=0.0)[None, :]
    offset = tl.load(norm + 3 * channels, mask=mask, other=0.0)[None, :]
    slope = tl.load(norm + 4 * channels, mask=mask, other=0.0)[None, :]
    return scale * (grad - offset - slope * (z - mean))


@triton.jit
def add_moments(count, pivot, mean, m2, tile, row_mask, n):
    """Count, mean and second moment of each column, with n further rows of a tile (those of row_mask).

    The mean is kept in two parts, pivot + mean, with the pivot (the first tile's mean) near the values: a mean far
    from zero then costs the second moment no digits.
    """
    tile = tl.where(row_mask[:, None], tile, 0.0)
    pivot = tl.where(count > 0, pivot, tl.sum(tile, axis=0) / n)
    tile = tl.where(row_mask[:, None], tile - pivot[None, :], 0.0)
    centre = tl.sum(tile, axis=0) / n
    residual = tl.where(row_mask[:, None], tile - centre[None, :], 0.0)
    # Chan, Golub and LeVeque, 1979.
    total = count + n
    delta = centre - mean
    mean += delta * (n / total)
    m2 += tl.sum(residual * residual, axis=0) + delta * delta * (count * n / total)
    return total, pivot, mean, m2


@triton.jit
def add_sums(total, product, gradient, a, centre, column, mask, row_mask):
    """Sums over rows of a gradient and of it times (a - centre), with those of a tile."""
    gradient = tl.where(row_mask[:, None], gradient, 0.0)
    distance = a - tl.load(centre + column, mask=mask, other=0.0)[None, :]
    total += tl.sum(gradient, axis=0)
    product += tl.sum(gradient * distance, axis=0)
    return total, product


@triton.jit
def store_sums(partial, total, product, channels, column, mask):
    """Both sums of each column as this program's rows of partial, [chunks, 2, channels]."""
    out = partial + tl.program_id(0).to(tl.int64) * 2 * channels + column
    tl.store(out, total, mask=mask)
    tl.store(out + channels, product, mask=mask)


@triton.jit
def store_moments(partial, pivot, mean, m2, channels, column, mask):
    """Moments of each column as this program's rows of partial, [groups * chunks, 3, channels]."""
    chunk = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    out = partial + chunk * 3 * channels + column
    tl.store(out, mean, mask=mask)
    tl.store(out + channels, m2, mask=mask)
    tl.store(out + 2 * channels, pivot, mask=mask)
