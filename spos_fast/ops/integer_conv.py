"""Convolution of unsigned codes of activations with signed codes of weights, on the CPU.

Products and sums are of integers and exact; one multiplication by the product of the steps gives the result. What runs
it wants weights in an order of its own: :func:`pack` brings them there, once for as many convolutions as use them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.ops.batchnorm import bn_moments
from spos_fast.ops.dispatch import OPS
from spos_fast.ops.integer_conv2d import integer_conv2d, moments_or_none, pack_codes
from spos_fast.ops.layout import packed_channels_last
from spos_fast.ops.quant_codes import quantize_codes, weight_codes
from spos_fast.ops.unit_layers import statistics_dtype


class Settings(NamedTuple):
    """Of a convolution, both directions of each."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


# How activations are quantized, the arguments of quantize_codes behind x: scale, shift, step, bits, index, mode.
Activation = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, str]


_LARGEST_PRODUCT = 255 * 128  # of the codes of an activation and a weight


class Filters(NamedTuple):
    """Quantized weights as :func:`quantized_convolution` takes them.

    Attributes:
        values: codes in the order of ``runs``; for "floats" the fake-quantized weights, float32 or float64.
        scale: [C_out], float32: the weights' steps.
        settings: of the convolution.
        runs: "fused" (integer_conv2d), "onednn" or "floats".
        size: of the images that they are for: [C], or, where the order depends on it, [C, H, W].
    """

    values: Tensor
    scale: Tensor
    settings: Settings
    runs: str
    size: Sequence[int]


@functools.cache
def available() -> bool:
    """Whether PyTorch has oneDNN's convolutions on integers here."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx2_supported()
        and hasattr(torch.ops.onednn, "qconv2d_pointwise")
    )


@functools.cache
def fuses() -> bool:
    """Whether integer_conv2d is the fastest here. oneDNN has AMX, which multiplies eight times as much at once."""
    built = OPS["integer_conv2d"].choices["cpu"].kernel == "native"
    return built and torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()


@functools.cache
def most_activation_bits() -> int:
    """Without VNNI pairs of products are added in 16 bits, which two of 8 and 8 bits would overflow."""
    return 8 if torch.cpu._is_vnni_supported() else 7


def on_integers(weight: Tensor, bits: int, mode: str, act_bits: int) -> bool:
    """Whether weights [C_out, C_in / groups, kh, kw] with these bits have codes of int8, of which no sum overflows."""
    fits = mode == "lsq" or bits < 8  # DoReFa's codes are the odd numbers from 1 - 2^k to 2^k - 1
    fits &= act_bits <= most_activation_bits() and statistics_dtype(weight) == torch.float32
    return fits and weight[0].numel() * _LARGEST_PRODUCT < 2**31


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
    fits = on_integers(weight, int(bits[index]), mode, act_bits)
    fused = fits and fuses() and _suits(weight, settings)
    if not (fused or (fits and available())):
        values = fake_weights(weight, step, bits, index, mode, per_channel).to(statistics_dtype(weight))
        return Filters(values, values.new_ones(len(weight)), settings, "floats", size[1:2])
    codes, scale = weight_codes(weight, step, bits, index, mode, per_channel)
    if fused:
        return Filters(pack_codes(codes), scale, settings, "fused", size[1:2])
    neutral = scale.new_ones(1)  # the real ones, which depend on the activations, come with each call
    packed = torch.ops.onednn.qconv_prepack(codes, neutral, 1.0, 0, *settings, size)
    return Filters(packed, scale, settings, "onednn", size[1:])


def _suits(weight: Tensor, settings: Settings) -> bool:
    """Whether integer_conv2d takes such weights."""
    whole = weight.shape[0] % 16 == 0 and weight.shape[1] % 4 == 0
    return whole and settings.groups == 1 and all(distance == 1 for distance in settings.dilation)


def quantized_convolution(
    x: Tensor,
    activation: Activation,
    filters: Filters,
    bias: Tensor | None,
    *,
    out_scale: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
    keep_codes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convolution of quantized x with quantized weights, times a scale a channel, plus the bias, maybe clipped.

    Args:
        x: [N, C, H, W], not empty.
        activation: how it is quantized.
        filters: the weights.
        bias: [C_out] or None.
        out_scale: [C_out] of the step's dtype or None, as of a batch norm behind; costs nothing on integers.
        relu: whether to clip the result at 0.
        statistics: whether the result's moments are wanted.
        keep_codes: whether the activations' codes are wanted.

    Returns:
        out: [N, C_out, H', W'], dtype of x, channels last.
        mean, m2: [C_out]; empty without ``statistics``.
        codes: uint8 [N, C, H, W], channels last; only promised with ``keep_codes``.
        step: [], that of the activations, or NaN if a NaN was quantized.
    """
    dtype = activation[2].dtype
    bias = None if bias is None else bias.to(dtype)
    if filters.runs == "fused":
        steps = filters.scale if out_scale is None else filters.scale * out_scale
        stride, padding = filters.settings.stride, filters.settings.padding
        made = integer_conv2d(
            x, *activation, filters.values, steps, bias, stride, padding, relu, statistics, keep_codes
        )
        return cast("tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", made)
    codes, step = quantize_codes(x, *activation)
    run = _on_floats if filters.runs == "floats" else _by_onednn
    out = packed_channels_last(run(codes, step, filters, bias, x.dtype, out_scale, relu).to(x.dtype))
    return out, *moments_or_none(out, statistics, bn_moments), codes, step


def _on_floats(
    codes: Tensor, step: Tensor, filters: Filters, bias: Tensor | None, _: torch.dtype, scale: Tensor | None, relu: bool
) -> Tensor:
    values = codes.to(step.dtype).mul_(step)
    weight = filters.values if scale is None else filters.values * scale[:, None, None, None]
    with torch.autocast("cpu", enabled=False):  # codes and steps are as exact as they are meant to be
        out = functional.conv2d(values, weight, bias, *filters.settings)
    return out.relu_() if relu else out


def _by_onednn(
    codes: Tensor,
    step: Tensor,
    filters: Filters,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: Tensor | None,
    relu: bool,
) -> Tensor:
    made = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    steps, zero = filters.scale * step, torch.zeros_like(filters.scale, dtype=torch.int32)
    steps = steps if scale is None else steps * scale
    out: Tensor = torch.ops.onednn.qconv2d_pointwise(
        codes, 1.0, 0, filters.values, steps, zero, bias, *filters.settings, 1.0, 0, made, "none", [], ""
    )
    return out.relu_() if relu else out  # oneDNN's own makes NaN 0
