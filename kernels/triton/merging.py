"""Second stages: what the chunks of a pass found, merged in a fixed order; and what follows from it for the next pass.

One small launch a layer, so that nothing returns to the host between two passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spos_fast.kernels.matrix import present, wide
from spos_fast.ops.groups import each

CHUNKS, CHANNELS = 32, 16  # of a tile


class Partial(NamedTuple):
    """Two values of each channel and chunk: mean and second moment, or the two sums of a backward pass.

    Attributes:
        first, second: the rows of each chunk, ``distance`` elements apart, in the statistics' dtype.
        pivot: what first is to be added to; None for nothing.
        chunks: their number; all but the last cover ``rows`` pixels.
        count: pixels in all, of one group.
        groups: how many there are, one behind the other.
    """

    first: Tensor
    second: Tensor
    pivot: Tensor | None
    distance: int
    chunks: int
    rows: int
    count: int
    groups: int = 1


def moments(x: Tensor, channels: int, chunks: int, rows: int, count: int, groups: int = 1) -> Partial:
    """Memory for the moments of a pass over x: [groups * chunks, 3, channels]."""
    found = torch.empty((groups * chunks, 3, channels), dtype=wide(x), device=x.device)
    return Partial(found, found[:, 1], found[:, 2], 3 * channels, chunks, rows, count, groups)


def sums(x: Tensor, channels: int, chunks: int, rows: int, count: int) -> Partial:
    """Memory for the sums of a pass over x: [chunks, 2, channels]."""
    found = torch.empty((chunks, 2, channels), dtype=wide(x), device=x.device)
    return Partial(found, found[:, 1], None, 2 * channels, chunks, rows, count)


def whole(first: Tensor, second: Tensor, count: int, groups: int = 1) -> Partial:
    """What another kernel has merged already, [channels] or [groups, channels], as a single chunk of each group."""
    return Partial(first, second, None, first.shape[-1], 1, count, count, groups)


# Vectors begin wherever the layer in front ends; to know where is worth no compilation in launches as small as these.
@triton.jit(
    do_not_specialize=["distance", "chunks", "rows", "count", "channels", "group_distance"],
    do_not_specialize_on_alignment=[
        "means",
        "squares",
        "pivots",
        "mean_out",
        "second_out",
        "scale_out",
        "shift_out",
        "gamma",
        "beta",
    ],
)
def moments_kernel(
    means, squares, pivots, mean_out, second_out, scale_out, shift_out, gamma, beta, width,
    distance, chunks, rows, count, channels, group_distance,
    EPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and second moment of each channel, in double; zero for absent channels. Program (channels, group).

    With scale_out, the variance in place of the second moment, and the batch norm's scale and shift.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    stored = channel < channels
    used = channel < present(channels, width)
    group = tl.program_id(1)
    chunks_in_front = group.to(tl.int64) * chunks
    merged = tl.zeros([CHANNELS], tl.float64)
    mean = tl.zeros([CHANNELS], tl.float64)
    m2 = tl.zeros([CHANNELS], tl.float64)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & used[None, :]
        place = (chunks_in_front + chunk.to(tl.int64))[:, None] * distance + channel[None, :]
        tile_mean = tl.load(means + place, mask=mask, other=0.0).to(tl.float64)
        if pivots is not None:
            tile_mean += tl.load(pivots + place, mask=mask, other=0.0).to(tl.float64)
        tile_m2 = tl.load(squares + place, mask=mask, other=0.0).to(tl.float64)
        n = tl.minimum(tl.maximum(count - chunk.to(tl.int64) * rows, 0), rows).to(tl.float64)[:, None]
        n_tile = tl.sum(n, axis=0)
        centre = tl.sum(tile_mean * n, axis=0) / n_tile
        residual = tl.where(mask, tile_mean - centre[None, :], 0.0)
        # Chan, Golub and LeVeque, 1979.
        total = merged + n_tile
        delta = centre - mean
        mean += delta * (n_tile / total)
        m2 += tl.sum(tile_m2 + residual * residual * n, axis=0) + delta * delta * (merged * n_tile / total)
        merged = total
    out = group * group_distance + channel
    tl.store(mean_out + out, mean, mask=stored)
    if scale_out is None:
        tl.store(second_out + out, m2, mask=stored)
    else:
        var = m2 / count
        tl.store(second_out + out, var, mask=stored)
        scale = tl.where(used, 1.0 / tl.sqrt(var + EPS), 0.0)
        if gamma is not None:
            scale *= tl.load(gamma + channel, mask=used, other=0.0).to(tl.float64)
        # Of the rounded scale: at the mean its rounding then costs nothing.
        scale = scale.to(scale_out.dtype.element_ty)
        shift = -mean * scale.to(tl.float64)
        if beta is not None:
            shift += tl.load(beta + channel, mask=used, other=0.0).to(tl.float64)
        tl.store(scale_out + out, scale, mask=stored)
        tl.store(shift_out + out, shift, mask=stored)


@triton.jit(do_not_specialize=["channels"])
def scale_shift_kernel(
    mean, var, gamma, beta, scale_out, shift_out, channels, EPS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Scale and shift of batch norm, by the arithmetic of moments_kernel."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    scale = 1.0 / tl.sqrt(tl.load(var + channel, mask=mask, other=0.0).to(tl.float64) + EPS)
    if gamma is not None:
        scale *= tl.load(gamma + channel, mask=mask, other=0.0).to(tl.float64)
    scale = scale.to(scale_out.dtype.element_ty)
    shift = -tl.load(mean + channel, mask=mask, other=0.0).to(tl.float64) * scale.to(tl.float64)
    if beta is not None:
        shift += tl.load(beta + channel, mask=mask, other=0.0).to(tl.float64)
    tl.store(scale_out + channel, scale, mask=mask)
    tl.store(shift_out + channel, shift, mask=mask)


@triton.jit(
    do_not_specialize=["distance", "chunks", "count", "channels"],
    do_not_specialize_on_alignment=["sums", "products", "sum_out", "product_out", "mean", "var", "scale", "shift"],
)
def sums_kernel(
    sums, products, sum_out, product_out, mean, var, scale, shift, norm_out, width,
    distance, chunks, count, channels,
    EPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Both sums of each channel, in double; zero for absent channels.

    With norm_out, product_out is the gradient of the batch norm's scale, and norm_out is what convolution_gradient
    reads: [5, channels].
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    stored = channel < channels
    used = channel < present(channels, width)
    total = tl.zeros([CHANNELS], tl.float64)
    product = tl.zeros([CHANNELS], tl.float64)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & used[None, :]
        place = chunk.to(tl.int64)[:, None] * distance + channel[None, :]
        total += tl.sum(tl.load(sums + place, mask=mask, other=0.0).to(tl.float64), axis=0)
        product += tl.sum(tl.load(products + place, mask=mask, other=0.0).to(tl.float64), axis=0)
    tl.store(sum_out + channel, total, mask=stored)
    if norm_out is None:
        tl.store(product_out + channel, product, mask=stored)
    else:
        rstd = 1.0 / tl.sqrt(tl.load(var + channel, mask=stored, other=0.0).to(tl.float64) + EPS)
        tl.store(product_out + channel, product * rstd, mask=stored)
        norm_out += channel
        tl.store(norm_out, tl.load(scale + channel, mask=stored), mask=stored)
        tl.store(norm_out + channels, tl.load(shift + channel, mask=stored), mask=stored)
        tl.store(norm_out + 2 * channels, tl.load(mean + channel, mask=stored), mask=stored)
        tl.store(norm_out + 3 * channels, total / count, mask=stored)
        tl.store(norm_out + 4 * channels, product * rstd * rstd / count, mask=stored)


@triton.jit(do_not_specialize=["chunks", "rows", "columns", "stored_columns", "elements"])
def weight_kernel(
    parts, out, width_rows, width_columns, chunks, rows, columns, stored_columns, elements, BLOCK: tl.constexpr
):
    """Gradient of a weight: the sum of parts, [chunks, rows, columns], and zero wherever the weight was not used."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = element // stored_columns, element % stored_columns
    mask = (row < present(rows, width_rows)) & (column < present(columns, width_columns))
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    part = parts + row * columns + column
    for _ in range(0, chunks):
        total += tl.load(part, mask=mask, other=0.0)
        part += rows * columns
    tl.store(out + element, total, mask=element < elements)


def merge_moments(found: Partial, channels: int, width: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and second moment, [channels], of several groups [groups, channels]."""
    mean = torch.empty(each(found.groups, channels), dtype=found.first.dtype, device=found.first.device)
    m2 = torch.empty_like(mean)
    _moments(found, mean, m2, None, None, None, None, width, 0.0)
    return mean, m2


def merge_into_norm(
    found: Partial, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor,
    gamma: Tensor | None, beta: Tensor | None, width: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Fill mean, var, scale and shift of one layer from what its convolution found.

    They are [channels], of several groups [groups, channels] with the same distance between rows; gamma and beta,
    [channels], are those of all groups.
    """
    _moments(found, mean, var, scale, shift, gamma, beta, width, eps)


def _moments(
    found: Partial, mean: Tensor, second: Tensor, scale: Tensor | None, shift: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, width: Tensor | None, eps: float,
) -> None:  # fmt: skip
    channels = mean.shape[-1]
    moments_kernel[(triton.cdiv(channels, CHANNELS), found.groups)](
        found.first, found.second, found.pivot, mean, second, scale, shift, gamma, beta, width,
        found.distance, found.chunks, found.rows, found.count, channels, mean.stride(0) if found.groups > 1 else 0,
        EPS=eps, CHUNKS=CHUNKS, CHANNELS=CHANNELS,
    )  # fmt: skip


def scale_and_shift(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of batch norm for given statistics, all [channels]."""
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    block = 256
    scale_shift_kernel[(triton.cdiv(mean.shape[0], block),)](
        mean, var, gamma, beta, scale, shift, mean.shape[0], EPS=eps, CHANNELS=block
    )
    return scale, shift


def merge_sums(found: Partial, channels: int, width: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sums, [channels]."""
    total = torch.empty(channels, dtype=found.first.dtype, device=found.first.device)
    product = torch.empty_like(total)
    _sums(found, total, product, None, None, None, None, None, width, 0.0)
    return total, product


def merge_into_gradients(
    found: Partial, grad_beta: Tensor, grad_gamma: Tensor, mean: Tensor, var: Tensor, scale: Tensor, shift: Tensor,
    width: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """Fill the gradients of one layer's beta and gamma; returns norm, [5, channels], for its convolution."""
    norm = torch.empty((5, mean.shape[0]), dtype=mean.dtype, device=mean.device)
    _sums(found, grad_beta, grad_gamma, mean, var, scale, shift, norm, width, eps)
    return norm


def _sums(
    found: Partial, total: Tensor, product: Tensor, mean: Tensor | None, var: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, norm: Tensor | None, width: Tensor | None, eps: float,
) -> None:  # fmt: skip
    channels = total.shape[0]
    sums_kernel[(triton.cdiv(channels, CHANNELS),)](
        found.first, found.second, total, product, mean, var, scale, shift, norm, width,
        found.distance, found.chunks, found.count, channels,
        EPS=eps, CHUNKS=CHUNKS, CHANNELS=CHANNELS,
    )  # fmt: skip


def merge_weight(parts: Tensor, weight: Tensor, width_rows: Tensor | None, width_columns: Tensor | None) -> Tensor:
    """The gradient of a weight [rows, ...] from parts, [chunks, used rows, used columns]."""
    grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    chunks, rows, columns = parts.shape
    elements, block = weight.numel(), 256
    weight_kernel[(triton.cdiv(elements, block),)](
        parts, grad, width_rows, width_columns,
        chunks, rows, columns, elements // weight.shape[0], elements, BLOCK=block,
    )  # fmt: skip
    return grad
