"""The integer codes of quantized layers, and weights that quantize to given codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.nn import QuantAct, QuantConv2d
from spos_fast.ops.quantizers import MIN_STEP


@dataclass(frozen=True)
class WeightCodes:
    """The weights of a convolution as integers.

    Attributes:
        bits: k, 1 to 8.
        codes: int16 [out_channels, in_channels / groups, kh, kw], 0 to 2^k - 1.
        scale: float32 [] or [out_channels].
        odd: whether a code c stands for ``scale * (2 c - (2^k - 1))`` (DoReFa, and every single bit) or for
            ``scale * (c - 2^(k - 1))`` (LSQ).
    """

    bits: int
    codes: Tensor
    scale: Tensor
    odd: bool


@dataclass(frozen=True)
class ActGrid:
    """What an activation is rounded to: ``step * code + offset``.

    Attributes:
        bits: k, 1 to 8.
        signed: whether codes are -2^(k-1) to 2^(k-1) - 1 (a single bit: -1 and 1), else 0 to 2^k - 1.
        step: float32 [] or [channels], positive.
        offset: of the shape of ``step``, or None.
    """

    bits: int
    signed: bool
    step: Tensor
    offset: Tensor | None


@torch.no_grad()
def weight_codes(layer: QuantConv2d, index: int = 0, name: str = "layer") -> WeightCodes:
    """The codes that the layer's weights are quantized to with the bit-width of this index.

    Args:
        layer: the convolution, float32.
        index: of its weights' bit-widths.
        name: what it is called in errors.

    Raises:
        InputError: weights of another type, or NaN or infinity among the quantized ones.
    """
    if layer.weight.dtype != torch.float32:
        raise InputError(f"{name}: weights are {layer.weight.dtype}; call .float() on the network first")
    values = layer.quantized_weight(index)
    if not bool(values.isfinite().all()):
        raise InputError(f"{name}: quantized weights are NaN or infinite")
    bits = layer.weight_bits[index]
    odd = bits == 1 or layer.weight_quantizer == "dorefa"
    if layer.weight_step is not None:
        scale = layer.weight_step[index].abs().clamp_min(MIN_STEP)
    elif bits > 1:
        scale = torch.tensor(1 / (2**bits - 1), device=values.device)
    else:
        scale = values.abs().amax((1, 2, 3)) if layer.per_channel else values.abs().amax()
    if bits == 1:
        codes = values > 0
    else:
        units = values / _along_channels(scale)
        codes = ((units + 2**bits - 1) / 2 if odd else units + 2 ** (bits - 1)).round()
    return WeightCodes(bits, codes.to(torch.int16).cpu(), scale.cpu(), odd)


def weight_from_codes(codes: Tensor, bits: int, step: Tensor | None, per_channel: bool) -> Tensor:
    """Float weights that are quantized to these codes.

    Args:
        codes: integers [out_channels, in_channels / groups, kh, kw], 0 to 2^bits - 1.
        bits: 1 to 8.
        step: of LSQ, the parameter, [] or [out_channels]; None: DoReFa with at least 2 bits.
        per_channel: whether DoReFa divides every output channel by a maximum of its own.

    Returns:
        float32, of the shape of ``codes``.
    """
    n = 2**bits - 1
    odd = 2 * codes.float() - n
    if step is not None:
        units = odd if bits == 1 else codes.float() - 2 ** (bits - 1)
        return units * _along_channels(step.abs().clamp_min(MIN_STEP))
    # The greatest magnitude, which DoReFa divides by, has an outermost code. Where there is none all weights were zero.
    # Half of the range, so that the hyperbolic tangent has an inverse at its ends.
    greatest = odd.abs().amax((1, 2, 3), keepdim=True) if per_channel else odd.abs().amax()
    return torch.where(greatest == n, torch.atanh(odd / (2 * n)), 0.0)


def act_grid(act: QuantAct, index: int = 0, name: str = "layer") -> ActGrid:
    """What the activations are rounded to with the bit-width of this index.

    Raises:
        InputError: a step or offset is NaN or infinite.
    """
    bits = act.bits[index]
    step = act.step.detach()[index].abs()
    if act.quantizer.startswith("pact"):
        step = step / (2**bits - 1)
    step = step.clamp_min(MIN_STEP)
    offset = None if act.offset is None else act.offset.detach()[index]
    if not all(bool(value.isfinite().all()) for value in (step, offset) if value is not None):
        raise InputError(f"{name}: the step of the activations is NaN or infinite")
    return ActGrid(bits, act.signed, step.cpu(), None if offset is None else offset.cpu())


def _along_channels(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1) if values.dim() == 1 else values
