"""The end of a residual block in Triton: the twin of kernels/cuda/bn_add_relu.cu.

Images are packed channels last: groups of pixels x channels. Chunks are those of a group alone, and so are its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spos_fast.kernels.matrix import (
    activation,
    chunk_of_group,
    chunking,
    distance_of_groups,
    image,
    known,
    multiple,
    row_of_group,
    tl_wide,
)

PIXELS, CHANNELS = 32, 64  # of a tile
FINISH_CHUNKS, FINISH_CHANNELS = 32, 16


@triton.jit(do_not_specialize=["pixels", "channels", "group_distance"])
def add_relu_kernel(
    x, scale, shift, residual, residual_scale, residual_shift, out, pixels, channels, group_distance,
    MULTIPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (block of a group's pixels, block of channels, group)."""
    channels = known(channels, MULTIPLE)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    row = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    mask = (row < pixels)[:, None] & in_range[None, :]
    if group_distance is not None:
        row += tl.program_id(2).to(tl.int64) * pixels
    place = row[:, None] * channels + channel[None, :]
    own = row_of_group(group_distance) + channel
    value = activation(tl.load(x + place, mask=mask).to(WIDE), scale, shift, own, in_range, False)
    added = tl.load(residual + place, mask=mask).to(WIDE)
    if residual_scale is not None:
        added = activation(added, residual_scale, residual_shift, own, in_range, False)
    value += added
    tl.store(out + place, tl.where(value < 0, 0.0, value).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "rows", "channels", "group_distance"])
def add_relu_backward_kernel(
    grad, out, x, scale, residual, residual_scale, grad_x, grad_residual, partial, pixels, rows, channels,
    group_distance, MULTIPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a group's pixels, block of channels, group).

    partial: [chunks, 3, groups * channels], the sums of scale, shift and the shortcut's scale; of a plain shortcut
    [chunks, 2, ...].
    """
    channels = known(channels, MULTIPLE)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    own = row_of_group(group_distance) + channel
    slope = tl.load(scale + own, mask=in_range, other=0.0)[None, :]
    if residual_scale is not None:
        residual_slope = tl.load(residual_scale + own, mask=in_range, other=0.0)[None, :]
    begin, end = chunk_of_group(rows, pixels, group_distance)
    of_scale = tl.zeros([BLOCK_CHANNELS], WIDE)
    of_shift = tl.zeros([BLOCK_CHANNELS], WIDE)
    of_residual_scale = tl.zeros([BLOCK_CHANNELS], WIDE)
    for first in range(begin, end, BLOCK_PIXELS):
        row = first + tl.arange(0, BLOCK_PIXELS)
        mask = (row < end)[:, None] & in_range[None, :]
        place = row.to(tl.int64)[:, None] * channels + channel[None, :]
        made = tl.load(out + place, mask=mask, other=0.0).to(WIDE)
        # Where out is NaN the gradient passes.
        passed = tl.where(made <= 0, 0.0, tl.load(grad + place, mask=mask, other=0.0).to(WIDE))
        of_shift += tl.sum(passed, axis=0)
        of_scale += tl.sum(passed * tl.load(x + place, mask=mask, other=0.0).to(WIDE), axis=0)
        tl.store(grad_x + place, (passed * slope).to(grad_x.dtype.element_ty), mask=mask)
        if residual_scale is not None:
            added = tl.load(residual + place, mask=mask, other=0.0).to(WIDE)
            of_residual_scale += tl.sum(passed * added, axis=0)
            passed *= residual_slope
        tl.store(grad_residual + place, passed.to(grad_residual.dtype.element_ty), mask=mask)
    columns = tl.num_programs(2) * channels
    sums = 2 if residual_scale is None else 3
    to = partial + tl.program_id(0).to(tl.int64) * sums * columns + own
    tl.store(to, of_scale, mask=in_range)
    tl.store(to + columns, of_shift, mask=in_range)
    if residual_scale is not None:
        tl.store(to + 2 * columns, of_residual_scale, mask=in_range)


@triton.jit(do_not_specialize=["chunks", "columns"])
def finish_kernel(
    partial, grad_scale, grad_shift, grad_residual_scale, chunks, columns,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What the chunks found, added in double. Program (block of columns): of all groups' channels."""
    column = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = column < columns
    of_scale = tl.zeros([BLOCK_CHANNELS], tl.float64)
    of_shift = tl.zeros([BLOCK_CHANNELS], tl.float64)
    of_residual_scale = tl.zeros([BLOCK_CHANNELS], tl.float64)
    sums = 2 if grad_residual_scale is None else 3
    for begin in range(0, chunks, BLOCK_CHUNKS):
        chunk = begin + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < chunks)[:, None] & in_range[None, :]
        place = partial + chunk.to(tl.int64)[:, None] * sums * columns + column[None, :]
        of_scale += tl.sum(tl.load(place, mask=mask, other=0.0).to(tl.float64), axis=0)
        of_shift += tl.sum(tl.load(place + columns, mask=mask, other=0.0).to(tl.float64), axis=0)
        if grad_residual_scale is not None:
            of_residual_scale += tl.sum(tl.load(place + 2 * columns, mask=mask, other=0.0).to(tl.float64), axis=0)
    tl.store(grad_scale + column, of_scale, mask=in_range)
    tl.store(grad_shift + column, of_shift, mask=in_range)
    if grad_residual_scale is not None:
        tl.store(grad_residual_scale + column, of_residual_scale, mask=in_range)


def bn_add_relu(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Launch the kernel on x's device; see spos_fast.ops.bn_add_relu, which checks the arguments."""
    x, residual = packed(x), packed(residual)
    channels, pixels = x.shape[1], pixels_of_group(x, groups)
    scale, shift = scale.contiguous(), shift.contiguous()
    if residual_scale is not None and residual_shift is not None:
        residual_scale, residual_shift = residual_scale.contiguous(), residual_shift.contiguous()
    out = image(x, channels, *x.shape[2:])
    add_relu_kernel[(triton.cdiv(pixels, PIXELS), triton.cdiv(channels, CHANNELS), groups)](
        x, scale, shift, residual, residual_scale, residual_shift, out,
        pixels, channels, distance_of_groups(groups, scale),
        MULTIPLE=multiple(channels), WIDE=tl_wide(x), BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def bn_add_relu_backward(
    grad: Tensor, out: Tensor, x: Tensor, scale: Tensor, residual: Tensor, residual_scale: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels on x's device: gradients of x, residual, scale, shift and residual_scale (empty without one).

    A plain shortcut's residual is not read.
    """
    grad, out, x = packed(grad), packed(out), packed(x)
    channels, pixels, scale = x.shape[1], pixels_of_group(x, groups), scale.contiguous()
    projected = residual_scale is not None
    grad_x, grad_residual = (image(x, channels, *x.shape[2:]) for _ in range(2))
    columns = triton.cdiv(channels, CHANNELS)
    chunks, rows = chunking(pixels, PIXELS, columns)
    partial = torch.empty((chunks, 3 if projected else 2, *scale.shape), dtype=scale.dtype, device=x.device)
    add_relu_backward_kernel[(chunks, columns, groups)](
        grad, out, x, scale, packed(residual) if projected else None,
        residual_scale.contiguous() if residual_scale is not None else None, grad_x, grad_residual, partial,
        pixels, rows, channels, distance_of_groups(groups, scale),
        MULTIPLE=multiple(channels), WIDE=tl_wide(x), BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS,
    )  # fmt: skip
    grad_scale, grad_shift = torch.empty_like(scale), torch.empty_like(scale)
    grad_residual_scale = torch.empty_like(scale) if projected else scale.new_empty(0)
    finish_kernel[(triton.cdiv(scale.numel(), FINISH_CHANNELS),)](
        partial, grad_scale, grad_shift, grad_residual_scale if projected else None, chunks, scale.numel(),
        BLOCK_CHUNKS=FINISH_CHUNKS, BLOCK_CHANNELS=FINISH_CHANNELS,
    )  # fmt: skip
    return grad_x, grad_residual, grad_scale, grad_shift, grad_residual_scale


def packed(x: Tensor) -> Tensor:
    """The image without gaps, channels last."""
    return x.contiguous(memory_format=torch.channels_last)


def pixels_of_group(x: Tensor, groups: int) -> int:
    """How many a group has."""
    samples, _, height, width = x.shape
    return samples // groups * height * width
