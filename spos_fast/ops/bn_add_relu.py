"""The end of a residual block in one pass: batch norm with given scale and shift, the shortcut added, ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.channels import LAST, check_image, check_statistics
from spos_fast.ops.dispatch import LIBRARY, define_op, differentiable_once
from spos_fast.ops.layout import channels_last
from spos_fast.ops.unit_layers import statistics_dtype

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def bn_add_relu(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    *,
    groups: int = 1,
) -> Tensor:
    """ReLU of scale * x + shift + residual, or + (residual_scale * residual + residual_shift) for a shortcut that has a
    batch norm of its own.

    Computed in the dtype of the statistics and rounded once; a NaN stays where it is. The bits of a group are those of
    a call of its own. Differentiable once.

    Args:
        x: [N, C, H, W], not empty; float32, float64, float16 or bfloat16. Read and written channels last; another
            layout is copied, with a warning.
        scale, shift: [groups, C], float32 (float64 for float64).
        residual: as x.
        residual_scale, residual_shift: as scale; both or none.
        groups: splits the batch in this many equal runs of samples; divides N.

    Returns:
        [N, C, H, W], dtype of x, channels last.

    Raises:
        TypeError: an argument is no tensor or of a dtype that does not fit; groups is no int.
        InputError: shapes that do not fit together.
    """
    _check(x, scale, shift, residual, residual_scale, residual_shift, groups)
    x, residual = channels_last(x, "bn_add_relu"), channels_last(residual, "bn_add_relu", "residual")
    out: Tensor = _op(x, scale, shift, residual, residual_scale, residual_shift, groups)
    return out


def bn_add_relu_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """What bn_add_relu computes, in plain PyTorch."""
    _check(x, scale, shift, residual, residual_scale, residual_shift, groups)
    wide, added = _grouped(x, groups), _grouped(residual, groups)
    if residual_scale is not None and residual_shift is not None:
        added = added * _per_channel(residual_scale) + _per_channel(residual_shift)
    out = (wide * _per_channel(scale) + _per_channel(shift) + added).relu().flatten(0, 1)
    return out.to(x.dtype).contiguous(memory_format=LAST)


def bn_add_relu_backward_reference(
    grad: Tensor, out: Tensor, x: Tensor, scale: Tensor, residual: Tensor, residual_scale: Tensor | None, groups: int
) -> Results:
    """Gradients of x, residual, scale, shift (residual_shift's, too) and residual_scale (empty without one)."""
    through = torch.where(_grouped(out, groups) <= 0, 0, _grouped(grad, groups))
    wide, added = _grouped(x, groups), _grouped(residual, groups)

    def image(values: Tensor) -> Tensor:
        return values.flatten(0, 1).to(x.dtype).contiguous(memory_format=LAST)

    grad_residual = through if residual_scale is None else through * _per_channel(residual_scale)
    return (
        image(through * _per_channel(scale)),
        image(grad_residual).clone(memory_format=LAST),
        (through * wide).sum((1, 3, 4)),
        through.sum((1, 3, 4)),
        scale.new_empty(0) if residual_scale is None else (through * added).sum((1, 3, 4)),
    )


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[groups, N / groups, C, H, W] in the dtype of the statistics."""
    return x.to(statistics_dtype(x)).unflatten(0, (groups, x.shape[0] // groups))


def _per_channel(values: Tensor) -> Tensor:
    """[groups, C] as it broadcasts against [groups, N / groups, C, H, W]."""
    return values[:, None, :, None, None]


def _check(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    groups: int,
) -> None:
    check_image("x", x)
    check_image("residual", residual)
    if residual.shape != x.shape or residual.device != x.device:
        raise InputError(
            f"residual must be {list(x.shape)} on {x.device}, as x, got {list(residual.shape)} on {residual.device}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or x.shape[0] % groups != 0:
        raise InputError(f"groups must divide the batch of {x.shape[0]} samples, got {groups}")
    if (residual_scale is None) != (residual_shift is None):
        raise InputError("residual_scale and residual_shift must be given together, or neither")
    beside = {"residual_scale": residual_scale, "residual_shift": residual_shift}
    for name, value in {"scale": scale, "shift": shift, **beside}.items():
        if value is not None or name not in beside:
            check_statistics(name, value, [groups, x.shape[1]], x)  # type: ignore[arg-type]


def _fake(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=LAST)


def _fake_backward(
    grad: Tensor, out: Tensor, x: Tensor, scale: Tensor, residual: Tensor, residual_scale: Tensor | None, groups: int
) -> Results:
    images = (torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=LAST) for _ in range(2))
    beside = scale.new_empty(0) if residual_scale is None else torch.empty_like(scale)
    return (*images, torch.empty_like(scale), torch.empty_like(scale), beside)  # type: ignore[return-value]


_op = define_op(
    "bn_add_relu(Tensor x, Tensor scale, Tensor shift, Tensor residual, Tensor? residual_scale=None, "
    "Tensor? residual_shift=None, int groups=1) -> Tensor",
    reference=bn_add_relu_reference,
    fake=_fake,
    triton="spos_fast.kernels.bn_add_relu:bn_add_relu",
)
_backward_op = define_op(
    "bn_add_relu_backward(Tensor grad, Tensor out, Tensor x, Tensor scale, Tensor residual, Tensor? residual_scale, "
    "int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=bn_add_relu_backward_reference,
    fake=_fake_backward,
    triton="spos_fast.kernels.bn_add_relu:bn_add_relu_backward",
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, residual, residual_scale, _, ctx.groups = inputs
    # Of a plain shortcut the gradient needs no values.
    ctx.save_for_backward(output, x, scale, residual if residual_scale is not None else None, residual_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, x, scale, residual, residual_scale = ctx.saved_tensors
    plain = residual_scale is None
    grad_x, grad_residual, grad_scale, grad_shift, grad_residual_scale = _backward_op(
        grad, out, x, scale, out if plain else residual, residual_scale, ctx.groups
    )
    beside = (None, None) if plain else (grad_residual_scale, grad_shift.clone())
    return grad_x, grad_scale, grad_shift, grad_residual, *beside, None


torch.library.register_autograd("spos_fast::bn_add_relu", _backward, setup_context=_save_for_backward, lib=LIBRARY)
differentiable_once("bn_add_relu_backward", "bn_add_relu")
