"""Launchers of the building blocks of fused units; spos_fast.ops.blocks defines the ops and checks their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from spos_fast.kernels import concatenation, depthwise, merging, pointwise
from spos_fast.kernels.matrix import Input, Output, image, matrix, wide


def pw_bnstats(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, first: int, step: int,
    channels_in: int, channels_out: int, width_in: Tensor | None, width_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """1x1 convolution of the normalised input: z, [N, channels_out, H, W], and mean and m2 of its channels."""
    z = image(x, channels_out, *x.shape[2:])
    source = Input(matrix(x), scale, shift, relu, channels_in, width_in, first, step)
    found = pointwise.forward(source, weight.contiguous(), channels_out, width_out, matrix(z))
    return z, *merging.merge_moments(found, channels_out, width_out)


def dw_bnstats(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, stride: int, channels: int,
    width: Tensor | None, groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Depthwise convolution of the normalised input: z, [N, channels, ...], and mean and m2 of its channels.

    With several groups scale, shift, mean and m2 are [groups, channels].
    """
    shape = depthwise.shape_of(x.shape[2], x.shape[3], stride)
    z = image(x, channels, shape.out_height, shape.out_width)
    vectors = [None if vector is None else vector.contiguous() for vector in (scale, shift)]
    source = Input(matrix(x), *vectors, relu, channels, width, groups=groups)
    found = depthwise.forward(source, shape, weight.contiguous(), stride, matrix(z))
    return z, *merging.merge_moments(found, channels, width)


def bn_act_cat(
    z: Tensor, scale: Tensor, shift: Tensor, other: Tensor | None, other_scale: Tensor | None,
    other_shift: Tensor | None, relu: bool = True,
) -> Tensor:  # fmt: skip
    """Batch norm, ReLU and concatenation behind the even channels of other, or behind other normalised likewise."""
    channels = z.shape[1]
    if other is not None:
        channels += other.shape[1] if other_shift is not None else (other.shape[1] + 1) // 2
    out = image(z, channels, *z.shape[2:])
    rows = None if other is None else matrix(other)
    concatenation.concatenate(matrix(z), scale, shift, rows, other_scale, other_shift, relu, matrix(out))
    return out


def pw_bnstats_backward(
    grad: Tensor, z: Tensor, norm: Tensor, relu: bool, x: Tensor, weight: Tensor, scale: Tensor | None,
    shift: Tensor | None, centre: Tensor | None, in_relu: bool, first: int, step: int, channels_in: int,
    channels_out: int, width_in: Tensor | None, width_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the normalised input and of the weight, and the sums that the batch norm in front needs."""
    out = image(x, channels_in, *x.shape[2:], zeros=width_in is not None)
    weight = weight.contiguous()
    made = Output(matrix(grad), matrix(z), norm.contiguous(), relu, channels_out, width_out)
    source = Input(matrix(x), scale, shift, in_relu, channels_in, width_in, first, step)
    found = pointwise.data_gradient(made, source, weight, centre, matrix(out))
    return out, pointwise.weight_gradient(made, source, weight), *_sums(found, x, channels_in, width_in)


def dw_bnstats_backward(
    grad: Tensor, z: Tensor, norm: Tensor, relu: bool, x: Tensor, weight: Tensor, scale: Tensor | None,
    shift: Tensor | None, centre: Tensor | None, in_relu: bool, stride: int, channels: int, width: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the normalised input and of the weight, and the sums that the batch norm in front needs."""
    out = image(x, channels, *x.shape[2:], zeros=width is not None)
    shape = depthwise.shape_of(x.shape[2], x.shape[3], stride)
    weight = weight.contiguous()
    made = Output(matrix(grad), matrix(z), norm.contiguous(), relu, channels, width)
    source = Input(matrix(x), scale, shift, in_relu, channels, width)
    found = depthwise.data_gradient(made, source, shape, weight, stride, centre, matrix(out))
    return out, depthwise.weight_gradient(made, source, shape, weight, stride), *_sums(found, x, channels, width)


def bn_act_cat_backward(
    grad: Tensor, first: int, z: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """Sums over pixels of the gradient behind ReLU's mask, and of it times (z - mean)."""
    channels = z.shape[1]
    found = concatenation.sums(matrix(grad[:, first : first + channels]), matrix(z), scale, shift, mean, relu)
    return merging.merge_sums(found, channels, None)


def _sums(found: merging.Partial | None, x: Tensor, channels: int, width: Tensor | None) -> tuple[Tensor, Tensor]:
    if found is None:
        return torch.empty(0, dtype=wide(x), device=x.device), torch.empty(0, dtype=wide(x), device=x.device)
    return merging.merge_sums(found, channels, width)
