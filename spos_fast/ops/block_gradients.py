"""Backward passes of pw_bnstats and dw_bnstats: a layer's gradients in one pass over memory.

Batch norm backwards needs two sums over a layer's whole gradient before that of its convolution is known. So a pass
makes the convolution's gradient on load, from the gradient behind the layer and five numbers a channel (``norm``), and
leaves the layer's input gradient with the two sums that the layer in front needs for its own five. These are raw ops,
``torch.ops.spos_fast.pw_bnstats_backward`` and ``dw_bnstats_backward``, with no gradients of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import grad as convolution_grad

from spos_fast.errors import InputError
from spos_fast.ops.channels import (
    LAST,
    activation,
    affine,
    check_statistics,
    check_width,
    new_image,
    new_statistics,
    only_present,
    padded,
    picked,
)
from spos_fast.ops.dispatch import define_op, differentiable_once

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def pw_bnstats_backward_reference(
    grad: Tensor,
    z: Tensor,
    norm: Tensor,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centre: Tensor | None,
    in_relu: bool,
    first: int,
    step: int,
    channels_in: int,
    channels_out: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> Gradients:
    """Gradients of what pw_bnstats loads and of its weight, and their sums, in plain PyTorch.

    The gradient of z is dz = s * (grad * [not relu or s * z + b > 0] - o - l * (z - m)).

    Args:
        grad: [N, channels_out, H, W], the gradient behind z's batch norm (and ReLU, if ``relu``); packed channels last,
            or a slice of the channels of such a tensor.
        z: what pw_bnstats made.
        norm: [5, channels_out], float32 (float64 for float64): s, b, m, o and l of each channel. For a whole BN layer
            s = gamma * rstd, b = beta - mean * s, m = mean, o = sum / count and l = product * rstd**2 / count, with the
            sum and the product that the pass behind left.
        relu: whether z's batch norm is followed by a ReLU.
        x, weight, scale, shift, first, step, channels_in, channels_out, width_in, width_out: as for pw_bnstats.
        in_relu: its ``relu``.
        centre: [channels_in], dtype of norm; None if the sums are not needed.

    Returns:
        x: [N, channels_in, H, W], the gradient of scale * a + shift for the channels a that were loaded, zero where the
            ReLU clipped; not multiplied with scale. weight: of weight's whole shape, zero outside of the slice. sum and
            product: [channels_in], dtype of norm, the sums over pixels of x's result and of it times (a - centre);
            shape [0] without a centre.
    """
    _check_backward(grad, z, norm, x, channels_out, centre, channels_in)
    check_width("width_in", width_in, x)
    check_width("width_out", width_out, x)
    a = picked(x, first, step, channels_in)
    loaded = only_present(activation(a, scale, shift, in_relu), width_in, 1)
    used = only_present(weight[:channels_out, :channels_in], width_in, 1)
    used = only_present(used, width_out, 0)
    dz = _grad_of_z(grad, z, norm, relu, width_out)
    grad_a = convolution_grad.conv2d_input(list(loaded.shape), used, dz)
    grad_weight = convolution_grad.conv2d_weight(loaded, list(used.shape), dz)
    grad_weight = only_present(only_present(grad_weight, width_in, 1), width_out, 0)
    return _with_sums(grad_a, a, scale, shift, centre, in_relu, width_in, padded(grad_weight, weight.shape))


def dw_bnstats_backward_reference(
    grad: Tensor,
    z: Tensor,
    norm: Tensor,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centre: Tensor | None,
    in_relu: bool,
    stride: int,
    channels: int,
    width: Tensor | None,
) -> Gradients:
    """The same for dw_bnstats: see pw_bnstats_backward_reference. Result x is [N, channels, H, W]."""
    _check_backward(grad, z, norm, x, channels, centre, channels)
    check_width("width", width, x)
    a, used = x[:, :channels], weight[:channels]
    loaded = only_present(activation(a, scale, shift, in_relu), width, 1)
    dz = _grad_of_z(grad, z, norm, relu, width)
    padding = weight.shape[2] // 2
    grad_a = convolution_grad.conv2d_input(
        list(loaded.shape), only_present(used, width, 0), dz, stride, padding, groups=channels
    )
    grad_weight = convolution_grad.conv2d_weight(loaded, list(used.shape), dz, stride, padding, groups=channels)
    return _with_sums(grad_a, a, scale, shift, centre, in_relu, width, padded(grad_weight, weight.shape))


def _grad_of_z(grad: Tensor, z: Tensor, norm: Tensor, relu: bool, width: Tensor | None) -> Tensor:
    s, b, m, o, slope = norm[:, :, None, None]
    wide, wide_z = grad.to(norm.dtype), z.to(norm.dtype)
    if relu:
        wide = torch.where(s * wide_z + b > 0, wide, 0)
    dz = s * (wide - o - slope * (wide_z - m))
    return only_present(dz.to(z.dtype), width, 1).contiguous(memory_format=LAST)


def _with_sums(
    grad_a: Tensor,
    a: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centre: Tensor | None,
    relu: bool,
    width: Tensor | None,
    grad_weight: Tensor,
) -> Gradients:
    """The gradient of what was loaded, behind the ReLU's mask, with its sums."""
    grad_a = only_present(grad_a, width, 1)
    if relu:
        grad_a = torch.where(affine(a, scale, shift) > 0, grad_a, 0)
    grad_a = grad_a.contiguous(memory_format=LAST)
    if centre is None:
        return grad_a, grad_weight, new_statistics(a, 0), new_statistics(a, 0)
    wide = grad_a.to(centre.dtype)
    product = only_present(wide * (a.to(centre.dtype) - centre[:, None, None]), width, 1)
    return grad_a, grad_weight, wide.sum((0, 2, 3)), product.sum((0, 2, 3))


def _check_backward(
    grad: Tensor, z: Tensor, norm: Tensor, x: Tensor, made: int, centre: Tensor | None, loaded: int
) -> None:
    if z.shape[1] != made or grad.shape != z.shape:
        raise InputError(
            f"grad and z must have {made} channels and one shape, got {list(grad.shape)} and {list(z.shape)}"
        )
    if not grad.dtype == z.dtype == x.dtype:
        raise TypeError(f"grad and z must have the dtype of x, {x.dtype}, got {grad.dtype} and {z.dtype}")
    check_statistics("norm", norm, [5, made], x)
    if centre is not None:
        check_statistics("centre", centre, [loaded], x)


def _fake_pw_backward(
    grad: Tensor,
    z: Tensor,
    norm: Tensor,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centre: Tensor | None,
    in_relu: bool,
    first: int,
    step: int,
    channels_in: int,
    channels_out: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> Gradients:
    return _new_gradients(x, weight, channels_in, centre)


def _fake_dw_backward(
    grad: Tensor,
    z: Tensor,
    norm: Tensor,
    relu: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centre: Tensor | None,
    in_relu: bool,
    stride: int,
    channels: int,
    width: Tensor | None,
) -> Gradients:
    return _new_gradients(x, weight, channels, centre)


def _new_gradients(x: Tensor, weight: Tensor, channels: int, centre: Tensor | None) -> Gradients:
    sums = 0 if centre is None else channels
    grad_x = new_image(x, channels, x.shape[2], x.shape[3])
    return grad_x, weight.new_empty(weight.shape), new_statistics(x, sums), new_statistics(x, sums)


pw_backward_op = define_op(
    "pw_bnstats_backward(Tensor grad, Tensor z, Tensor norm, bool relu, Tensor x, Tensor weight, Tensor? scale, "
    "Tensor? shift, Tensor? centre, bool in_relu, int first, int step, SymInt channels_in, SymInt channels_out, "
    "Tensor? width_in, Tensor? width_out) -> (Tensor x, Tensor weight, Tensor sum, Tensor product)",
    reference=pw_bnstats_backward_reference,
    fake=_fake_pw_backward,
    triton="spos_fast.kernels.blocks:pw_bnstats_backward",
)
dw_backward_op = define_op(
    "dw_bnstats_backward(Tensor grad, Tensor z, Tensor norm, bool relu, Tensor x, Tensor weight, Tensor? scale, "
    "Tensor? shift, Tensor? centre, bool in_relu, int stride, SymInt channels, Tensor? width) "
    "-> (Tensor x, Tensor weight, Tensor sum, Tensor product)",
    reference=dw_bnstats_backward_reference,
    fake=_fake_dw_backward,
    triton="spos_fast.kernels.blocks:dw_bnstats_backward",
)
differentiable_once("pw_bnstats_backward", "pw_bnstats")
differentiable_once("dw_bnstats_backward", "dw_bnstats")
