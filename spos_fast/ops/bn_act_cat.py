"""The end of a unit: the last normalisation with its ReLU, written behind the channels that pass or the projection's.

The concatenation costs nothing then: each half is written once, where it belongs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.channels import (
    LAST,
    activation,
    affine,
    check_affine,
    check_image,
    check_statistics,
    in_autocast_dtype,
    new_image,
    new_statistics,
    scattered,
)
from spos_fast.ops.dispatch import LIBRARY, define_op, differentiable_once
from spos_fast.ops.layout import channels_last


def bn_act_cat(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    other: Tensor | None = None,
    other_scale: Tensor | None = None,
    other_shift: Tensor | None = None,
    *,
    relu: bool = True,
) -> Tensor:
    """relu(scale * z + shift), alone or behind the channels of another image.

    Those are the even channels of ``other`` as they are, or all of its channels as relu(other_scale * other +
    other_shift). Differentiable once, in all tensors.

    Args:
        z: [N, C, H, W], channels last (anything else is copied, with one warning); float32, float64, float16 or
            bfloat16. Under autocast, z and ``other`` are cast to its dtype.
        scale: [C], float32 (float64 for float64).
        shift: likewise.
        other: None, or [N, D, H, W], dtype of z.
        other_scale: None, or [D], dtype of scale; given with ``other_shift``.
        other_shift: likewise.
        relu: whether to clip at zero what scale and shift gave, of z and of ``other``.

    Returns:
        [N, C, H, W], [N, ceil(D / 2) + C, H, W] or [N, D + C, H, W], dtype of z, channels last.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together.
    """
    z, other = in_autocast_dtype(z, other)
    _check(z, scale, shift, other, other_scale, other_shift)
    z = channels_last(z, "bn_act_cat", "z")
    if other is not None:
        other = channels_last(other, "bn_act_cat", "other")
    out: Tensor = _op(z, scale, shift, other, other_scale, other_shift, relu)
    return out


def bn_act_cat_reference(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    other: Tensor | None,
    other_scale: Tensor | None,
    other_shift: Tensor | None,
    relu: bool = True,
) -> Tensor:
    """What bn_act_cat computes, in plain PyTorch."""
    _check(z, scale, shift, other, other_scale, other_shift)
    parts = [activation(z, scale, shift, relu)]
    if other is not None:
        passing = other_scale is None
        parts.insert(0, other[:, ::2] if passing else activation(other, other_scale, other_shift, relu))
    return torch.cat(parts, 1).contiguous(memory_format=LAST)


def bn_act_cat_backward_reference(
    grad: Tensor, first: int, z: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """The two sums that a BN layer's backward pass starts from, in plain PyTorch.

    With g = grad[:, first : first + C], zero where ``relu`` and scale * z + shift <= 0: the sums over pixels of g and
    of g * (z - mean). scale, shift and mean are [C] for z [N, C, H, W], as the sums are; grad is packed channels last.
    """
    if grad.shape[0] != z.shape[0] or grad.shape[2:] != z.shape[2:] or not 0 <= first <= grad.shape[1] - z.shape[1]:
        raise InputError(
            f"grad must hold z's channels from {first} on, got shapes {list(grad.shape)} and {list(z.shape)}"
        )
    if grad.dtype != z.dtype:
        raise TypeError(f"grad must have the dtype of z, {z.dtype}, got {grad.dtype}")
    for name, value in (("scale", scale), ("shift", shift), ("mean", mean)):
        check_statistics(name, value, [z.shape[1]], z)
    masked = _masked(grad[:, first : first + z.shape[1]], z, scale, shift, relu)
    product = masked * (z.to(masked.dtype) - mean[:, None, None])
    return masked.sum((0, 2, 3)), product.sum((0, 2, 3))


def _masked(grad: Tensor, z: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """The gradient of scale * z + shift, in the dtype of statistics."""
    wide = grad.to(scale.dtype)
    return torch.where(affine(z, scale, shift) > 0, wide, 0) if relu else wide


def _check(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    other: Tensor | None,
    other_scale: Tensor | None,
    other_shift: Tensor | None,
) -> None:
    check_image("z", z)
    for name, value in (("scale", scale), ("shift", shift)):
        check_statistics(name, value, [z.shape[1]], z)
    if other is None:
        if other_scale is not None or other_shift is not None:
            raise InputError("other_scale and other_shift must be left out where there is no other")
        return
    check_image("other", other)
    if other.dtype != z.dtype:
        raise TypeError(f"other must have the dtype of z, {z.dtype}, got {other.dtype}")
    if other.shape[0] != z.shape[0] or other.shape[2:] != z.shape[2:]:
        raise InputError(f"other must have the images of z, got shapes {list(other.shape)} and {list(z.shape)}")
    check_affine("other_scale", other_scale, "other_shift", other_shift, other.shape[1], z)


def _passing(other: Tensor | None, other_scale: Tensor | None) -> int:
    """How many channels stand in front of z's."""
    if other is None:
        return 0
    return (other.shape[1] + 1) // 2 if other_scale is None else other.shape[1]


def _fake(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    other: Tensor | None,
    other_scale: Tensor | None,
    other_shift: Tensor | None,
    relu: bool = True,
) -> Tensor:
    return new_image(z, _passing(other, other_scale) + z.shape[1], z.shape[2], z.shape[3])


def _fake_backward(
    grad: Tensor, first: int, z: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    return new_statistics(z, z.shape[1]), new_statistics(z, z.shape[1])


_op = define_op(
    "bn_act_cat(Tensor z, Tensor scale, Tensor shift, Tensor? other, Tensor? other_scale, Tensor? other_shift, "
    "bool relu=True) -> Tensor",
    reference=bn_act_cat_reference,
    fake=_fake,
    triton="spos_fast.kernels.blocks:bn_act_cat",
    autocast=(0, 3),
)
_backward_op = define_op(
    "bn_act_cat_backward(Tensor grad, int first, Tensor z, Tensor scale, Tensor shift, Tensor mean, bool relu) "
    "-> (Tensor sum, Tensor product)",
    reference=bn_act_cat_backward_reference,
    fake=_fake_backward,
    triton="spos_fast.kernels.blocks:bn_act_cat_backward",
)
differentiable_once("bn_act_cat_backward", "bn_act_cat")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.relu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, scale, shift, other, other_scale, other_shift = ctx.saved_tensors
    grad = grad.contiguous(memory_format=LAST)
    first = _passing(other, other_scale)
    grads = _layer(grad, first, z, scale, shift, ctx.relu)
    if other is None:
        return *grads, None, None, None, None
    if other_scale is None:
        return *grads, scattered(grad[:, :first], other, 0, 2), None, None, None
    return *grads, *_layer(grad, 0, other, other_scale, other_shift, ctx.relu), None


def _layer(
    grad: Tensor, first: int, z: Tensor, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, scale and shift."""
    total, product = _backward_op(grad, first, z, scale, shift, torch.zeros_like(scale), relu)
    masked = _masked(grad[:, first : first + z.shape[1]], z, scale, shift, relu)
    return (masked * scale[:, None, None]).to(z.dtype), product, total


torch.library.register_autograd("spos_fast::bn_act_cat", _backward, setup_context=_save_for_backward, lib=LIBRARY)
