"""Integer codes of activations and weights: what a convolution on codes is built of.

Formulas are those of :mod:`spos_fast.ops.quantizers` and :mod:`spos_fast.ops.quantize_weights`. These ops have no
autograd of their own: whoever multiplies codes calls the backward ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import DTYPES
from spos_fast.ops.channels import LAST, affine, check_affine, check_image
from spos_fast.ops.dispatch import define_op, not_differentiable
from spos_fast.ops.quantize_weights import MODES as WEIGHT_MODES
from spos_fast.ops.quantize_weights import dorefa_codes
from spos_fast.ops.quantizers import (
    Codes,
    at_index,
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
from spos_fast.ops.unit_layers import statistics_dtype

ACTIVATION_MODES = ("pact", "pact_residual", "lsq")


def quantize_codes_reference(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, step: Tensor, bits: Tensor, index: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """Unsigned codes of scale * x + shift, in plain PyTorch.

    Args:
        x: [N, C, H, W], not empty; float32, float64, float16 or bfloat16, of any layout.
        scale, shift: [C], float32 (float64 for float64 x), or both None. The quantizer's lower end is the ReLU.
        step: [K], of the same dtype.
        bits: int32 [K], 1 to 8.
        index: int32 or int64 [].
        mode: "pact", "pact_residual" or "lsq".

    Returns:
        codes: uint8 [N, C, H, W], channels last; 0 for NaN.
        step_used: [], dtype of the step: the step, or NaN if a NaN was quantized.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: shapes or a mode that do not fit.
    """
    _check_image(x, scale, shift, step, bits, index, mode)
    codes, size = _codes(x, scale, shift, step, bits, index, mode)
    missing = codes.v.isnan()
    whole = torch.where(missing, 0, codes.code).to(torch.uint8).contiguous(memory_format=LAST)
    return whole, torch.where(missing.any(), torch.nan, size)


def quantize_codes_backward_reference(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    step: Tensor,
    bits: Tensor,
    index: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients from that of step_used * codes, in plain PyTorch.

    Args:
        grad: [N, C, H, W], dtype of x, of any layout.
        x, scale, shift, step, bits, index, mode: of the forward call.

    Returns:
        grad_x: [N, C, H, W], dtype of x, channels last.
        grad_step: [K]; zero but at the index.
        grad_scale, grad_shift: [C]; zeros if there are none.
    """
    _check_image(x, scale, shift, step, bits, index, mode)
    if grad.dtype != x.dtype or grad.shape != x.shape:
        raise InputError(f"grad must be like x, {x.dtype} {list(x.shape)}, got {grad.dtype} {list(grad.shape)}")
    codes, _ = _codes(x, scale, shift, step, bits, index, mode)
    wide = grad.to(step.dtype)
    total = (wide * step_terms(codes, mode)).sum() * step_factor(codes.high, mode, x.numel()) * sign_of(step, index)
    through = torch.where(codes.outside, 0, wide)
    if scale is None:
        grad_x, grad_scale, grad_shift = through, step.new_zeros(x.shape[1]), step.new_zeros(x.shape[1])
    else:
        grad_x = through * scale[:, None, None]
        grad_scale, grad_shift = (through * x.to(step.dtype)).sum((0, 2, 3)), through.sum((0, 2, 3))
    return grad_x.to(x.dtype).contiguous(memory_format=LAST), at_index(total, step, index), grad_scale, grad_shift


def dequantize_codes_reference(codes: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for, step * codes, in plain PyTorch.

    Args:
        codes: uint8, of any shape and layout; may be empty.
        step: [], float32 (float64 where ``dtype`` is).
        dtype: of the result: float32, float64, float16 or bfloat16.

    Returns:
        Of the codes' shape and layout.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: a step with dimensions.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, float64, float16 or bfloat16, got {dtype}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if step.dtype != wide:
        raise TypeError(f"step must be {wide} for values of {dtype}, got {step.dtype}")
    if step.dim() != 0:
        raise InputError(f"step must be a tensor without dimensions, got shape {list(step.shape)}")
    return torch.empty_like(codes, dtype=dtype).copy_(codes.to(wide) * step)


def weight_codes_reference(
    weight: Tensor, step: Tensor | None, bits: Tensor, index: Tensor, mode: str, per_channel: bool
) -> tuple[Tensor, Tensor]:
    """Codes of weights, in plain PyTorch; :func:`quantize_weights` gives their product with the scale.

    DoReFa's 8 bits are the exception: their odd codes from -255 to 255 do not fit int8. What is given is half of one
    less, and the weights are scale * (code + 1/2).

    Args:
        weight: [C_out, ...], not empty; float32, float64, float16 or bfloat16, of any layout.
        step: LSQ's, [K] or with ``per_channel`` [K, C_out], float32 (float64 for float64 weights); None for DoReFa.
        bits: int32 [K], 1 to 8.
        index: int32 or int64 [].
        mode: "dorefa" or "lsq".
        per_channel: as of :func:`quantize_weights`.

    Returns:
        codes: int8, shape and layout of the weight; 0 for NaN.
        scale: [C_out], float32 (float64 for float64 weights); NaN for a channel with a NaN among its codes.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: shapes or a mode that do not fit, or a step that is missing or too much.
    """
    _check_weight(weight, step, bits, index, mode, per_channel)
    channels = weight.shape[0]
    if step is None:
        code, scale = dorefa_codes(weight, bits, index, per_channel)
        code = code.view(channels, -1)
        eight = bits[index] == 8
        code, scale = torch.where(eight, (code - 1) / 2, code), torch.where(eight, 2 * scale, scale)
    else:
        scale = effective_step(step, bits, index, mode).view(-1, 1)
        rows = weight.to(step.dtype).reshape(channels, -1)
        code = quantized(rows, scale, bits, index, True).code
    missing = code.isnan()
    scale = torch.where(missing.any(1), torch.nan, scale.flatten().expand(channels))
    whole = torch.where(missing, 0, code).clamp(-128, 127)
    codes = torch.empty_like(weight, dtype=torch.int8).copy_(whole.view(weight.shape))
    return codes, scale


def _codes(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, step: Tensor, bits: Tensor, index: Tensor, mode: str
) -> tuple[Codes, Tensor]:
    size = effective_step(step, bits, index, mode)
    return quantized(affine(x, scale, shift), size, bits, index, False), size


def _check_image(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, step: Tensor, bits: Tensor, index: Tensor, mode: str
) -> None:
    check_image("x", x)
    check_mode(mode, ACTIVATION_MODES)
    check_selection(bits, index, x)
    check_affine("scale", scale, "shift", shift, x.shape[1], x)
    check_steps("step", step, [bits.shape[0]], x)


def _check_weight(
    weight: Tensor, step: Tensor | None, bits: Tensor, index: Tensor, mode: str, per_channel: bool
) -> None:
    check_values("weight", weight)
    check_mode(mode, WEIGHT_MODES)
    check_selection(bits, index, weight)
    if weight.dim() == 0 or weight.numel() == 0:
        raise InputError(f"weight must be [C_out, ...] and not empty, got shape {list(weight.shape)}")
    if (step is None) != (mode == "dorefa"):
        raise InputError(f"step must be given for lsq and for nothing else, got mode {mode!r}")
    if step is not None:
        check_steps("step", step, [bits.shape[0], weight.shape[0]] if per_channel else [bits.shape[0]], weight)


def _fake_codes(x: Tensor, scale: Any, shift: Any, step: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=LAST), step.new_empty(())


def _fake_codes_backward(
    grad: Tensor, x: Tensor, scale: Any, shift: Any, step: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=LAST)
    channels = x.shape[1]
    return grad_x, step.new_empty(step.shape), step.new_empty(channels), step.new_empty(channels)


def _fake_values(codes: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _fake_weight_codes(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    scale = weight.new_empty(weight.shape[0], dtype=statistics_dtype(weight))
    return torch.empty_like(weight, dtype=torch.int8), scale


quantize_codes = define_op(
    "quantize_codes(Tensor x, Tensor? scale, Tensor? shift, Tensor step, Tensor bits, Tensor index, str mode) "
    "-> (Tensor codes, Tensor step_used)",
    reference=quantize_codes_reference,
    fake=_fake_codes,
    triton="spos_fast.kernels.quantize_codes:quantize_codes",
)
quantize_codes_backward = define_op(
    "quantize_codes_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? shift, Tensor step, Tensor bits, "
    "Tensor index, str mode) -> (Tensor grad_x, Tensor grad_step, Tensor grad_scale, Tensor grad_shift)",
    reference=quantize_codes_backward_reference,
    fake=_fake_codes_backward,
    triton="spos_fast.kernels.quantize_codes:quantize_codes_backward",
)
dequantize_codes = define_op(
    "dequantize_codes(Tensor codes, Tensor step, ScalarType dtype) -> Tensor",
    reference=dequantize_codes_reference,
    fake=_fake_values,
)
weight_codes = define_op(
    "weight_codes(Tensor weight, Tensor? step, Tensor bits, Tensor index, str mode, bool per_channel) "
    "-> (Tensor codes, Tensor scale)",
    reference=weight_codes_reference,
    fake=_fake_weight_codes,
)
for _name in ("quantize_codes", "quantize_codes_backward", "dequantize_codes", "weight_codes"):
    not_differentiable(_name, f"{_name} has no gradient of its own; use quant_conv2d, which is built of it")
