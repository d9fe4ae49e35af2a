"""What fused units are made of: a convolution with the layer in front on load and batch statistics on store.

A layer here is convolution, batch norm, maybe ReLU. Its normalisation needs the convolution's whole output, so it is
not applied where that is made but where the next layer loads it: as a scale and a shift a channel. One pass over memory
a layer is left, forwards (pw_bnstats for 1x1, dw_bnstats for depthwise convolutions) and backwards
(block_gradients.py); bn_act_cat.py applies the last normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.ops.block_gradients import dw_backward_op, pw_backward_op
from spos_fast.ops.channels import (
    LAST,
    activation,
    check_affine,
    check_image,
    check_weight,
    check_width,
    in_autocast_dtype,
    new_image,
    new_statistics,
    only_present,
    picked,
    scattered,
    strided_size,
    width_of,
)
from spos_fast.ops.dispatch import LIBRARY, define_op
from spos_fast.ops.groups import check_groups, each, joined, joined_gradients, runs
from spos_fast.ops.layout import channels_last


class BNStats(NamedTuple):
    """A convolution's output and its batch statistics.

    Attributes:
        z: [N, C, H, W], channels last, the convolution's output before normalisation.
        mean: [C], float32 (float64 for float64): the mean of each channel of z.
        m2: likewise, the sum of (z - mean)**2; divide by N * H * W for the biased variance.
    """

    z: Tensor
    mean: Tensor
    m2: Tensor


def pw_bnstats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
    first: int = 0,
    step: int = 1,
    channels_in: int | Tensor | None = None,
    channels_out: int | Tensor | None = None,
) -> BNStats:
    """1x1 convolution of normalised, maybe clipped channels of x, and the batch statistics of its output.

    z = conv(relu(scale * x[:, first::step] + shift), weight[:channels_out, :channels_in]). Nothing outside of the slice
    is read. Differentiable once, in x, weight, scale and shift, through all of z, mean and m2; gradients outside of the
    slice are exactly zero. The result is channels last.

    Args:
        x: [N, C, H, W], channels last (anything else is copied, with one warning); float32, float64, float16 or
            bfloat16. Under autocast, x and weight are cast to its dtype.
        weight: [stored out, stored in, 1, 1], dtype of x.
        scale: [channels in], float32 (float64 for float64), applied to the channels on load; given with ``shift``.
        shift: likewise.
        relu: whether to clip what is loaded at zero, after scale and shift.
        first: the first channel of x that is used.
        step: the distance from one used channel to the next; 2 for every other one.
        channels_in: how many of the stored input channels are used, the first ones; None for all. Or an int32 tensor []
            on x's device, read at run time (a CUDA graph may be replayed on another value): sizes then are those of
            all stored channels, and scale and shift of that size.
        channels_out: likewise, of the stored output channels. Given as a tensor, absent channels are zero in z, mean
            and m2 and in all gradients. Zeros in z cost a pass of their own; the raw op leaves there what it finds.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, or channels that are not there.
    """
    x, weight = in_autocast_dtype(x, weight)
    stored = weight.shape if isinstance(weight, Tensor) and weight.dim() > 1 else (0, 0)
    used_in, width_in = width_of("channels_in", channels_in, stored[1])
    used_out, width_out = width_of("channels_out", channels_out, stored[0])
    _check_pw(x, weight, scale, shift, first, step, used_in, used_out, width_in, width_out)
    x = channels_last(x, "pw_bnstats")
    made = _pw_op(x, weight, scale, shift, relu, first, step, used_in, used_out, width_in, width_out)
    return _without_absent(made, width_out)


def dw_bnstats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
    stride: int = 1,
    channels: int | Tensor | None = None,
) -> BNStats:
    """Depthwise convolution of normalised, maybe clipped channels of x, and the batch statistics of its output.

    z = conv(relu(scale * x[:, :channels] + shift), weight[:channels]), with zeros around the clipped image, k // 2 on
    each side. Slices, gradients and layouts as for :func:`pw_bnstats`.

    Args:
        x: [N, C, H, W], as for pw_bnstats; the first ``channels`` of its C channels are used.
        weight: [stored, 1, k, k], k odd, dtype of x.
        scale: [channels], float32 (float64 for float64); given with ``shift``.
        shift: likewise.
        relu: whether to clip what is loaded at zero, after scale and shift.
        stride: of the convolution; z has (H - 1) // stride + 1 rows.
        channels: how many of the stored channels are used: an int, None for all, or an int32 tensor [] on x's device.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, or channels that are not there.
    """
    x, weight = in_autocast_dtype(x, weight)
    stored = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() > 0 else 0
    used, width = width_of("channels", channels, stored)
    _check_dw(x, weight, scale, shift, stride, used, width)
    x = channels_last(x, "dw_bnstats")
    return _without_absent(_dw_op(x, weight, scale, shift, relu, stride, used, width), width)


def pw_bnstats_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    first: int,
    step: int,
    channels_in: int,
    channels_out: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op pw_bnstats computes, in plain PyTorch: z, mean, m2. The widths: how many channels are really used."""
    _check_pw(x, weight, scale, shift, first, step, channels_in, channels_out, width_in, width_out)
    a = activation(picked(x, first, step, channels_in), scale, shift, relu)
    used = only_present(weight[:channels_out, :channels_in], width_in, 1)
    return _with_statistics(functional.conv2d(only_present(a, width_in, 1), used), width_out)


def dw_bnstats_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    stride: int,
    channels: int,
    width: Tensor | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op dw_bnstats computes, in plain PyTorch: z, mean, m2.

    width: how many channels are really used. groups: runs of images one behind the other, with scale and shift, each
    [groups, channels], and statistics of their own.
    """
    _check_dw(x, weight, scale, shift, stride, channels, width, groups)
    if groups > 1:
        z, mean, m2 = joined(
            [
                dw_bnstats_reference(image, weight, own_scale, own_shift, relu, stride, channels, width)
                for image, own_scale, own_shift in runs(groups, (x,), (scale, shift))
            ]
        )
        return z, mean, m2
    a = activation(x[:, :channels], scale, shift, relu)
    z = functional.conv2d(a, weight[:channels], None, stride, weight.shape[2] // 2, groups=channels)
    return _with_statistics(z, width)


def _without_absent(made: tuple[Tensor, Tensor, Tensor], width: Tensor | None) -> BNStats:
    z, mean, m2 = made
    return BNStats(only_present(z, width, 1), mean, m2)


def _with_statistics(z: Tensor, width: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    z = only_present(z, width, 1).contiguous(memory_format=LAST)
    wide = z if z.dtype == torch.float64 else z.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return z, mean, var * (z.numel() // z.shape[1])


def _check_pw(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    first: int,
    step: int,
    channels_in: int,
    channels_out: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> None:
    check_image("x", x)
    check_weight(weight, x)
    if weight.shape[2:] != (1, 1):
        raise InputError(f"weight must be [out, in, 1, 1], got shape {list(weight.shape)}")
    for name, used, stored in (
        ("channels_in", channels_in, weight.shape[1]),
        ("channels_out", channels_out, weight.shape[0]),
    ):
        if not 1 <= used <= stored:
            raise InputError(f"{name} must be from 1 to {stored}, the channels that weight stores, got {used}")
    if first < 0 or step < 1 or first + step * (channels_in - 1) >= x.shape[1]:
        raise InputError(
            f"channels {first}, {first + step}, ... of x must be there, {channels_in} in all; x has {x.shape[1]}"
        )
    check_affine("scale", scale, "shift", shift, channels_in, x)
    check_width("channels_in", width_in, x)
    check_width("channels_out", width_out, x)


def _check_dw(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    channels: int,
    width: Tensor | None,
    groups: int = 1,
) -> None:
    check_image("x", x)
    check_weight(weight, x)
    stored, one, k, _ = weight.shape
    if one != 1 or weight.shape[3] != k or k % 2 == 0:
        raise InputError(f"weight must be [channels, 1, k, k] with an odd k, got shape {list(weight.shape)}")
    most = min(stored, x.shape[1])
    if not 1 <= channels <= most:
        raise InputError(f"channels must be from 1 to {most}, what weight and x have, got {channels}")
    if stride < 1:
        raise InputError(f"stride must be 1 or more, got {stride}")
    check_groups(groups, x)
    check_affine("scale", scale, "shift", shift, channels, x, groups)
    check_width("channels", width, x)


def _fake_pw(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    first: int,
    step: int,
    channels_in: int,
    channels_out: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    z = new_image(x, channels_out, x.shape[2], x.shape[3])
    return z, new_statistics(x, channels_out), new_statistics(x, channels_out)


def _fake_dw(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    stride: int,
    channels: int,
    width: Tensor | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    z = new_image(x, channels, *strided_size(x, stride))
    size = each(groups, channels)
    return z, new_statistics(x, *size), new_statistics(x, *size)


_pw_op = define_op(
    "pw_bnstats(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool relu, int first, int step, "
    "SymInt channels_in, SymInt channels_out, Tensor? width_in, Tensor? width_out) "
    "-> (Tensor z, Tensor mean, Tensor m2)",
    reference=pw_bnstats_reference,
    fake=_fake_pw,
    triton="spos_fast.kernels.blocks:pw_bnstats",
    autocast=(0, 1),
)
# Groups are the raw op's only: with them the units' launchers run a layer of all groups in one pass.
_dw_op = define_op(
    "dw_bnstats(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool relu, int stride, "
    "SymInt channels, Tensor? width, int groups=1) -> (Tensor z, Tensor mean, Tensor m2)",
    reference=dw_bnstats_reference,
    fake=_fake_dw,
    triton="spos_fast.kernels.blocks:dw_bnstats",
    autocast=(0, 1),
)


def _save_pw(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, scale, shift, *ctx.settings, width_in, width_out = inputs
    ctx.save_for_backward(*output[:2], x, weight, scale, shift, width_in, width_out)
    ctx.set_materialize_grads(False)


def _save_dw(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, scale, shift, *ctx.settings, width, ctx.groups = inputs
    ctx.save_for_backward(*output[:2], x, weight, scale, shift, width)
    ctx.set_materialize_grads(False)


def _backward_pw(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _, first, step, _, _ = ctx.settings
    return *_backward(pw_backward_op, ctx.saved_tensors, ctx.settings, grads, first, step), *(None,) * 7


def _backward_dw(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.groups == 1:
        return *_backward(dw_backward_op, ctx.saved_tensors, ctx.settings, grads, 0, 1), *(None,) * 5
    z, mean, x, weight, scale, shift, width = ctx.saved_tensors
    grad = torch.zeros_like(z) if grads[0] is None else grads[0]
    each_run = runs(ctx.groups, (z, x, grad), (mean, scale, shift, *grads[1:]))
    found = [
        _backward(dw_backward_op, (z, mean, x, weight, scale, shift, width), ctx.settings, (grad, *later), 0, 1)
        for z, x, grad, mean, scale, shift, *later in each_run
    ]
    dx, dw, *affine = joined_gradients(found, own=2)
    assert dw is not None
    return dx, dw.to(weight.dtype), *affine, *(None,) * 5


def _backward(
    op: Any,
    saved: Sequence[Any],
    settings: Sequence[Any],
    grads: Sequence[Tensor | None],
    first: int,
    step: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, scale and shift, for gradients of z, mean and m2."""
    z, mean, x, weight, scale, shift, *widths = saved
    grad, grad_mean, grad_m2 = grads
    grad = torch.zeros_like(z) if grad is None else grad.contiguous(memory_format=LAST)
    # d mean / dz = 1/n; d m2 / dz = 2 (z - mean), for sum(z - mean) = 0 takes the mean's own share away.
    zeros = torch.zeros_like(mean)
    offset = zeros if grad_mean is None else -grad_mean / (z.numel() // z.shape[1])
    slope = zeros if grad_m2 is None else -2 * grad_m2
    norm = torch.stack((torch.ones_like(mean), zeros, mean, offset, slope))
    centre = None if scale is None else torch.zeros_like(scale)
    grad_x, grad_weight, total, product = op(grad, z, norm, False, x, weight, scale, shift, centre, *settings, *widths)
    if scale is None:
        return scattered(grad_x, x, first, step), grad_weight, None, None
    used = only_present(scale, widths[0], 0)
    grad_x = (grad_x.to(scale.dtype) * used[:, None, None]).to(x.dtype)
    return scattered(grad_x, x, first, step), grad_weight, product, total


torch.library.register_autograd("spos_fast::pw_bnstats", _backward_pw, setup_context=_save_pw, lib=LIBRARY)
torch.library.register_autograd("spos_fast::dw_bnstats", _backward_dw, setup_context=_save_dw, lib=LIBRARY)
