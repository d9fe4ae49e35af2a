"""Codes of activations in Triton: the twin of kernels/cuda/quantize_codes.cu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spos_fast.kernels import merging
from spos_fast.kernels.matrix import activation, chunking, image, matrix, store_sums, tl_wide
from spos_fast.kernels.quantization import (
    VALUES,
    code_of,
    code_range,
    effective_step,
    finish_kernel,
    is_outside,
    packed,
    ratio,
    step_share,
)


@triton.jit
def store_step_kernel(step, bits, index, step_used, PACT: tl.constexpr, WIDE: tl.constexpr):
    """The step that quantize_codes_kernel, launched next, may turn into NaN."""
    which = tl.load(index).to(tl.int32)
    _, high, _ = code_range(tl.load(bits + which), False, WIDE)
    tl.store(step_used, effective_step(step, which, True, high, PACT, WIDE))


@triton.jit(do_not_specialize=["pixels", "rows", "channels", "x_distance"])
def quantize_codes_kernel(
    x, scale, shift, step, bits, index, codes, step_used, pixels, rows, channels, x_distance,
    PACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of pixels, block of channels). codes: [pixels, channels], 0 for a NaN, which the step becomes."""
    which = tl.load(index).to(tl.int32)
    low, high, single = code_range(tl.load(bits + which), False, WIDE)
    size = effective_step(step, which, True, high, PACT, WIDE)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)
    for first in range(begin, end, BLOCK_ITEMS):
        pixel = first + tl.arange(0, BLOCK_ITEMS)
        mask = (pixel < end)[:, None] & in_range[None, :]
        row = pixel.to(tl.int64)[:, None]
        value = tl.load(x + row * x_distance + channel[None, :], mask=mask, other=0.0).to(WIDE)
        value = activation(value, scale, shift, channel, in_range, False)
        code = code_of(ratio(value, size, WIDE), low, high, single, False, WIDE)
        missing = code != code
        tl.store(codes + row * channels + channel[None, :], tl.where(missing, 0.0, code).to(tl.uint8), mask=mask)
        # All who write it write the same.
        found = tl.max(tl.max((missing & mask).to(tl.int32), axis=1), axis=0)
        tl.store(step_used, float("nan"), mask=found > 0)


@triton.jit(do_not_specialize=["pixels", "rows", "channels", "x_distance", "grad_distance"])
def quantize_codes_backward_kernel(
    grad, x, scale, shift, step, bits, index, grad_x, partial, of_step, pixels, rows, channels, x_distance,
    grad_distance, PACT: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of pixels, block of channels).

    partial: [chunks, 2, channels], the sums of scale and shift; of_step: [programs, 2], those of the step and zeros, as
    finish_kernel takes them.
    """
    which = tl.load(index).to(tl.int32)
    low, high, single = code_range(tl.load(bits + which), False, WIDE)
    size = effective_step(step, which, True, high, PACT, WIDE)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_range = channel < channels
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)
    of_scale = tl.zeros([BLOCK_CHANNELS], WIDE)
    of_shift = tl.zeros([BLOCK_CHANNELS], WIDE)
    shares = tl.zeros([BLOCK_CHANNELS], WIDE)
    for first in range(begin, end, BLOCK_ITEMS):
        pixel = first + tl.arange(0, BLOCK_ITEMS)
        mask = (pixel < end)[:, None] & in_range[None, :]
        row = pixel.to(tl.int64)[:, None]
        given = tl.load(grad + row * grad_distance + channel[None, :], mask=mask, other=0.0).to(WIDE)
        value = tl.load(x + row * x_distance + channel[None, :], mask=mask, other=0.0).to(WIDE)
        position = ratio(activation(value, scale, shift, channel, in_range, False), size, WIDE)
        outside = is_outside(position, low, high)
        share = given * step_share(position, low, high, single, outside, False, RESIDUAL, WIDE)
        shares += tl.sum(tl.where(mask, share, 0.0), axis=0)
        passed = tl.where(outside, 0.0, given)
        of_scale += tl.sum(passed * value, axis=0)
        of_shift += tl.sum(passed, axis=0)
        if scale is not None:
            passed *= tl.load(scale + channel, mask=in_range, other=0.0)[None, :]
        tl.store(grad_x + row * channels + channel[None, :], passed.to(grad_x.dtype.element_ty), mask=mask)
    store_sums(partial, of_scale, of_shift, channels, channel, in_range)
    program = of_step + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(program, tl.sum(shares, axis=0))
    tl.store(program + 1, 0.0)


def quantize_codes(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, step: Tensor, bits: Tensor, index: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on x's device; see spos_fast.ops.quant_codes, which checks the arguments."""
    rows = matrix(x)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    step_used = torch.empty((), dtype=step.dtype, device=x.device)
    step, bits, pact = step.contiguous(), bits.contiguous(), mode.startswith("pact")
    store_step_kernel[(1,)](step, bits, index, step_used, PACT=pact, WIDE=tl_wide(x))
    across = min(64, triton.next_power_of_2(x.shape[1]))
    columns = triton.cdiv(x.shape[1], across)
    chunks, per_chunk = chunking(rows.shape[0], VALUES // across, columns)
    quantize_codes_kernel[(chunks, columns)](
        rows, packed(scale), packed(shift), step, bits, index, codes, step_used,
        rows.shape[0], per_chunk, x.shape[1], rows.stride(0),
        PACT=pact, WIDE=tl_wide(x), BLOCK_ITEMS=VALUES // across, BLOCK_CHANNELS=across,
    )  # fmt: skip
    return codes, step_used


def quantize_codes_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, step: Tensor, bits: Tensor, index: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels on x's device: gradients of x, of ``step``, of ``scale`` and of ``shift``."""
    pixel_rows, grad_rows, channels = matrix(x), matrix(grad), x.shape[1]
    pixels, pact = pixel_rows.shape[0], mode.startswith("pact")
    grad_x = image(x, channels, *x.shape[2:])
    step, bits = step.contiguous(), bits.contiguous()
    across = min(64, triton.next_power_of_2(channels))
    columns = triton.cdiv(channels, across)
    chunks, per_chunk = chunking(pixels, VALUES // across, columns)
    found = merging.sums(x, channels, chunks, per_chunk, pixels)
    of_step = torch.empty((chunks * columns, 2), dtype=step.dtype, device=x.device)
    quantize_codes_backward_kernel[(chunks, columns)](
        grad_rows, pixel_rows, packed(scale), packed(shift), step, bits, index, grad_x, found.first, of_step,
        pixels, per_chunk, channels, pixel_rows.stride(0), grad_rows.stride(0),
        PACT=pact, RESIDUAL=mode != "pact", WIDE=tl_wide(x), BLOCK_ITEMS=VALUES // across, BLOCK_CHANNELS=across,
    )  # fmt: skip
    grad_step, unused = torch.empty_like(step), torch.empty_like(step)
    finish_kernel[(1,)](
        of_step, step, None, bits, index, grad_step, unused, chunks * columns, x.numel(), 1, bits.shape[0],
        PACT=pact, SIGNED=False, BLOCK_CHUNKS=32, BLOCK_CHANNELS=16,
    )  # fmt: skip
    if scale is None:
        return grad_x, grad_step, step.new_zeros(channels), step.new_zeros(channels)
    return grad_x, grad_step, *merging.merge_sums(found, channels, None)
