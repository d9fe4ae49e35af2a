"""Convolution of codes in Triton: an implicit matrix product of int8 on the tensor cores, with sums in int32.

Rows are output pixels, columns output channels, and the depth is the kernel's taps times the input channels. The sums
are exact; the epilogue multiplies them once by the product of the steps and may take the statistics of what it stores.

Codes of 8 bits are moved to where int8 holds them, and what that takes away is put back behind the product; the loops
for it run with 8 bits only. Unsigned codes a of activations become a - 128, and 128 times the sum of the weights' codes
is due; DoReFa's odd codes become half of one less, and half the sum of the activations' codes is due.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from spos_fast.kernels import merging
from spos_fast.kernels.matrix import add_moments, chunking, known, matrix, store_moments, tl_wide
from spos_fast.ops.quant_codes import quantize_codes, weight_codes

LAST = torch.channels_last
OPTIONS = {"num_warps": 8, "num_stages": 3}
SUM_OPTIONS = {"BLOCK_PIXELS": 64, "BLOCK_IN": 32, "num_warps": 8, "num_stages": 1}
SIZES = [
    "pixels", "rows", "channels_in", "channels_out", "height", "width", "out_height", "out_width", "taps",
    "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x", "dilation_y", "dilation_x",
]  # fmt: skip


@triton.jit
def first_tap(row, out_height, out_width, stride_y, stride_x, padding_y, padding_x):
    """Sample, y and x of what lies under an output pixel's first tap; maybe outside of the image."""
    y = row // out_width % out_height * stride_y - padding_y
    return row // (out_width * out_height), y, row % out_width * stride_x - padding_x


@triton.jit
def input_tile(
    codes, sample, y, x, row_mask, k, blocks_in, channels_in, height, width, kernel_width, dilation_y, dilation_x,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """The k-th tile of the depth, of one tap some channels; zero for what is not there."""
    tap, j = k // blocks_in, k % blocks_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    y += tap // kernel_width * dilation_y
    x += tap % kernel_width * dilation_x
    inside = row_mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = (sample.to(tl.int64) * height + y) * width + x
    mask = inside[:, None] & (j < channels_in)[None, :]
    return tl.load(codes + pixel[:, None] * channels_in + j[None, :], mask=mask, other=0)


@triton.jit
def weight_tile(weight, column, column_mask, k, blocks_in, channels_in, taps, BLOCK_IN: tl.constexpr):
    """The same of the weights, [depth, columns]; zero for channels that are not there."""
    tap, j = k // blocks_in, k % blocks_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    place = (column.to(tl.int64) * taps + tap)[None, :] * channels_in + j[:, None]
    return tl.load(weight + place, mask=(j < channels_in)[:, None] & column_mask[None, :], other=0)


@triton.jit(do_not_specialize=SIZES)
def sum_codes_kernel(
    codes, weight_bits, weight_index, sums, pixels, rows, channels_in, channels_out, height, width, out_height,
    out_width, taps, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """With weights of 8 bits the sum of the codes under each output pixel, int32 [pixels]; else nothing."""
    if tl.load(weight_bits + tl.load(weight_index)) != 8:
        return
    row = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    sample, y, x = first_tap(row, out_height, out_width, stride_y, stride_x, padding_y, padding_x)
    blocks_in = tl.cdiv(channels_in, BLOCK_IN)
    total = tl.zeros([BLOCK_PIXELS], tl.int32)
    for k in range(0, taps * blocks_in):
        a = input_tile(
            codes, sample, y, x, row < pixels, k, blocks_in, channels_in, height, width, kernel_width, dilation_y,
            dilation_x, BLOCK_IN,
        )  # fmt: skip
        total += tl.sum(a.to(tl.int32), axis=1)
    tl.store(sums + row, total, mask=row < pixels)


@triton.jit(do_not_specialize=SIZES)
def convolve_kernel(
    codes, weight, step, scale, bias, sums, act_bits, act_index, weight_bits, weight_index, out, partial,
    pixels, rows, channels_in, channels_out, height, width, out_height, out_width, taps,
    kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    MULTIPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Program (chunk of output pixels, block of output channels).

    codes: uint8 [pixels, channels_in]; weight: int8 [channels_out, taps, channels_in]; sums: what sum_codes_kernel
    made, for DoReFa's weights. With partial: also mean and second moment of the chunk's columns.
    """
    channels_in, channels_out = known(channels_in, MULTIPLE), known(channels_out, MULTIPLE)
    moved = tl.load(act_bits + tl.load(act_index)) == 8
    flip = tl.where(moved, 128, 0).to(tl.uint8)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column_mask = column < channels_out
    if sums is not None:
        halved = tl.load(weight_bits + tl.load(weight_index)) == 8
    # A NaN among activations or weights is in their step or scale.
    unit = tl.load(scale + column, mask=column_mask, other=0.0) * tl.load(step)
    blocks_in = tl.cdiv(channels_in, BLOCK_IN)
    depth = taps * blocks_in

    of_weights = tl.zeros([BLOCK_OUT], tl.int32)
    if moved:
        for k in tl.range(0, depth, num_stages=1):
            w = weight_tile(weight, column, column_mask, k, blocks_in, channels_in, taps, BLOCK_IN)
            of_weights += tl.sum(w.to(tl.int32), axis=0)

    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)
    count = tl.zeros([BLOCK_OUT], WIDE)
    pivot = tl.zeros([BLOCK_OUT], WIDE)
    mean = tl.zeros([BLOCK_OUT], WIDE)
    m2 = tl.zeros([BLOCK_OUT], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        row = start + tl.arange(0, BLOCK_PIXELS)
        row_mask = row < end
        sample, y, x = first_tap(row, out_height, out_width, stride_y, stride_x, padding_y, padding_x)
        sum_ = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], tl.int32)
        for k in range(0, depth):
            a = input_tile(
                codes, sample, y, x, row_mask, k, blocks_in, channels_in, height, width, kernel_width, dilation_y,
                dilation_x, BLOCK_IN,
            )  # fmt: skip
            a = (a ^ flip).to(tl.int8, bitcast=True)  # a - 128
            w = weight_tile(weight, column, column_mask, k, blocks_in, channels_in, taps, BLOCK_IN)
            sum_ = tl.dot(a, w, sum_, out_dtype=tl.int32)
        value = (sum_ + 128 * of_weights[None, :]).to(WIDE)
        if sums is not None:
            value += 0.5 * tl.load(sums + row, mask=row_mask & halved, other=0).to(WIDE)[:, None]
        value *= unit[None, :]
        if bias is not None:
            value += tl.load(bias + column, mask=column_mask, other=0.0).to(WIDE)[None, :]
        stored = value.to(out.dtype.element_ty)
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * channels_out + column[None, :], stored, mask=mask)
        if partial is not None:
            n = tl.minimum(end - start, BLOCK_PIXELS).to(WIDE)
            count, pivot, mean, m2 = add_moments(count, pivot, mean, m2, stored.to(WIDE), row_mask, n)
    if partial is not None:
        store_moments(partial, pivot, mean, m2, channels_out, column, column_mask)


def blocks(channels_in: int, channels_out: int, multiple: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a tile of the product: small where values are loaded one by one."""
    if multiple < 16:
        return 64, 32, 32
    return 64, 32 if channels_out <= 32 else 64, 32 if channels_in <= 32 else 64


def _multiple(*sizes: int) -> int:
    """The largest power of two up to 16, the bytes of a load, that divides all sizes."""
    return next(step for step in (16, 8, 4, 2, 1) if all(size % step == 0 for size in sizes))


def quant_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act_step: Tensor,
    act_bits: Tensor, act_index: Tensor, act_mode: str, weight_step: Tensor | None, weight_bits: Tensor,
    weight_index: Tensor, weight_mode: str, per_channel: bool, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantize both and convolve their codes, on the device of x; see spos_fast.ops.quant_conv2d for the arguments.

    With groups the convolution is PyTorch's, on codes as floats.
    """
    codes, step = quantize_codes(x, scale, shift, act_step, act_bits, act_index, act_mode)
    filters, unit = weight_codes(weight, weight_step, weight_bits, weight_index, weight_mode, per_channel)
    if groups > 1:
        out = _grouped(codes, filters, unit * step, bias, weight_bits, weight_index, weight_mode, x.dtype,
                       stride, padding, dilation, groups)  # fmt: skip
        found = None
        if statistics:
            mean, m2 = torch.ops.spos_fast.bn_moments(out, 1)
            return out, mean[0], m2[0], codes, step
    else:
        out, found = convolve(codes, filters, step, unit, bias, act_bits, act_index, weight_bits, weight_index,
                              weight_mode, x.dtype, stride, padding, dilation, statistics)  # fmt: skip
    if found is None:
        return out, step.new_empty(0), step.new_empty(0), codes, step
    return out, *merging.merge_moments(found, weight.shape[0], None), codes, step


def convolve(
    codes: Tensor, filters: Tensor, step: Tensor, scale: Tensor, bias: Tensor | None, act_bits: Tensor,
    act_index: Tensor, weight_bits: Tensor, weight_index: Tensor, weight_mode: str, dtype: torch.dtype,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], statistics: bool,
) -> tuple[Tensor, merging.Partial | None]:  # fmt: skip
    """The product of codes and filters in steps of step * scale, plus the bias: the image, and moments of its chunks.

    Args:
        codes: uint8 [N, C, H, W], packed, channels last.
        filters: int8 [C_out, C, kh, kw].
        step, scale: [] and [C_out], float32 (float64).
        bias: [C_out] or None.
        act_bits, act_index, weight_bits, weight_index, weight_mode: whether codes are of 8 bits, and how those were
            moved.
        dtype: of the result.
        stride, padding, dilation: vertical and horizontal.
        statistics: whether to take moments.
    """
    samples, channels, height, width = codes.shape
    taps, channels_out = filters.shape[2] * filters.shape[3], filters.shape[0]
    size = [
        (length + 2 * pad - apart * (kernel - 1) - 1) // by + 1
        for length, kernel, by, pad, apart in zip((height, width), filters.shape[2:], stride, padding, dilation,
                                                  strict=True)
    ]  # fmt: skip
    out = torch.empty((samples, channels_out, *size), dtype=dtype, device=codes.device, memory_format=LAST)
    pixels = samples * size[0] * size[1]
    multiple = _multiple(channels, channels_out)
    block_pixels, block_out, block_in = blocks(channels, channels_out, multiple)
    columns = triton.cdiv(channels_out, block_out)
    chunks, rows = chunking(pixels, block_pixels, columns)
    found = merging.moments(scale, channels_out, chunks, rows, pixels) if statistics else None
    sizes = (pixels, rows, channels, channels_out, height, width, *size, taps, filters.shape[3])
    settings = (*stride, *padding, *dilation)
    pixel_rows, sums = matrix(codes), None
    act_bits, weight_bits = act_bits.contiguous(), weight_bits.contiguous()
    if weight_mode == "dorefa":
        sums = torch.empty(pixels, dtype=torch.int32, device=codes.device)
        sum_codes_kernel[(triton.cdiv(pixels, 64),)](
            pixel_rows, weight_bits, weight_index, sums, *sizes, *settings, **SUM_OPTIONS
        )  # fmt: skip
    convolve_kernel[(chunks, columns)](
        pixel_rows, filters.permute(0, 2, 3, 1).contiguous(), step, scale, bias, sums,
        act_bits, act_index, weight_bits, weight_index, matrix(out), None if found is None else found.first,
        *sizes, *settings,
        MULTIPLE=multiple, WIDE=tl_wide(scale),
        BLOCK_PIXELS=block_pixels, BLOCK_IN=block_in, BLOCK_OUT=block_out, **OPTIONS,
    )  # fmt: skip
    return out, found


def _grouped(
    codes: Tensor, filters: Tensor, unit: Tensor, bias: Tensor | None, weight_bits: Tensor, weight_index: Tensor,
    weight_mode: str, dtype: torch.dtype, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """The same in floats, which hold the codes exactly, TF32 too; halves would not hold the sums."""
    numbers = filters.to(unit.dtype)
    if weight_mode == "dorefa":
        numbers = numbers + 0.5 * (weight_bits[weight_index] == 8)
    out = functional.conv2d(codes.to(unit.dtype), numbers, None, stride, padding, dilation, groups)
    out = out * unit[:, None, None]
    if bias is not None:
        out = out + bias.to(unit.dtype)[:, None, None]
    return torch.empty(out.shape, dtype=dtype, device=out.device, memory_format=LAST).copy_(out)
