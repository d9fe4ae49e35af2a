"""The last batch norm of a block, its ReLU and the concatenation in one pass; and the sums its gradient needs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spos_fast.kernels import merging
from spos_fast.kernels.matrix import (
    activation,
    add_sums,
    chunking,
    distance_of_groups,
    known,
    multiple,
    row_of_group,
    store_sums,
    tl_wide,
)

PIXELS, CHANNELS = 32, 64  # of a tile


@triton.jit(
    do_not_specialize=[
        "pixels",
        "channels",
        "other_channels",
        "z_distance",
        "other_distance",
        "out_distance",
        "group_distance",
    ]
)
def concatenate_kernel(
    z, scale, shift, other, other_scale, other_shift, out,
    pixels, channels, other_channels, z_distance, other_distance, out_distance, group_distance,
    STEP: tl.constexpr, RELU: tl.constexpr, MULTIPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (block of a group's pixels, block of output columns, group): every STEP-th column of other, then those
    made from z.
    """
    channels, other_channels = known(channels, MULTIPLE), known(other_channels, MULTIPLE)
    z_distance, other_distance = known(z_distance, MULTIPLE), known(other_distance, MULTIPLE)
    out_distance = known(out_distance, MULTIPLE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    row_mask = (row < pixels)[:, None]
    if group_distance is not None:
        row += tl.program_id(2).to(tl.int64) * pixels
    own = row_of_group(group_distance)
    out_row = out + row[:, None] * out_distance
    block = tl.program_id(1)
    other_blocks = tl.cdiv(other_channels, BLOCK_CHANNELS)
    if block < other_blocks:
        column = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        mask = row_mask & (column < other_channels)[None, :]
        beside = tl.load(other + row[:, None] * other_distance + column[None, :] * STEP, mask=mask)
        if other_shift is not None:
            beside = activation(beside.to(WIDE), other_scale, other_shift, own + column, column < other_channels, RELU)
        tl.store(out_row + column[None, :], beside.to(out.dtype.element_ty), mask=mask)
    else:
        column = (block - other_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        mask = row_mask & (column < channels)[None, :]
        made = tl.load(z + row[:, None] * z_distance + column[None, :], mask=mask).to(WIDE)
        made = activation(made, scale, shift, own + column, column < channels, RELU)
        tl.store(out_row + other_channels + column[None, :], made.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "rows", "channels", "grad_distance", "z_distance"])
def sums_kernel(
    grad, z, scale, shift, mean, partial,
    pixels, rows, channels, grad_distance, z_distance,
    RELU: tl.constexpr, MULTIPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of rows, block of columns): sums of the gradient behind ReLU's mask and of it times (z - mean)."""
    channels = known(channels, MULTIPLE)
    grad_distance, z_distance = known(grad_distance, MULTIPLE), known(z_distance, MULTIPLE)
    column = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    column_mask = column < channels
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)
    total = tl.zeros([BLOCK_CHANNELS], WIDE)
    product = tl.zeros([BLOCK_CHANNELS], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        row = start + tl.arange(0, BLOCK_PIXELS)
        row_mask = row < pixels
        row64 = row.to(tl.int64)[:, None]
        mask = row_mask[:, None] & column_mask[None, :]
        g = tl.load(grad + row64 * grad_distance + column[None, :], mask=mask, other=0.0).to(WIDE)
        value = tl.load(z + row64 * z_distance + column[None, :], mask=mask, other=0.0).to(WIDE)
        if RELU:
            g = tl.where(activation(value, scale, shift, column, column_mask, False) > 0, g, 0.0)
        total, product = add_sums(total, product, g, value, mean, column, column_mask, row_mask)
    store_sums(partial, total, product, channels, column, column_mask)


def concatenate(
    z: Tensor, scale: Tensor, shift: Tensor, other: Tensor | None, other_scale: Tensor | None,
    other_shift: Tensor | None, relu: bool, out: Tensor, groups: int = 1,
) -> None:  # fmt: skip
    """Fill out with scale * z + shift (behind ReLU), after the even columns of other, or after all of it likewise.

    Scales and shifts are [channels], of several groups [groups, channels] with the same distance between rows.
    """
    pixels, channels = z.shape[0] // groups, z.shape[1]
    step = 1 if other_shift is not None else 2
    other_channels = 0 if other is None else triton.cdiv(other.shape[1], step)
    distances = z.stride(0), 0 if other is None else other.stride(0), out.stride(0)
    columns = triton.cdiv(channels, CHANNELS) + triton.cdiv(other_channels, CHANNELS)
    concatenate_kernel[(triton.cdiv(pixels, PIXELS), columns, groups)](
        z, scale, shift, z if other is None else other, other_scale, other_shift, out,
        pixels, channels, other_channels, *distances, distance_of_groups(groups, scale),
        STEP=step, RELU=relu, MULTIPLE=multiple(channels, other_channels, *distances), WIDE=tl_wide(z),
        BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS,
    )  # fmt: skip


def sums(
    grad: Tensor, z: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor, relu: bool
) -> merging.Partial:
    """Sums over pixels of grad, [pixels, channels], behind ReLU's mask, and of it times (z - mean)."""
    pixels, channels = z.shape
    columns = triton.cdiv(channels, CHANNELS)
    chunks, rows = chunking(pixels, PIXELS, columns)
    found = merging.sums(z, channels, chunks, rows, pixels)
    sums_kernel[(chunks, columns)](
        grad, z, scale, shift, mean, found.first,
        pixels, rows, channels, grad.stride(0), z.stride(0),
        RELU=relu, MULTIPLE=multiple(channels, grad.stride(0), z.stride(0)), WIDE=tl_wide(z),
        BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS,
    )  # fmt: skip
    return found
