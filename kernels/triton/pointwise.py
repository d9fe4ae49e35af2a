"""1x1 convolutions as matrix products: normalise and clip on load, measure (or normalise) on store.

All matrices are rows of pixels, [pixels, channels], with unit distance between channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spos_fast.kernels import merging
from spos_fast.kernels.matrix import (
    Input,
    Output,
    activation,
    add_moments,
    add_sums,
    chunk_of_group,
    chunking,
    convolution_gradient,
    distance_of_groups,
    known,
    multiple,
    present,
    row_of_group,
    store_moments,
    store_sums,
    tl_wide,
    wide,
)

SIZES = ["pixels", "rows", "channels_in", "channels_out", "first", "x_distance", "weight_distance"]


@triton.jit
def only_used(w, j, o, used_in, used_out, width_in, width_out):
    """A tile of the weight with zeros for absent channels, whatever stands there."""
    if width_in is not None:
        w = tl.where(j < used_in, w, 0.0)
    if width_out is not None:
        w = tl.where(o < used_out, w, 0.0)
    return w


@triton.jit(do_not_specialize=[*SIZES, "z_distance", "group_distance"])
def forward_kernel(
    x, weight, scale, shift, width_in, width_out, z, partial, out_scale, out_shift,
    pixels, rows, channels_in, channels_out, first, x_distance, weight_distance, z_distance, group_distance,
    STEP: tl.constexpr, RELU: tl.constexpr, OUT_RELU: tl.constexpr, MULTIPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a group's rows, block of output columns, group).

    With partial: z as the convolution gives it, and mean and second moment of the chunk's columns. Without: batch norm
    by out_scale and out_shift and ReLU on store.
    """
    used_out = present(channels_out, width_out)
    if tl.program_id(1) * BLOCK_OUT >= used_out:
        return
    used_in = present(channels_in, width_in)
    channels_in, channels_out = known(channels_in, MULTIPLE), known(channels_out, MULTIPLE)
    x_distance, z_distance = known(x_distance, MULTIPLE), known(z_distance, MULTIPLE)
    weight_distance = known(weight_distance, MULTIPLE)
    if STEP == 1:
        first = known(first, MULTIPLE)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column_mask = column < channels_out
    weight_columns = weight + column[None, :] * weight_distance
    begin, end = chunk_of_group(rows, pixels, group_distance)
    own = row_of_group(group_distance)

    count = tl.zeros([BLOCK_OUT], WIDE)
    pivot = tl.zeros([BLOCK_OUT], WIDE)
    mean = tl.zeros([BLOCK_OUT], WIDE)
    m2 = tl.zeros([BLOCK_OUT], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        row = start + tl.arange(0, BLOCK_PIXELS)
        row_mask = row < end
        x_rows = x + first + row.to(tl.int64)[:, None] * x_distance
        sum_ = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], WIDE)
        for place in range(0, used_in, BLOCK_IN):
            j = place + tl.arange(0, BLOCK_IN)
            # Loads go by the channels that the sizes provide for, whose number the compiler knows a divisor of: they
            # are wide then. They end at most a block behind the used ones.
            a = tl.load(x_rows + j[None, :] * STEP, mask=row_mask[:, None] & (j < channels_in)[None, :], other=0.0)
            a = activation(a.to(WIDE), scale, shift, own + j, j < channels_in, RELU)
            if width_in is not None:
                a = tl.where((j < used_in)[None, :], a, 0.0)
            w = tl.load(weight_columns + j[:, None], mask=(j < channels_in)[:, None] & column_mask[None, :], other=0.0)
            w = only_used(w, j[:, None], column[None, :], used_in, used_out, width_in, width_out)
            sum_ = tl.dot(a.to(w.dtype), w, sum_, input_precision="ieee", out_dtype=WIDE)
        if partial is None:
            sum_ = activation(sum_, out_scale, out_shift, own + column, column < used_out, OUT_RELU)
        stored = sum_.to(z.dtype.element_ty)
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(z + row.to(tl.int64)[:, None] * z_distance + column[None, :], stored, mask=mask)
        if partial is not None:
            n = tl.minimum(end - start, BLOCK_PIXELS).to(WIDE)
            count, pivot, mean, m2 = add_moments(count, pivot, mean, m2, stored.to(WIDE), row_mask, n)
    if partial is not None:
        store_moments(partial, pivot, mean, m2, channels_out, column, column < used_out)


@triton.jit(do_not_specialize=[*SIZES, "grad_distance", "z_distance", "out_distance", "passed_distance"])
def data_gradient_kernel(
    grad, z, norm, x, weight, scale, shift, centre, width_in, width_out, passed, out, partial,
    pixels, rows, channels_in, channels_out, first, x_distance, weight_distance,
    grad_distance, z_distance, out_distance, passed_distance,
    STEP: tl.constexpr, RELU: tl.constexpr, IN_RELU: tl.constexpr, MULTIPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (chunk of rows, block of input columns): dz times the weight, behind the mask of the input's ReLU.

    With partial: also its sums over the chunk's rows and those of it times (a - centre). With passed: out holds passed
    and the result in turns, column by column.
    """
    used_in = present(channels_in, width_in)
    if tl.program_id(1) * BLOCK_IN >= used_in:
        return
    used_out = present(channels_out, width_out)
    channels_in, channels_out = known(channels_in, MULTIPLE), known(channels_out, MULTIPLE)
    x_distance, z_distance = known(x_distance, MULTIPLE), known(z_distance, MULTIPLE)
    grad_distance, out_distance = known(grad_distance, MULTIPLE), known(out_distance, MULTIPLE)
    weight_distance, passed_distance = known(weight_distance, MULTIPLE), known(passed_distance, MULTIPLE)
    if STEP == 1:
        first = known(first, MULTIPLE)
    j = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    columns = j < channels_in
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)

    total = tl.zeros([BLOCK_IN], WIDE)
    product = tl.zeros([BLOCK_IN], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        row = start + tl.arange(0, BLOCK_PIXELS)
        row_mask = row < pixels
        row64 = row.to(tl.int64)[:, None]
        sum_ = tl.zeros([BLOCK_PIXELS, BLOCK_IN], WIDE)
        for place in range(0, used_out, BLOCK_OUT):
            o = place + tl.arange(0, BLOCK_OUT)
            mask = row_mask[:, None] & (o < channels_out)[None, :]
            g = tl.load(grad + row64 * grad_distance + o[None, :], mask=mask, other=0.0).to(WIDE)
            value = tl.load(z + row64 * z_distance + o[None, :], mask=mask, other=0.0).to(WIDE)
            dz = convolution_gradient(g, value, norm, channels_out, o, o < channels_out, RELU)
            if width_out is not None:
                dz = tl.where((o < used_out)[None, :], dz, 0.0)
            w = tl.load(
                weight + o[:, None] * weight_distance + j[None, :],
                mask=(o < channels_out)[:, None] & columns[None, :],
                other=0.0,
            )
            w = only_used(w, j[None, :], o[:, None], used_in, used_out, width_in, width_out)
            sum_ = tl.dot(dz.to(w.dtype), w, sum_, input_precision="ieee", out_dtype=WIDE)
        mask = row_mask[:, None] & columns[None, :]
        if IN_RELU or partial is not None:
            a = tl.load(x + first + row64 * x_distance + j[None, :] * STEP, mask=mask, other=0.0).to(WIDE)
            if IN_RELU:
                sum_ = tl.where(activation(a, scale, shift, j, columns, False) > 0, sum_, 0.0)
        result = sum_.to(out.dtype.element_ty)
        if passed is None:
            tl.store(out + row64 * out_distance + j[None, :], result, mask=mask)
        else:
            other = tl.load(passed + row64 * passed_distance + j[None, :], mask=mask, other=0.0)
            both = tl.program_id(1) * 2 * BLOCK_IN + tl.arange(0, 2 * BLOCK_IN)
            tl.store(
                out + row64 * out_distance + both[None, :],
                tl.interleave(other, result),
                mask=row_mask[:, None] & (both < 2 * channels_in)[None, :],
            )
        if partial is not None:
            total, product = add_sums(total, product, result.to(WIDE), a, centre, j, columns, row_mask)
    if partial is not None:
        store_sums(partial, total, product, channels_in, j, j < used_in)


@triton.jit(do_not_specialize=[*SIZES[:-1], "grad_distance", "z_distance"])
def weight_gradient_kernel(
    grad, z, norm, x, scale, shift, width_in, width_out, parts,
    pixels, rows, channels_in, channels_out, first, x_distance, grad_distance, z_distance,
    STEP: tl.constexpr, RELU: tl.constexpr, IN_RELU: tl.constexpr, MULTIPLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (chunk of rows, block of output columns, block of input columns): dz times activation over the rows.

    parts: [chunks, channels_out, channels_in].
    """
    used_in, used_out = present(channels_in, width_in), present(channels_out, width_out)
    if (tl.program_id(1) * BLOCK_OUT >= used_out) | (tl.program_id(2) * BLOCK_IN >= used_in):
        return
    channels_in, channels_out = known(channels_in, MULTIPLE), known(channels_out, MULTIPLE)
    x_distance, z_distance = known(x_distance, MULTIPLE), known(z_distance, MULTIPLE)
    grad_distance = known(grad_distance, MULTIPLE)
    if STEP == 1:
        first = known(first, MULTIPLE)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    j = tl.program_id(2) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)

    sum_ = tl.zeros([BLOCK_OUT, BLOCK_IN], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        row = start + tl.arange(0, BLOCK_PIXELS)
        row_mask = row < pixels
        row64 = row.to(tl.int64)[:, None]
        mask = row_mask[:, None] & (o < channels_out)[None, :]
        g = tl.load(grad + row64 * grad_distance + o[None, :], mask=mask, other=0.0).to(WIDE)
        value = tl.load(z + row64 * z_distance + o[None, :], mask=mask, other=0.0).to(WIDE)
        dz = convolution_gradient(g, value, norm, channels_out, o, o < channels_out, RELU)
        dz = tl.where(row_mask[:, None] & (o < used_out)[None, :], dz, 0.0)
        mask = row_mask[:, None] & (j < channels_in)[None, :]
        a = tl.load(x + first + row64 * x_distance + j[None, :] * STEP, mask=mask, other=0.0)
        a = activation(a.to(WIDE), scale, shift, j, j < channels_in, IN_RELU)
        if width_in is not None:
            a = tl.where((j < used_in)[None, :], a, 0.0)
        narrow = x.dtype.element_ty
        sum_ = tl.dot(tl.trans(dz.to(narrow)), a.to(narrow), sum_, input_precision="ieee", out_dtype=WIDE)
    out = parts + tl.program_id(0).to(tl.int64) * channels_out * channels_in
    tl.store(
        out + o[:, None] * channels_in + j[None, :], sum_, mask=(o < channels_out)[:, None] & (j < channels_in)[None, :]
    )


def blocks(x: Tensor, columns: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a tile of the product."""
    if x.dtype == torch.float64:
        return 32, 32, 16
    return 64, 32 if columns <= 32 else 64, 32


def options(x: Tensor) -> dict[str, int]:
    """How to compile and launch: what leaves no register in local memory on sm_80 and sm_90.

    Float32 is multiplied outside of the tensor cores, to its full precision, and needs the registers that loading a
    tile ahead would take.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return {"num_warps": 8, "num_stages": 2}
    return {"num_warps": 8, "num_stages": 1, "maxnreg": 248}


def forward(x: Input, weight: Tensor, channels: int, width: Tensor | None, z: Tensor) -> merging.Partial:
    """Fill z, [groups * pixels, channels]; returns mean and second moment of each chunk."""
    pixels = x.data.shape[0] // x.groups
    block = blocks(x.data, channels)
    chunks, rows = chunking(pixels, block[0], triton.cdiv(channels, block[1]))
    found = merging.moments(x.data, channels, chunks, rows, pixels, x.groups)
    _forward(x, weight, channels, width, z, found.first, None, None, False)
    return found


def infer(
    x: Input, weight: Tensor, channels: int, width: Tensor | None, scale: Tensor | None, shift: Tensor, out: Tensor
) -> None:
    """Fill out, [groups * pixels, channels], with the convolution, times scale, plus shift, behind ReLU."""
    _forward(x, weight, channels, width, out, None, scale, shift, True)


def _forward(
    x: Input, weight: Tensor, channels: int, width: Tensor | None, z: Tensor, partial: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, relu: bool,
) -> None:  # fmt: skip
    pixels = x.data.shape[0] // x.groups
    block = blocks(x.data, channels)
    columns = triton.cdiv(channels, block[1])
    chunks, rows = chunking(pixels, block[0], columns)
    distances = x.data.stride(0), weight.shape[1], z.stride(0)
    forward_kernel[(chunks, columns, x.groups)](
        x.data, weight, x.scale, x.shift, x.width, width, z, partial, scale, shift,
        pixels, rows, x.channels, channels, x.first, *distances,
        distance_of_groups(x.groups, x.scale, x.shift, scale, shift),
        STEP=x.step, RELU=x.relu, OUT_RELU=relu, MULTIPLE=_multiple(x, channels, *distances), WIDE=tl_wide(x.data),
        BLOCK_PIXELS=block[0], BLOCK_IN=block[2], BLOCK_OUT=block[1], **options(x.data),
    )  # fmt: skip


def _multiple(x: Input, *sizes: int) -> int:
    return multiple(x.channels, x.first if x.step == 1 else 0, *sizes)


def data_gradient(
    y: Output, x: Input, weight: Tensor, centre: Tensor | None, out: Tensor, passed: Tensor | None = None
) -> merging.Partial | None:
    """Fill out, [pixels, channels of x], with the gradient of x; returns its sums if there is a centre.

    With passed, [pixels, channels of x], out is twice as wide: passed in the even columns, the gradient in the odd
    ones. All channels must be there then.
    """
    pixels = x.data.shape[0]
    block = blocks(x.data, x.channels)
    block_pixels, columns = block[0] // 2, triton.cdiv(x.channels, block[1])  # half: dz needs registers too
    chunks, rows = chunking(pixels, block_pixels, columns)
    found = None
    if centre is not None:
        found = merging.sums(x.data, x.channels, chunks, rows, pixels)
    distances = x.data.stride(0), weight.shape[1], y.grad.stride(0), y.z.stride(0), out.stride(0)
    distances += (0 if passed is None else passed.stride(0),)
    data_gradient_kernel[(chunks, columns)](
        y.grad, y.z, y.norm, x.data, weight, x.scale, x.shift, centre, x.width, y.width, passed, out,
        None if found is None else found.first,
        pixels, rows, x.channels, y.channels, x.first, *distances,
        STEP=x.step, RELU=y.relu, IN_RELU=x.relu, MULTIPLE=_multiple(x, y.channels, *distances), WIDE=tl_wide(x.data),
        BLOCK_PIXELS=block_pixels, BLOCK_OUT=block[2], BLOCK_IN=block[1], **options(x.data),
    )  # fmt: skip
    return found


def weight_gradient(y: Output, x: Input, weight: Tensor) -> Tensor:
    """Gradient of the whole stored weight; zero outside of the used part."""
    pixels = x.data.shape[0]
    _, block, block_pixels = blocks(x.data, max(x.channels, y.channels))
    grid = triton.cdiv(y.channels, block), triton.cdiv(x.channels, block)
    chunks, rows = chunking(pixels, block_pixels, grid[0] * grid[1])
    parts = torch.empty((chunks, y.channels, x.channels), dtype=wide(x.data), device=x.data.device)
    distances = x.data.stride(0), y.grad.stride(0), y.z.stride(0)
    weight_gradient_kernel[(chunks, *grid)](
        y.grad, y.z, y.norm, x.data, x.scale, x.shift, x.width, y.width, parts,
        pixels, rows, x.channels, y.channels, x.first, *distances,
        STEP=x.step, RELU=y.relu, IN_RELU=x.relu, MULTIPLE=_multiple(x, y.channels, *distances), WIDE=tl_wide(x.data),
        BLOCK_PIXELS=block_pixels, BLOCK_OUT=block, BLOCK_IN=block, **options(x.data),
    )  # fmt: skip
    return merging.merge_weight(parts, weight, y.width, x.width)
