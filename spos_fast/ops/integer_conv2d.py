"""Convolution of quantized activations with packed codes of weights, in one pass over the activations.

They are quantized as they are loaded, and the sums are scaled and their moments taken before they are written. On the
CPU only, for machines with AVX-512 and VNNI; elsewhere it is right and slow: :mod:`spos_fast.ops.integer_conv` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import bn_moments_reference
from spos_fast.ops.channels import LAST
from spos_fast.ops.dispatch import define_op, not_differentiable
from spos_fast.ops.layout import packed_channels_last
from spos_fast.ops.quant_codes import quantize_codes_reference
from spos_fast.ops.unit_layers import statistics_dtype

_LANES, _QUAD = 16, 4  # output channels that lie side by side, and input channels that are multiplied at once


def pack_codes_reference(codes: Tensor) -> Tensor:
    """Codes of weights in the order in which integer_conv2d reads them, in plain PyTorch.

    Args:
        codes: int8 [O, C, kh, kw], O a multiple of 16 and C of 4.

    Returns:
        int8 [O / 16, kh, kw, C / 4, 16, 4].

    Raises:
        InputError: channels that do not fit.
    """
    _check_channels(codes.shape[0], codes.shape[1])
    blocks = codes.unflatten(1, (-1, _QUAD)).unflatten(0, (-1, _LANES))
    return blocks.permute(0, 4, 5, 2, 1, 3).contiguous()


def integer_conv2d_reference(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act_step: Tensor,
    act_bits: Tensor,
    act_index: Tensor,
    act_mode: str,
    weight: Tensor,
    out_scale: Tensor,
    out_shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
    statistics: bool,
    keep_codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What integer_conv2d computes, in plain PyTorch: sums of products of codes, scaled.

    Args:
        x, scale, shift, act_step, act_bits, act_index, act_mode: as of quantize_codes; float64 has no kernel.
        weight: int8, see pack_codes.
        out_scale: [O], float32 (float64 for float64); multiplied by the step, it scales the sums.
        out_shift: likewise, added then; None for nothing.
        stride, padding: of the convolution, (vertical, horizontal).
        relu: whether the result is clipped at 0.
        statistics: whether its moments are wanted.
        keep_codes: whether the activations' codes are wanted.

    Returns:
        out: [N, O, H', W'], dtype of x, channels last; NaN everywhere if a NaN was quantized.
        mean, m2: [O], of out; empty without ``statistics``.
        codes: uint8 [N, C, H, W], channels last; empty without ``keep_codes``.
        step: [], the step, or NaN if a NaN was quantized.

    Raises:
        TypeError, InputError: as quantize_codes; or a weight that does not fit.
    """
    if weight.dim() != 6 or weight.dtype != torch.int8 or x.shape[1] != _QUAD * weight.shape[3]:
        raise InputError(
            f"weight must be what pack_codes gives for {x.shape[1]} channels, got {weight.dtype} {list(weight.shape)}"
        )
    codes, step = quantize_codes_reference(x, scale, shift, act_step, act_bits, act_index, act_mode)
    filters = weight.permute(0, 4, 3, 5, 1, 2).flatten(2, 3).flatten(0, 1)
    sums = functional.conv2d(codes.double(), filters.double(), None, stride, padding).to(step.dtype)
    out = sums * (step * out_scale)[:, None, None]
    if out_shift is not None:
        out = out + out_shift[:, None, None]
    out = packed_channels_last((out.relu() if relu else out).to(x.dtype))
    moments = moments_or_none(out, statistics, bn_moments_reference)
    return out, *moments, packed_channels_last(codes) if keep_codes else codes.new_empty(0), step


def moments_or_none(
    out: Tensor, wanted: bool, moments: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean and m2 of a result, [C]; empty if nobody wants them.

    Args:
        out: [N, C, H, W].
        wanted: whether somebody does.
        moments: bn_moments, or what defines it.
    """
    if not wanted:
        empty = out.new_empty(0, dtype=statistics_dtype(out))
        return empty, empty.clone()
    mean, m2 = moments(out, 1)
    return mean[0], m2[0]


def _check_channels(out_channels: int, in_channels: int) -> None:
    if out_channels % _LANES or in_channels % _QUAD:
        raise InputError(
            f"codes must have a multiple of {_LANES} output channels and of {_QUAD} input channels, got "
            f"{out_channels} and {in_channels}"
        )


def _fake_pack(codes: Tensor) -> Tensor:
    out, channels, height, width = codes.shape
    _check_channels(out, channels)
    return codes.new_empty(out // _LANES, height, width, channels // _QUAD, _LANES, _QUAD)


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    act_step, weight, stride, padding = arguments[2], arguments[6], arguments[9], arguments[10]
    statistics, keep_codes = arguments[12:]
    lengths = zip(x.shape[2:], weight.shape[1:3], stride, padding, strict=True)
    size = [(length + 2 * pad - kernel) // by + 1 for length, kernel, by, pad in lengths]
    channels = _LANES * weight.shape[0]
    out = torch.empty([x.shape[0], channels, *size], dtype=x.dtype, device=x.device, memory_format=LAST)
    moments = [act_step.new_empty(channels if statistics else 0) for _ in range(2)]
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=LAST)
    return out, *moments, codes if keep_codes else codes.new_empty(0), act_step.new_empty(())


pack_codes = define_op("pack_codes(Tensor codes) -> Tensor", reference=pack_codes_reference, fake=_fake_pack)
integer_conv2d = define_op(
    "integer_conv2d(Tensor x, Tensor? scale, Tensor? shift, Tensor act_step, Tensor act_bits, Tensor act_index, "
    "str act_mode, Tensor weight, Tensor out_scale, Tensor? out_shift, SymInt[] stride, SymInt[] padding, bool relu, "
    "bool statistics, bool keep_codes) -> (Tensor out, Tensor mean, Tensor m2, Tensor codes, Tensor step)",
    reference=integer_conv2d_reference,
    fake=_fake,
)
not_differentiable("integer_conv2d", "integer_conv2d has no gradient of its own; use quant_conv2d")
