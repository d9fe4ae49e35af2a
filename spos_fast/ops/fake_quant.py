"""Fake quantization with a learned step: PACT, PACT with the residual, LSQ and LSQ+, 1 to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.dispatch import LIBRARY, define_op, differentiable_once
from spos_fast.ops.quantizers import (
    MODES,
    Codes,
    at_index,
    bits_and_index,
    check_mode,
    check_selection,
    check_steps,
    check_values,
    effective_step,
    quantized,
    sign_of,
    step_factor,
    step_terms,
)


def fake_quant(
    x: Tensor,
    step: Tensor,
    bits: int | Tensor,
    *,
    index: int | Tensor = 0,
    mode: str = "lsq",
    signed: bool = False,
    offset: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """Values rounded to the codes of a bit-width and back, with the straight-through gradient.

    The formulas stand at the top of :mod:`spos_fast.ops.quantizers`. ``step`` and ``bits`` may be vectors with an entry
    for each bit-width; ``index`` picks one at run time, without a synchronisation or a recompilation, and the others'
    gradient is zero. Nothing but the arguments is kept for the backward pass. Differentiable, once.

    Args:
        x: float32, float64, float16 or bfloat16, any shape and layout; may be empty.
        step: the parameter, float32 (float64 for float64 x): [K], or [K, C] for a step a channel; PACT's clipping
            level, or LSQ's step. [] and [C] are taken for one bit-width.
        bits: 1 to 8: an int (for all of K), or an int32 tensor [K].
        index: which of the K; an int, or an int32 or int64 tensor [].
        mode: "pact", "pact_residual", "lsq" or "lsq+".
        signed: whether codes are signed; lsq and lsq+ only.
        offset: of lsq+, like ``step``.
        axis: which dimension of x is C long, for a step a channel; None: one step for all.

    Returns:
        Of x's shape, dtype and layout.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: shapes, mode, bit-width or index that do not fit. Values of tensors are not looked at here; kernels
            on the CPU refuse bit-widths and indices out of range.
    """
    if isinstance(step, Tensor) and step.dim() == (0 if axis is None else 1):
        step = step[None]
        offset = offset[None] if isinstance(offset, Tensor) else offset
    bits, index = bits_and_index(x, bits, index, step.shape[0] if isinstance(step, Tensor) and step.dim() else 1)
    if axis is not None and not -x.dim() <= axis < x.dim():
        raise InputError(f"axis must be a dimension of x, which has {x.dim()}, got {axis}")
    along = -1 if axis is None else axis % x.dim()
    _check(x, step, offset, bits, index, mode, signed, along)
    out: Tensor = _op(x, step, offset, bits, index, mode, signed, along)
    return out


def fake_quant_reference(
    x: Tensor, step: Tensor, offset: Tensor | None, bits: Tensor, index: Tensor, mode: str, signed: bool, axis: int
) -> Tensor:
    """What fake_quant computes, in plain PyTorch; axis -1: one step for all."""
    _check(x, step, offset, bits, index, mode, signed, axis)
    codes, size = _codes(x, step, offset, bits, index, mode, signed, axis)
    out = codes.code * size
    if offset is not None:
        out = out + _spread(offset[index], x, axis)
    return torch.empty_like(x).copy_(out)


def fake_quant_backward_reference(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    bits: Tensor,
    index: Tensor,
    mode: str,
    signed: bool,
    axis: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of ``step`` and of ``offset`` (zeros of ``step``'s shape without one), in plain PyTorch."""
    _check(x, step, offset, bits, index, mode, signed, axis)
    _check_grad(grad, x)
    codes, _ = _codes(x, step, offset, bits, index, mode, signed, axis)
    wide = grad.to(step.dtype)
    values = x.numel() if axis < 0 else x.numel() // max(x.shape[axis], 1)
    factor = step_factor(codes.high, mode, values)
    grad_x = torch.empty_like(x).copy_(torch.where(codes.outside, 0, wide))
    grad_step = at_index(_summed(wide * step_terms(codes, mode), axis) * factor * sign_of(step, index), step, index)
    if offset is None:
        return grad_x, grad_step, torch.zeros_like(step)
    outside = _summed(torch.where(codes.outside, wide, 0), axis)
    return grad_x, grad_step, at_index(outside * factor, step, index)


def _codes(
    x: Tensor, step: Tensor, offset: Tensor | None, bits: Tensor, index: Tensor, mode: str, signed: bool, axis: int
) -> tuple[Codes, Tensor]:
    """The codes, and the steps as they broadcast against x."""
    size = _spread(effective_step(step, bits, index, mode), x, axis)
    wide = x.to(step.dtype)
    values = wide if offset is None else wide - _spread(offset[index], x, axis)
    return quantized(values, size, bits, index, signed), size


def _spread(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """[C] as it broadcasts along an axis of x; [] as it is."""
    return values if axis < 0 else values.view([-1 if dim == axis else 1 for dim in range(x.dim())])


def _summed(terms: Tensor, axis: int) -> Tensor:
    """Over all but the axis."""
    return terms.sum() if axis < 0 else terms.movedim(axis, 0).flatten(1).sum(1) if terms.dim() > 1 else terms


def _check(
    x: Tensor, step: Tensor, offset: Tensor | None, bits: Tensor, index: Tensor, mode: str, signed: bool, axis: int
) -> None:
    check_values("x", x)
    check_mode(mode, MODES)
    check_selection(bits, index, x)
    if axis >= x.dim():
        raise InputError(f"axis must be a dimension of x, which has {x.dim()}, got {axis}")
    shape = [bits.shape[0]] if axis < 0 else [bits.shape[0], x.shape[axis]]
    check_steps("step", step, shape, x)
    if (offset is None) != (mode != "lsq+"):
        raise InputError(f"offset must be given for lsq+ and for nothing else, got mode {mode!r}")
    if offset is not None:
        check_steps("offset", offset, shape, x)
    if signed and mode.startswith("pact"):
        raise InputError(f"signed must be False for {mode}, which clips at 0")


def _check_grad(grad: Tensor, x: Tensor) -> None:
    if grad.dtype != x.dtype or grad.shape != x.shape:
        raise InputError(f"grad must be like x, {x.dtype} {list(x.shape)}, got {grad.dtype} {list(grad.shape)}")


def _fake(
    x: Tensor, step: Tensor, offset: Tensor | None, bits: Tensor, index: Tensor, mode: str, signed: bool, axis: int
) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, step: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), step.new_empty(step.shape), step.new_empty(step.shape)


_op = define_op(
    "fake_quant(Tensor x, Tensor step, Tensor? offset, Tensor bits, Tensor index, str mode, bool signed, int axis) "
    "-> Tensor",
    reference=fake_quant_reference,
    fake=_fake,
    triton="spos_fast.kernels.quantization:fake_quant",
)
_backward_op = define_op(
    "fake_quant_backward(Tensor grad, Tensor x, Tensor step, Tensor? offset, Tensor bits, Tensor index, str mode, "
    "bool signed, int axis) -> (Tensor, Tensor, Tensor)",
    reference=fake_quant_backward_reference,
    fake=_fake_backward,
    triton="spos_fast.kernels.quantization:fake_quant_backward",
)
differentiable_once("fake_quant_backward", "fake_quant")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, step, offset, bits, index, ctx.mode, ctx.signed, ctx.axis = inputs
    ctx.save_for_backward(x, step, offset, bits, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, step, offset, bits, index = ctx.saved_tensors
    grad_x, grad_step, grad_offset = _backward_op(grad, x, step, offset, bits, index, ctx.mode, ctx.signed, ctx.axis)
    return grad_x, grad_step, None if offset is None else grad_offset, None, None, None, None, None


torch.library.register_autograd("spos_fast::fake_quant", _backward, setup_context=_save_for_backward, lib=LIBRARY)
