"""Depthwise convolutions: normalise and clip on load, measure (or normalise) on store.

Matrices as in pointwise.py. Simple on purpose: the taps are a loop that is not unrolled, which needs few registers for
any kernel size. The CUDA kernels of kernels/cuda/ are the fast ones; these check them and stand in for them.
"""

from __future__ import annotations

from typing import NamedTuple

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

PIXELS, CHANNELS = 32, 64  # of a tile
# The compiler would rather spill a few bytes than leave an SM to one block; here it may not.
OPTIONS = {"num_warps": 8, "maxnreg": 248}

SIZES = ["pixels", "rows", "channels", "height", "width", "out_height", "out_width", "x_distance", "z_distance"]


class Shape(NamedTuple):
    """Sides of the image and of the output."""

    height: int
    width: int
    out_height: int
    out_width: int


def shape_of(height: int, width: int, stride: int) -> Shape:
    """The shape for an odd kernel, padded by half of its size."""
    return Shape(height, width, (height - 1) // stride + 1, (width - 1) // stride + 1)


@triton.jit(do_not_specialize=[*SIZES, "group_distance"])
def forward_kernel(
    x, weight, scale, shift, channels_used, z, partial, out_scale, out_shift,
    pixels, rows, channels, height, width, out_height, out_width, x_distance, z_distance,
    group_distance, K: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
    MULTIPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a group's output pixels, block of channels, group); partial and out_... as in pointwise.py."""
    used = present(channels, channels_used)
    if tl.program_id(1) * BLOCK_CHANNELS >= used:
        return
    channels = known(channels, MULTIPLE)
    x_distance, z_distance = known(x_distance, MULTIPLE), known(z_distance, MULTIPLE)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    stored_c, used_c = c < channels, c < used
    begin, end = chunk_of_group(rows, pixels, group_distance)
    own = row_of_group(group_distance)

    count = tl.zeros([BLOCK_CHANNELS], WIDE)
    pivot = tl.zeros([BLOCK_CHANNELS], WIDE)
    mean = tl.zeros([BLOCK_CHANNELS], WIDE)
    m2 = tl.zeros([BLOCK_CHANNELS], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        pixel_mask = pixel < end
        left = pixel % out_width * STRIDE - K // 2
        top = pixel // out_width % out_height * STRIDE - K // 2
        image = (pixel // out_width // out_height).to(tl.int64) * height
        sum_ = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], WIDE)
        for tap in tl.range(0, K * K, disable_licm=True):
            y, column = top + tap // K, left + tap % K
            inside = pixel_mask & (y >= 0) & (y < height) & (column >= 0) & (column < width)
            place = ((image + y) * width + column)[:, None] * x_distance + c[None, :]
            a = tl.load(x + place, mask=inside[:, None] & stored_c[None, :], other=0.0)
            a = activation(a.to(WIDE), scale, shift, own + c, stored_c, RELU)
            a = tl.where(inside[:, None] & used_c[None, :], a, 0.0)
            sum_ += a * tl.load(weight + c * (K * K) + tap, mask=used_c, other=0.0).to(WIDE)[None, :]
        if partial is None:
            sum_ = activation(sum_, out_scale, out_shift, own + c, used_c, False)
        stored = sum_.to(z.dtype.element_ty)
        mask = pixel_mask[:, None] & stored_c[None, :]
        tl.store(z + pixel.to(tl.int64)[:, None] * z_distance + c[None, :], stored, mask=mask)
        if partial is not None:
            n = tl.minimum(end - start, BLOCK_PIXELS).to(WIDE)
            count, pivot, mean, m2 = add_moments(count, pivot, mean, m2, stored.to(WIDE), pixel_mask, n)
    if partial is not None:
        store_moments(partial, pivot, mean, m2, channels, c, used_c)


@triton.jit(do_not_specialize=[*SIZES, "grad_distance", "out_distance"])
def data_gradient_kernel(
    grad, z, norm, x, weight, scale, shift, centre, channels_used, out, partial,
    pixels, rows, channels, height, width, out_height, out_width, x_distance, z_distance, grad_distance, out_distance,
    K: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, IN_RELU: tl.constexpr,
    MULTIPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of input pixels, block of channels): the gradient of the input and, with partial, its sums."""
    used = present(channels, channels_used)
    if tl.program_id(1) * BLOCK_CHANNELS >= used:
        return
    channels = known(channels, MULTIPLE)
    x_distance, z_distance = known(x_distance, MULTIPLE), known(z_distance, MULTIPLE)
    grad_distance, out_distance = known(grad_distance, MULTIPLE), known(out_distance, MULTIPLE)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    stored_c, used_c = c < channels, c < used
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)

    total = tl.zeros([BLOCK_CHANNELS], WIDE)
    product = tl.zeros([BLOCK_CHANNELS], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        pixel_mask = pixel < pixels
        right = pixel % width + K // 2
        bottom = pixel // width % height + K // 2
        image = (pixel // width // height).to(tl.int64) * out_height
        sum_ = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], WIDE)
        for tap in tl.range(0, K * K, disable_licm=True):
            # The output pixel that sees this one through the tap, if there is one.
            down, across = bottom - tap // K, right - tap % K
            inside = pixel_mask & (down >= 0) & (across >= 0) & (down % STRIDE == 0) & (across % STRIDE == 0)
            y, column = down // STRIDE, across // STRIDE
            inside &= (y < out_height) & (column < out_width)
            place = ((image + y) * out_width + column)[:, None]
            mask = inside[:, None] & stored_c[None, :]
            g = tl.load(grad + place * grad_distance + c[None, :], mask=mask, other=0.0).to(WIDE)
            value = tl.load(z + place * z_distance + c[None, :], mask=mask, other=0.0).to(WIDE)
            dz = convolution_gradient(g, value, norm, channels, c, stored_c, RELU)
            dz = tl.where(inside[:, None] & used_c[None, :], dz, 0.0)
            sum_ += dz * tl.load(weight + c * (K * K) + tap, mask=used_c, other=0.0).to(WIDE)[None, :]
        mask = pixel_mask[:, None] & stored_c[None, :]
        row64 = pixel.to(tl.int64)[:, None]
        if IN_RELU or partial is not None:
            a = tl.load(x + row64 * x_distance + c[None, :], mask=mask, other=0.0).to(WIDE)
            if IN_RELU:
                sum_ = tl.where(activation(a, scale, shift, c, stored_c, False) > 0, sum_, 0.0)
        result = sum_.to(out.dtype.element_ty)
        tl.store(out + row64 * out_distance + c[None, :], result, mask=mask)
        if partial is not None:
            total, product = add_sums(total, product, result.to(WIDE), a, centre, c, stored_c, pixel_mask)
    if partial is not None:
        store_sums(partial, total, product, channels, c, used_c)


@triton.jit(do_not_specialize=[*SIZES, "grad_distance"])
def weight_gradient_kernel(
    grad, z, norm, x, scale, shift, channels_used, parts,
    pixels, rows, channels, height, width, out_height, out_width, x_distance, z_distance, grad_distance,
    K: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, IN_RELU: tl.constexpr,
    MULTIPLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (chunk of output pixels, block of channels, tap). parts: [chunks, channels, K * K]."""
    used = present(channels, channels_used)
    if tl.program_id(1) * BLOCK_CHANNELS >= used:
        return
    channels = known(channels, MULTIPLE)
    x_distance, z_distance = known(x_distance, MULTIPLE), known(z_distance, MULTIPLE)
    grad_distance = known(grad_distance, MULTIPLE)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    stored_c, used_c = c < channels, c < used
    tap = tl.program_id(2)
    begin = tl.program_id(0) * rows
    end = tl.minimum(begin + rows, pixels)

    sum_ = tl.zeros([BLOCK_CHANNELS], WIDE)
    for start in range(begin, end, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        column = pixel % out_width * STRIDE - K // 2 + tap % K
        y = pixel // out_width % out_height * STRIDE - K // 2 + tap // K
        image = (pixel // out_width // out_height).to(tl.int64) * height
        inside = (pixel < pixels) & (y >= 0) & (y < height) & (column >= 0) & (column < width)
        mask = inside[:, None] & stored_c[None, :]
        place = ((image + y) * width + column)[:, None] * x_distance
        a = tl.load(x + place + c[None, :], mask=mask, other=0.0)
        a = activation(a.to(WIDE), scale, shift, c, stored_c, IN_RELU)
        row64 = pixel.to(tl.int64)[:, None]
        g = tl.load(grad + row64 * grad_distance + c[None, :], mask=mask, other=0.0).to(WIDE)
        value = tl.load(z + row64 * z_distance + c[None, :], mask=mask, other=0.0).to(WIDE)
        dz = convolution_gradient(g, value, norm, channels, c, stored_c, RELU)
        sum_ += tl.sum(tl.where(inside[:, None] & used_c[None, :], dz * a, 0.0), axis=0)
    out = parts + (tl.program_id(0).to(tl.int64) * channels + c) * (K * K) + tap
    tl.store(out, sum_, mask=stored_c)


def forward(x: Input, shape: Shape, weight: Tensor, stride: int, z: Tensor) -> merging.Partial:
    """Fill z, [groups * output pixels, channels]; returns mean and second moment of each chunk."""
    pixels = z.shape[0] // x.groups
    chunks, rows = chunking(pixels, PIXELS, triton.cdiv(x.channels, CHANNELS))
    found = merging.moments(x.data, x.channels, chunks, rows, pixels, x.groups)
    _forward(x, shape, weight, stride, z, found.first, None, None)
    return found


def infer(
    x: Input, shape: Shape, weight: Tensor, stride: int, scale: Tensor | None, shift: Tensor, out: Tensor
) -> None:
    """Fill out, [groups * output pixels, channels], with the convolution, times scale, plus shift."""
    _forward(x, shape, weight, stride, out, None, scale, shift)


def _forward(
    x: Input, shape: Shape, weight: Tensor, stride: int, z: Tensor, partial: Tensor | None,
    scale: Tensor | None, shift: Tensor | None,
) -> None:  # fmt: skip
    pixels, columns = z.shape[0] // x.groups, triton.cdiv(x.channels, CHANNELS)
    chunks, rows = chunking(pixels, PIXELS, columns)
    distances = x.data.stride(0), z.stride(0)
    forward_kernel[(chunks, columns, x.groups)](
        x.data, weight, x.scale, x.shift, x.width, z, partial, scale, shift,
        pixels, rows, x.channels, *shape, *distances, distance_of_groups(x.groups, x.scale, x.shift, scale, shift),
        K=weight.shape[2], STRIDE=stride, RELU=x.relu, MULTIPLE=_multiple(x, *distances),
        WIDE=tl_wide(x.data), BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS, **OPTIONS,
    )  # fmt: skip


def _multiple(x: Input, *sizes: int) -> int:
    return min(4, multiple(x.channels, *sizes))  # 8 needs twice the registers for what a channel has


def data_gradient(
    y: Output, x: Input, shape: Shape, weight: Tensor, stride: int, centre: Tensor | None, out: Tensor
) -> merging.Partial | None:
    """Fill out, [pixels, channels], with the gradient of x; returns its sums if there is a centre."""
    pixels, columns = x.data.shape[0], triton.cdiv(x.channels, CHANNELS)
    chunks, rows = chunking(pixels, PIXELS, columns)
    found = None
    if centre is not None:
        found = merging.sums(x.data, x.channels, chunks, rows, pixels)
    distances = x.data.stride(0), y.z.stride(0), y.grad.stride(0), out.stride(0)
    data_gradient_kernel[(chunks, columns)](
        y.grad, y.z, y.norm, x.data, weight, x.scale, x.shift, centre, x.width, out,
        None if found is None else found.first,
        pixels, rows, x.channels, *shape, *distances,
        K=weight.shape[2], STRIDE=stride, RELU=y.relu, IN_RELU=x.relu, MULTIPLE=_multiple(x, *distances),
        WIDE=tl_wide(x.data), BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS, **OPTIONS,
    )  # fmt: skip
    return found


def weight_gradient(y: Output, x: Input, shape: Shape, weight: Tensor, stride: int) -> Tensor:
    """Gradient of the whole stored weight; zero outside of the used part."""
    pixels, taps = y.z.shape[0], weight.shape[2] * weight.shape[3]
    columns = triton.cdiv(x.channels, CHANNELS)
    chunks, rows = chunking(pixels, PIXELS, columns * taps)
    parts = torch.empty((chunks, x.channels, taps), dtype=wide(x.data), device=x.data.device)
    distances = x.data.stride(0), y.z.stride(0), y.grad.stride(0)
    weight_gradient_kernel[(chunks, columns, taps)](
        y.grad, y.z, y.norm, x.data, x.scale, x.shift, x.width, parts,
        pixels, rows, x.channels, *shape, *distances,
        K=weight.shape[2], STRIDE=stride, RELU=y.relu, IN_RELU=x.relu, MULTIPLE=_multiple(x, *distances),
        WIDE=tl_wide(x.data), BLOCK_PIXELS=PIXELS, BLOCK_CHANNELS=CHANNELS, **OPTIONS,
    )  # fmt: skip
    return merging.merge_weight(parts, weight, x.width, None)
