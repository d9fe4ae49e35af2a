"""Fake-quantized weights: DoReFa with its 1-bit branch, and LSQ; 1 to 8 bits.

DoReFa (Zhou et al., arXiv 1606.06160), with t = tanh(w), m = max |t| and n = 2^k - 1: the code is 2 q - n, an odd
number from -n to n, with q = round(n (t / (2 m) + 1/2)), ties to even, and the weight code / n. From g, the gradient of
that, w gets g (1 - t^2) / m, and the greatest |w| also - sign(t) (1 - t^2) / m^2 times the sum of g t: the gradient
through the maximum, split evenly among equal ones, which ``detach_max`` leaves out. Where m is less than the least
normal number, as of weights that are all zero, it is taken for a constant 1. There is no zero level: a weight of zero
is a tie, and becomes 1 / n.

A single bit is E sign(w), E = mean |w| and sign(0) = 1 (XNOR-Net, Rastegari et al., arXiv 1603.05279, as DoReFa has
it); E is a constant in the backward pass and w gets g.

m and E are of the whole tensor, or of each output channel with ``per_channel``. Computed in float32 (float64 for
float64). LSQ is :func:`spos_fast.ops.fake_quant` of signed codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.dispatch import LIBRARY, define_op, differentiable_once
from spos_fast.ops.fake_quant import fake_quant
from spos_fast.ops.quantizers import bits_and_index, check_mode, check_selection, check_values
from spos_fast.ops.unit_layers import statistics_dtype

MODES = ("dorefa", "lsq")


def quantize_weights(
    weight: Tensor,
    bits: int | Tensor,
    *,
    index: int | Tensor = 0,
    mode: str = "dorefa",
    step: Tensor | None = None,
    per_channel: bool = False,
    detach_max: bool = False,
) -> Tensor:
    """Weights rounded to the levels of a bit-width, with the straight-through gradient.

    Differentiable, once; nothing but the arguments is kept for the backward pass. A NaN makes all that shares its
    maximum or mean NaN.

    Args:
        weight: [C_out, ...], float32, float64, float16 or bfloat16, of any layout; may be empty.
        bits: 1 to 8: an int, or an int32 tensor [K].
        index: which of the K; an int, or an int32 or int64 tensor [].
        mode: "dorefa" or "lsq".
        step: LSQ's steps, [K], or [K, C_out] with ``per_channel``; see :func:`fake_quant`.
        per_channel: a maximum, mean or step for each output channel.
        detach_max: whether DoReFa's maximum is a constant in the backward pass.

    Returns:
        Of the weight's shape, dtype and layout.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: shapes, mode, bit-width or index that do not fit, or a step that is missing or too much.
    """
    check_values("weight", weight)
    check_mode(mode, MODES)
    if (step is None) != (mode == "dorefa"):
        raise InputError(f"step must be given for lsq and for nothing else, got mode {mode!r}")
    if step is not None:
        axis = 0 if per_channel else None
        return fake_quant(weight, step, bits, index=index, mode="lsq", signed=True, axis=axis)
    bits, index = bits_and_index(weight, bits, index, 1)
    _check(weight, bits, index, per_channel)
    out: Tensor = _op(weight, bits, index, per_channel, detach_max)
    return out


def dorefa_weights_reference(
    weight: Tensor, bits: Tensor, index: Tensor, per_channel: bool, detach_max: bool
) -> Tensor:
    """What quantize_weights computes for DoReFa, in plain PyTorch."""
    _check(weight, bits, index, per_channel)
    code, scale = dorefa_codes(weight, bits, index, per_channel)
    return torch.empty_like(weight).copy_((code * scale).view(weight.shape))


def dorefa_weights_backward_reference(
    grad: Tensor, weight: Tensor, bits: Tensor, index: Tensor, per_channel: bool, detach_max: bool
) -> Tensor:
    """Gradient of the weights, in plain PyTorch."""
    _check(weight, bits, index, per_channel)
    if grad.dtype != weight.dtype or grad.shape != weight.shape:
        raise InputError(
            f"grad must be like weight, {weight.dtype} {list(weight.shape)}, got {grad.dtype} {list(grad.shape)}"
        )
    if weight.numel() == 0:
        return torch.empty_like(weight)
    rows, g = _rows(weight, per_channel), _rows(grad, per_channel)
    t, greatest = torch.tanh(rows), rows.abs().amax(1, keepdim=True)
    m, constant = _maximum(greatest)
    slope = (1 - t * t) / m
    through = g * slope
    if not detach_max:
        at = (rows.abs() == greatest) & ~constant
        share = (g * t).sum(1, keepdim=True) / m / at.sum(1, keepdim=True)
        through = torch.where(at, through - t.sign() * slope * share, through)
    out = torch.where(bits[index] == 1, g, through)
    return torch.empty_like(weight).copy_(out.view(weight.shape))


def dorefa_codes(weight: Tensor, bits: Tensor, index: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """DoReFa's odd codes as floats, [rows, columns], and what they are multiplied by, [rows, 1].

    Args:
        weight: [C_out, ...].
        bits: [K].
        index: [].
        per_channel: whether a row is an output channel, or all there is.
    """
    rows, k = _rows(weight, per_channel), bits[index]
    if rows.shape[1] == 0:
        return rows, rows.new_ones(rows.shape[0], 1)
    n = torch.exp2(k.to(rows.dtype)) - 1
    m, _ = _maximum(rows.abs().amax(1, keepdim=True))
    many = 2 * (n * (torch.tanh(rows) / (2 * m) + 0.5)).round() - n
    single = torch.where(rows >= 0, 1.0, torch.where(rows < 0, -1.0, rows))
    mean = rows.abs().mean(1, keepdim=True)
    return torch.where(k == 1, single, many), torch.where(k == 1, mean, 1 / n)


def _rows(weight: Tensor, per_channel: bool) -> Tensor:
    """What shares a maximum, one row each, in the dtype of the computation."""
    rows = weight.shape[0] if per_channel else 1
    return weight.to(statistics_dtype(weight)).reshape(rows, weight.numel() // max(rows, 1))


def _maximum(greatest: Tensor) -> tuple[Tensor, Tensor]:
    """M from the greatest |w|, and where it is a constant."""
    m = torch.tanh(greatest)
    constant = m < torch.finfo(m.dtype).smallest_normal
    return torch.where(constant, 1.0, m), constant


def _check(weight: Tensor, bits: Tensor, index: Tensor, per_channel: bool) -> None:
    check_values("weight", weight)
    check_selection(bits, index, weight)
    if per_channel and weight.dim() == 0:
        raise InputError("weight must have output channels for per_channel, got a tensor without dimensions")


def _fake(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def _fake_backward(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


_op = define_op(
    "dorefa_weights(Tensor weight, Tensor bits, Tensor index, bool per_channel, bool detach_max) -> Tensor",
    reference=dorefa_weights_reference,
    fake=_fake,
)
_backward_op = define_op(
    "dorefa_weights_backward(Tensor grad, Tensor weight, Tensor bits, Tensor index, bool per_channel, "
    "bool detach_max) -> Tensor",
    reference=dorefa_weights_backward_reference,
    fake=_fake_backward,
)
differentiable_once("dorefa_weights_backward", "quantize_weights")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, bits, index, ctx.per_channel, ctx.detach_max = inputs
    ctx.save_for_backward(weight, bits, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.per_channel, ctx.detach_max), None, None, None, None


torch.library.register_autograd("spos_fast::dorefa_weights", _backward, setup_context=_save_for_backward, lib=LIBRARY)
