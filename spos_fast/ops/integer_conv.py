"""Convolution of unsigned codes of activations with signed codes of weights, by oneDNN on the CPU.

Products and sums are of integers and exact; one multiplication by the product of the steps gives the result. oneDNN
wants weights in an order of its own: :func:`pack` brings them there, once for as many convolutions as use them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.ops.quant_codes import weight_codes
from spos_fast.ops.unit_layers import statistics_dtype


class Settings(NamedTuple):
    """Of a convolution, both directions of each."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Filters(NamedTuple):
    """Quantized weights as :func:`integer_convolution` takes them.

    Attributes:
        packed: codes in oneDNN's order; None where codes do not do.
        values: then the fake-quantized weights, float32 or float64; else empty.
        scale: [C_out], float32: the weights' steps.
        settings: of the convolution.
    """

    packed: Tensor | None
    values: Tensor
    scale: Tensor
    settings: Settings


@functools.cache
def available() -> bool:
    """Whether PyTorch has oneDNN's convolutions on integers here."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx2_supported()
        and hasattr(torch.ops.onednn, "qconv2d_pointwise")
    )


@functools.cache
def most_activation_bits() -> int:
    """Without VNNI pairs of products are added in 16 bits, which two of 8 and 8 bits would overflow."""
    return 8 if torch.cpu._is_vnni_supported() else 7


def fake_weights(
    weight: Tensor, step: Tensor | None, bits: Tensor, index: Tensor, mode: str, per_channel: bool
) -> Tensor:
    """Fake-quantized weights, in the weights' dtype: quantize_weights on checked arguments."""
    ops = torch.ops.spos_fast
    if mode == "dorefa":
        made: Tensor = ops.dorefa_weights(weight, bits, index, per_channel, False)
    else:
        made = ops.fake_quant(weight, step, None, bits, index, "lsq", True, 0 if per_channel else -1)
    return made


def pack(
    weight: Tensor,
    step: Tensor | None,
    bits: Tensor,
    index: Tensor,
    mode: str,
    per_channel: bool,
    settings: Settings,
    act_bits: int,
    size: Sequence[int],
) -> Filters:
    """Quantize weights on the CPU and order them.

    Args:
        weight, step, bits, index, mode, per_channel: see :func:`spos_fast.ops.quantize_weights`.
        settings: of the convolution.
        act_bits: the most that activations will have.
        size: of such activations, [N, C, H, W]: the best order of the weights depends on it.
    """
    wide = statistics_dtype(weight)
    fits = mode == "lsq" or int(bits[index]) < 8  # DoReFa's codes are the odd numbers from 1 - 2^k to 2^k - 1
    if not (available() and fits and act_bits <= most_activation_bits() and wide == torch.float32):
        values = fake_weights(weight, step, bits, index, mode, per_channel).to(wide)
        return Filters(None, values, values.new_ones(len(weight)), settings)
    codes, scale = weight_codes(weight, step, bits, index, mode, per_channel)
    neutral = scale.new_ones(1)  # the real ones, which depend on the activations, come with each call
    packed = torch.ops.onednn.qconv_prepack(codes, neutral, 1.0, 0, *settings, size)
    return Filters(packed, scale.new_empty(0), scale, settings)


def integer_convolution(
    codes: Tensor,
    step: Tensor,
    filters: Filters,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolution of ``step * codes`` with quantized weights, times a scale a channel, plus the bias, maybe clipped.

    Args:
        codes: uint8 [N, C, H, W], channels last.
        step: [], float32 (float64).
        filters: the weights.
        bias: [C_out] or None.
        dtype: of the result.
        scale: [C_out] of step's dtype or None, as of a batch norm behind; costs nothing on integers.
        relu: whether to clip the result at 0.
    """
    bias = None if bias is None else bias.to(step.dtype)
    settings = filters.settings
    if filters.packed is None:
        values = codes.to(step.dtype).mul_(step)
        weight = filters.values if scale is None else filters.values * scale[:, None, None, None]
        out = functional.conv2d(values, weight, bias, *settings)
        return (out.relu_() if relu else out).to(dtype)
    made = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    steps, zero = filters.scale * step, torch.zeros_like(filters.scale, dtype=torch.int32)
    steps = steps if scale is None else steps * scale
    out = torch.ops.onednn.qconv2d_pointwise(
        codes, 1.0, 0, filters.packed, steps, zero, bias, *settings, 1.0, 0, made, "relu" if relu else "none", [], ""
    )
    return out.to(dtype)
