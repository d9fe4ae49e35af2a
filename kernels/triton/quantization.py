"""Fake quantization in Triton, the twin of kernels/cuda/fake_quant.cu, and what codes of activations share with it.

Values are [outer, channels, inner] in memory, one channel where all share a step. A program takes a chunk of the items
(what a channel has, outer * inner) for one block of channels. Which bit-width it is, and its step, are read on the
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spos_fast.kernels.matrix import chunking, tl_wide, wide
from spos_fast.ops.quantizers import MIN_STEP

LEAST_STEP = tl.constexpr(MIN_STEP)
# Adding it and taking it away leaves a number of at most 2^22 (2^51) rounded to nearest, ties to even.
ROUNDING = tl.constexpr(1.5 * 2**23)
WIDE_ROUNDING = tl.constexpr(1.5 * 2**52)
VALUES = 1024  # of a tile
SIZES = ["items", "per_chunk", "channels", "inner", "choices"]


@triton.jit
def code_range(bits, SIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Least and greatest code, and whether there are only these two, -1 and 1."""
    half = (1 << (bits - 1)).to(WIDE)
    if SIGNED:
        single = bits == 1
        return -half, tl.where(single, 1.0, half - 1).to(WIDE), single
    return half * 0, 2 * half - 1, bits < 0


@triton.jit
def effective_step(step, at, mask, high, PACT: tl.constexpr, WIDE: tl.constexpr):
    """The size of steps, from the parameters at these places."""
    size = tl.abs(tl.load(step + at, mask=mask, other=1.0))
    if PACT:
        size = ratio(size, high, WIDE)
    return tl.where(size < LEAST_STEP, LEAST_STEP, size).to(WIDE)


@triton.jit
def ratio(a, b, WIDE: tl.constexpr):
    """A quotient rounded to nearest; what "/" gives in float32 may be off by two units in the last place."""
    if tl.float64 == WIDE:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def code_of(position, low, high, single, SIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Positions clipped and rounded; a NaN stays one."""
    code = tl.where(position < low, low, tl.where(position > high, high, position))
    if tl.float64 == WIDE:
        code = (code + WIDE_ROUNDING) - WIDE_ROUNDING
    else:
        code = (code + ROUNDING) - ROUNDING
    if SIGNED:
        sign = tl.where(position >= 0, 1.0, tl.where(position < 0, -1.0, position))
        code = tl.where(single, sign, code).to(WIDE)
    return code


@triton.jit
def step_share(position, low, high, single, outside, SIGNED: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr):
    """What the gradient is multiplied by in the sum that becomes the step's.

    Outside that is the code: a bound, or NaN, which so shows in the gradient of the step.
    """
    clipped = tl.where(position >= high, high, tl.where(position <= low, low, position))
    if RESIDUAL:
        return tl.where(outside, clipped, code_of(position, low, high, single, SIGNED, WIDE) - position)
    else:
        return tl.where(outside, clipped, 0.0)


@triton.jit
def is_outside(position, low, high):
    """Where no gradient passes to the value: beyond the bounds, at them, and where there is a NaN."""
    return ~((position > low) & (position < high))


@triton.jit
def step_factor(high, values, PACT: tl.constexpr):
    """What that sum is multiplied by, in double; ``values`` share the step."""
    high = high.to(tl.float64)
    if PACT:
        return 1.0 / high
    else:
        return 1.0 / tl.sqrt(values.to(tl.float64) * high)


@triton.jit(do_not_specialize=SIZES)
def fake_quant_kernel(
    x, step, offset, bits, index, out, items, per_chunk, channels, inner, choices,
    PACT: tl.constexpr, SIGNED: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of items, block of channels). RUNS: a channel's values are runs of ``inner``; else single ones."""
    which = tl.load(index).to(tl.int32)
    low, high, single = code_range(tl.load(bits + which), SIGNED, WIDE)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    at = which * channels + channel
    size = effective_step(step, at, in_range, high, PACT, WIDE)[None, :]
    begin = tl.program_id(0).to(tl.int64) * per_chunk
    end = tl.minimum(begin + per_chunk, items)
    for first in range(begin, end, BLOCK_ITEMS):
        item = first + tl.arange(0, BLOCK_ITEMS)
        mask = (item < end)[:, None] & in_range[None, :]
        place = places(item, channel, channels, inner, RUNS)
        value = tl.load(x + place, mask=mask, other=0.0).to(WIDE)
        if offset is not None:
            value -= tl.load(offset + at, mask=in_range, other=0.0)[None, :]
        made = code_of(ratio(value, size, WIDE), low, high, single, SIGNED, WIDE) * size
        if offset is not None:
            made += tl.load(offset + at, mask=in_range, other=0.0)[None, :]
        tl.store(out + place, made.to(out.dtype.element_ty), mask=mask)


@triton.jit
def places(item, channel, channels, inner, RUNS: tl.constexpr):
    """Where values lie: of each channel the item-th."""
    rows, columns = item.to(tl.int64)[:, None], channel.to(tl.int64)[None, :]
    if RUNS:
        return rows // inner * inner * channels + rows % inner + columns * inner
    else:
        return rows * channels + columns


@triton.jit(do_not_specialize=SIZES)
def fake_quant_backward_kernel(
    grad, x, step, offset, bits, index, grad_x, partial, items, per_chunk, channels, inner, choices,
    PACT: tl.constexpr, RESIDUAL: tl.constexpr, SIGNED: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of items, block of channels). partial: [chunks, 2, channels], the sums of step and of offset."""
    which = tl.load(index).to(tl.int32)
    low, high, single = code_range(tl.load(bits + which), SIGNED, WIDE)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    at = which * channels + channel
    size = effective_step(step, at, in_range, high, PACT, WIDE)[None, :]
    begin = tl.program_id(0).to(tl.int64) * per_chunk
    end = tl.minimum(begin + per_chunk, items)
    of_step = tl.zeros([BLOCK_CHANNELS], WIDE)
    of_offset = tl.zeros([BLOCK_CHANNELS], WIDE)
    for first in range(begin, end, BLOCK_ITEMS):
        item = first + tl.arange(0, BLOCK_ITEMS)
        mask = (item < end)[:, None] & in_range[None, :]
        place = places(item, channel, channels, inner, RUNS)
        given = tl.load(grad + place, mask=mask, other=0.0).to(WIDE)
        value = tl.load(x + place, mask=mask, other=0.0).to(WIDE)
        if offset is not None:
            value -= tl.load(offset + at, mask=in_range, other=0.0)[None, :]
        position = ratio(value, size, WIDE)
        outside = is_outside(position, low, high)
        tl.store(grad_x + place, tl.where(outside, 0.0, given).to(grad_x.dtype.element_ty), mask=mask)
        share = given * step_share(position, low, high, single, outside, SIGNED, RESIDUAL, WIDE)
        of_step += tl.sum(tl.where(mask, share, 0.0), axis=0)
        of_offset += tl.sum(tl.where(outside, given, 0.0), axis=0)
    row = partial + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(row, of_step, mask=in_range)
    tl.store(row + channels, of_offset, mask=in_range)


@triton.jit(do_not_specialize=["chunks", "items", "channels", "choices"])
def finish_kernel(
    partial, step, offset, bits, index, grad_step, grad_offset, chunks, items, channels, choices,
    PACT: tl.constexpr, SIGNED: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of step and offset, [choices, channels], from what the chunks found; added in double."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    of_step = tl.zeros([BLOCK_CHANNELS], tl.float64)
    of_offset = tl.zeros([BLOCK_CHANNELS], tl.float64)
    for begin in range(0, chunks, BLOCK_CHUNKS):
        chunk = begin + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < chunks)[:, None] & in_range[None, :]
        place = partial + chunk.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        of_step += tl.sum(tl.load(place, mask=mask, other=0.0).to(tl.float64), axis=0)
        of_offset += tl.sum(tl.load(place + channels, mask=mask, other=0.0).to(tl.float64), axis=0)
    which = tl.load(index).to(tl.int32)
    _, high, _ = code_range(tl.load(bits + which), SIGNED, tl.float64)
    factor = step_factor(high, items, PACT)
    parameter = tl.load(step + which * channels + channel, mask=in_range, other=0.0)
    of_step *= tl.where(parameter < 0, -factor, factor)
    of_offset = of_offset * factor if offset is not None else of_offset * 0
    for choice in range(0, choices):
        chosen = choice == which
        at = choice * channels + channel
        tl.store(grad_step + at, tl.where(chosen, of_step, 0.0).to(grad_step.dtype.element_ty), mask=in_range)
        tl.store(grad_offset + at, tl.where(chosen, of_offset, 0.0).to(grad_step.dtype.element_ty), mask=in_range)


class Layout(NamedTuple):
    """How programs share values [outer, channels, inner].

    Attributes:
        items: outer * inner, what each channel has.
        channels: their number.
        inner: neighbouring values of one channel.
        block_items, block_channels: of a tile.
    """

    items: int
    channels: int
    inner: int
    block_items: int
    block_channels: int

    @property
    def runs(self) -> bool:
        """Whether a channel's values are runs of neighbours."""
        return self.inner > 1

    @property
    def columns(self) -> int:
        """Blocks of channels."""
        return triton.cdiv(self.channels, self.block_channels)


def layout(x: Tensor, axis: int) -> Layout:
    """Of dense values with one step for all (axis -1) or one a channel."""
    channels = 1 if axis < 0 else x.shape[axis]
    if channels == 1:
        return Layout(x.numel(), 1, x.numel(), VALUES, 1)
    inner = x.stride(axis)
    across = 1 if inner > 1 else min(64, triton.next_power_of_2(channels))
    return Layout(x.numel() // channels, channels, inner, VALUES // across, across)


def dense(x: Tensor) -> Tensor:
    """The values themselves if they are one run of memory, in whatever order of dimensions; else a copy that is."""
    like = torch.empty_like(x)
    return x if x.stride() == like.stride() else like.copy_(x)


def fake_quant(
    x: Tensor, step: Tensor, offset: Tensor | None, bits: Tensor, index: Tensor, mode: str, signed: bool, axis: int
) -> Tensor:
    """Launch the kernel on x's device; see spos_fast.ops.fake_quant, which checks the arguments."""
    x = dense(x)
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    shape = layout(x, axis)
    chunks, per_chunk = chunking(shape.items, shape.block_items, shape.columns)
    fake_quant_kernel[(chunks, shape.columns)](
        x, step.contiguous(), packed(offset), bits.contiguous(), index, out,
        shape.items, per_chunk, shape.channels, shape.inner, bits.shape[0],
        PACT=mode.startswith("pact"), SIGNED=signed, RUNS=shape.runs, WIDE=tl_wide(x),
        BLOCK_ITEMS=shape.block_items, BLOCK_CHANNELS=shape.block_channels,
    )  # fmt: skip
    return out


def fake_quant_backward(
    grad: Tensor, x: Tensor, step: Tensor, offset: Tensor | None, bits: Tensor, index: Tensor, mode: str, signed: bool,
    axis: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels on x's device: gradients of x, of ``step`` and of ``offset``."""
    x = dense(x)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(step), torch.zeros_like(step)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    step, offset, bits = step.contiguous(), packed(offset), bits.contiguous()
    shape, pact = layout(x, axis), mode.startswith("pact")
    chunks, per_chunk = chunking(shape.items, shape.block_items, shape.columns)
    partial = torch.empty((chunks, 2, shape.channels), dtype=wide(x), device=x.device)
    fake_quant_backward_kernel[(chunks, shape.columns)](
        grad, x, step, offset, bits, index, grad_x, partial,
        shape.items, per_chunk, shape.channels, shape.inner, bits.shape[0],
        PACT=pact, RESIDUAL=mode != "pact", SIGNED=signed, RUNS=shape.runs, WIDE=tl_wide(x),
        BLOCK_ITEMS=shape.block_items, BLOCK_CHANNELS=shape.block_channels,
    )  # fmt: skip
    grad_step, grad_offset = torch.empty_like(step), torch.empty_like(step)
    finish_kernel[(triton.cdiv(shape.channels, 16),)](
        partial, step, offset, bits, index, grad_step, grad_offset, chunks, shape.items, shape.channels, bits.shape[0],
        PACT=pact, SIGNED=signed, BLOCK_CHUNKS=32, BLOCK_CHANNELS=16,
    )  # fmt: skip
    return grad_x, grad_step, grad_offset


def packed(values: Tensor | None) -> Tensor | None:
    """Contiguous, if there is one."""
    return None if values is None else values.contiguous()
