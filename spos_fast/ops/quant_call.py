"""The arguments of quant_conv2d: as the op takes them, from what users give, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.channels import check_affine, check_image
from spos_fast.ops.integer_conv import Settings
from spos_fast.ops.quant_codes import ACTIVATION_MODES
from spos_fast.ops.quantize_weights import MODES as WEIGHT_MODES
from spos_fast.ops.quantizers import bits_and_index, check_mode, check_selection, check_steps, check_values
from spos_fast.ops.sliced import Pair
from spos_fast.ops.unit_layers import statistics_dtype


class Call(NamedTuple):
    """The op's arguments in their order; their meaning is that of :func:`spos_fast.ops.quant_conv2d`'s."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    act_step: Tensor
    act_bits: Tensor
    act_index: Tensor
    act_mode: str
    weight_step: Tensor | None
    weight_bits: Tensor
    weight_index: Tensor
    weight_mode: str
    per_channel: bool
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    statistics: bool

    @property
    def activation(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, str]:
        """What the quantizer of x takes besides x."""
        return self.scale, self.shift, self.act_step, self.act_bits, self.act_index, self.act_mode

    @property
    def weights(self) -> tuple[Tensor | None, Tensor, Tensor, str, bool]:
        """What the quantizer of the weights takes besides them."""
        return self.weight_step, self.weight_bits, self.weight_index, self.weight_mode, self.per_channel

    @property
    def settings(self) -> Settings:
        """Of the convolution."""
        return Settings(self.stride, self.padding, self.dilation, self.groups)


def as_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act_step: Tensor,
    act_bits: int | Tensor,
    act_index: int | Tensor,
    act_mode: str,
    weight_step: Tensor | None,
    weight_bits: int | Tensor,
    weight_index: int | Tensor,
    weight_mode: str,
    per_channel: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: bool,
    in_channels: int | None,
    out_channels: int | None,
) -> Call:
    """A user's arguments as the op takes them: numbers as tensors and pairs, and the first channels of everything.

    Raises:
        TypeError, InputError: as :func:`spos_fast.ops.quant_conv2d`.
    """
    x, weight, bias, weight_step = _sliced(x, weight, bias, weight_step, per_channel, groups, in_channels, out_channels)
    if groups > 1 and weight.shape[1] == 1 and x.shape[1] == weight.shape[0]:
        groups = x.shape[1]  # of a depthwise slice
    act_bits, act_index = bits_and_index(x, act_bits, act_index, _entries(act_step))
    weight_bits, weight_index = bits_and_index(x, weight_bits, weight_index, _entries(weight_step))
    call = Call(
        x=x,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        act_step=act_step,
        act_bits=act_bits,
        act_index=act_index,
        act_mode=act_mode,
        weight_step=weight_step,
        weight_bits=weight_bits,
        weight_index=weight_index,
        weight_mode=weight_mode,
        per_channel=per_channel,
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        statistics=statistics,
    )
    check(call)
    return call


def _sliced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_step: Tensor | None,
    per_channel: bool,
    groups: int,
    in_channels: int | None,
    out_channels: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The first channels of everything, as views."""
    for name, value in (("x", x), ("weight", weight)):
        check_values(name, value)
        if value.dim() != 4:
            raise InputError(f"{name} must have 4 dimensions, got shape {list(value.shape)}")
    for name, number in (("in_channels", in_channels), ("out_channels", out_channels)):
        if number is not None and (not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool)):
            raise TypeError(f"{name} must be an int or None, got {type(number).__name__}")
    stored_out, stored_in = weight.shape[0], weight.shape[1] * groups
    used_in = x.shape[1] if in_channels is None else in_channels
    if groups > 1 and groups == stored_out and weight.shape[1] == 1:  # depthwise
        used_in = out_channels if in_channels is None and out_channels is not None else used_in
        used_out = used_in if out_channels is None else out_channels
        if used_in != used_out:
            raise InputError(
                f"a depthwise convolution makes as many channels as it takes, got {used_in} and {used_out}"
            )
    else:
        used_out = stored_out if out_channels is None else out_channels
        if groups > 1 and (used_in, used_out) != (stored_in, stored_out):
            raise InputError(
                f"groups: got {groups}; only convolutions with groups=1 and depthwise ones can be sliced, and x must "
                f"have all {stored_in} channels"
            )
        weight = _first(weight, used_in // groups, 1)
    for name, used, there in (
        ("in_channels", used_in, min(x.shape[1], stored_in)),
        ("out_channels", used_out, stored_out),
    ):
        if not 1 <= used <= there:
            raise InputError(f"{name} must be from 1 to {there}, what there is, got {used}")
    if per_channel and isinstance(weight_step, Tensor) and weight_step.dim() == 2:
        weight_step = _first(weight_step, used_out, 1)
    bias = _first(bias, used_out, 0) if isinstance(bias, Tensor) and bias.dim() == 1 else bias
    return _first(x, used_in, 1), _first(weight, used_out, 0), bias, weight_step


def _first(value: Tensor, count: int, dim: int) -> Tensor:
    """The first entries along a dimension; no view where that is all, or too many, which is refused later."""
    return value if value.shape[dim] <= count else value.narrow(dim, 0, count)


def check(call: Call) -> None:
    """Refuse what does not fit together.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: shapes, modes or settings that do not fit.
    """
    x, weight, bias = call.x, call.weight, call.bias
    check_image("x", x, empty_batch=not call.statistics)
    parameters = [("weight", weight, 4)] + ([] if bias is None else [("bias", bias, 1)])
    for name, value, dimensions in parameters:
        check_values(name, value)
        if value.dtype not in (x.dtype, statistics_dtype(x)):
            raise TypeError(f"{name} must be {x.dtype}, as x is, or {statistics_dtype(x)}, got {value.dtype}")
        if value.dim() != dimensions or value.numel() == 0:
            raise InputError(f"{name} must have {dimensions} dimensions, none of size 0, got shape {list(value.shape)}")
    if call.groups < 1 or x.shape[1] != weight.shape[1] * call.groups or weight.shape[0] % call.groups != 0:
        raise InputError(
            f"weight must be [C_out, {x.shape[1]} / groups, kh, kw] for x of {x.shape[1]} channels, C_out divisible by "
            f"groups, got shape {list(weight.shape)} and groups={call.groups}"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise InputError(f"bias must be [{weight.shape[0]}], one for each output channel, got {list(bias.shape)}")
    check_affine("scale", call.scale, "shift", call.shift, x.shape[1], x)
    check_mode(call.act_mode, ACTIVATION_MODES)
    check_selection(call.act_bits, call.act_index, x)
    check_steps("act_step", call.act_step, [call.act_bits.shape[0]], x)
    check_mode(call.weight_mode, WEIGHT_MODES)
    check_selection(call.weight_bits, call.weight_index, x)
    if (call.weight_step is None) != (call.weight_mode == "dorefa"):
        raise InputError(
            f"weight_step must be given for lsq and for nothing else, got weight_mode {call.weight_mode!r}"
        )
    if call.weight_step is not None:
        shape = [call.weight_bits.shape[0], weight.shape[0]] if call.per_channel else [call.weight_bits.shape[0]]
        check_steps("weight_step", call.weight_step, shape, weight)
    for name, pair, least in (("stride", call.stride, 1), ("padding", call.padding, 0), ("dilation", call.dilation, 1)):
        if len(pair) != 2 or any(value < least for value in pair):
            raise InputError(f"{name} must be a number of at least {least} or two of them, got {list(pair)}")
    for size, kernel, pad, apart in zip(x.shape[2:], weight.shape[2:], call.padding, call.dilation, strict=True):
        if size + 2 * pad < apart * (kernel - 1) + 1:
            raise InputError(f"x must be as large as the kernel, got {list(x.shape[2:])} and {list(weight.shape[2:])}")


def _entries(step: Tensor | None) -> int:
    return step.shape[0] if isinstance(step, Tensor) and step.dim() else 1


def _pair(value: Pair) -> list[int]:
    return [value, value] if isinstance(value, (int, torch.SymInt)) else list(value)
