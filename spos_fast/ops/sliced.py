"""Convolution and batch norm on the first channels of what is stored: the layers of slimmable networks.

Both are PyTorch's own kernels on views. Of a weight that does not lie in one piece they pack the slice, never the
whole: a few hundredths of a convolution's time, and all that a kernel of ours could save. What is added is the rule for
slices, and widths that only the device knows. To autograd, autocast and compilers the ops are what they consist of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import DTYPES
from spos_fast.ops.channels import check_width, in_autocast_dtype, only_present, present, width_of
from spos_fast.ops.dispatch import define_composite

Pair = int | Sequence[int]


def sliced_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    in_channels: int | Tensor | None = None,
    out_channels: int | Tensor | None = None,
) -> Tensor:
    """Convolution with the first input and output channels of a weight, the numbers of which are chosen at run time.

    conv2d(x[:, :in_channels], weight[:out_channels, :in_channels], bias[:out_channels]). Nothing outside of the slice
    is read, gradients there are exactly zero. A depthwise convolution has one number of channels, in and out. What runs
    is ``torch.nn.functional.conv2d`` on views, which copies at most the slice of the weight; with numbers that only the
    device knows, on all channels, masked. Differentiable any number of times.

    Args:
        x: [N, C, H, W]; float32, float64, float16 or bfloat16. Under autocast, x, weight and bias are cast to its
            dtype.
        weight: [stored out, stored in / groups, kh, kw], dtype of x.
        bias: None, or [stored out], dtype of x.
        stride: of the convolution, one number or (vertical, horizontal).
        padding: zeros on each side, likewise.
        dilation: distance between the kernel's taps, likewise.
        groups: as for conv2d, of the stored weight: 1; all channels (depthwise, weight [channels, 1, kh, kw]); or
            anything else, which cannot be sliced.
        in_channels: how many channels of x are used, the first ones; None for all that x has. Or an int32 tensor [] on
            x's device: how many of x's channels are present.
        out_channels: how many channels are made; None for all that are stored, or, if depthwise, for ``in_channels``.
            Or an int32 tensor []: the output then has the stored number of channels, and absent ones are zero.

    Returns:
        [N, out_channels, H', W'], channels last where x or weight is.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, channels that are not there, or a slice of a grouped convolution.
    """
    x, weight, bias = _checked(x, weight, bias, groups)
    used_in, width_in = width_of("in_channels", in_channels, x.shape[1])
    if _depthwise(weight, groups):
        used_in, width_in = _one_number(used_in, width_in, out_channels, in_channels is None)
        used_out, width_out = used_in, width_in
    else:
        used_out, width_out = width_of("out_channels", out_channels, weight.shape[0])
    settings = _pair(stride), _pair(padding), _pair(dilation), groups
    return _convolve(x, weight, bias, used_in, used_out, *settings, width_in, width_out)


def sliced_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channels: Tensor | None = None,
) -> Tensor:
    """Batch norm of x with the first C entries of what is stored a channel, C being the channels of x.

    In training the running statistics of these channels move, and no others'. What runs is
    ``torch.nn.functional.batch_norm`` on views.

    Args:
        x: [N, C, ...], C at most the stored number.
        running_mean: [stored], or None; moved in place in training.
        running_var: likewise.
        weight: [stored], the scales, or None for ones. Gradients beyond C are exactly zero, of the bias too.
        bias: [stored], the shifts, or None for zeros.
        training: whether to normalise by the batch's statistics.
        momentum: share of the batch's statistics in the running ones.
        eps: added to the variances.
        channels: None, or an int32 tensor [] on x's device: how many of the C channels are present. Absent channels are
            not seen, come out as zeros, and their running statistics stay.

    Returns:
        [N, C, ...], dtype of x.

    Raises:
        TypeError: x is no tensor, or ``channels`` no int32 tensor.
        InputError: x has no channels or more than are stored.
    """
    stored = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _check_norm(x, stored, channels)
    mean, var, scale, shift = (v if v is None else _first(v, x.shape[1], 0) for v in stored.values())
    if channels is None:
        return functional.batch_norm(x, mean, var, scale, shift, training, momentum, eps)
    # Copies: batch_norm moves the absent channels' statistics too, and keeps what it is given for the backward pass.
    new_mean, new_var = (value if value is None else only_present(value, channels, 0) for value in (mean, var))
    x = only_present(x, channels, 1)
    y = functional.batch_norm(x, new_mean, new_var, scale, shift, training, momentum, eps)
    for running, moved in ((mean, new_mean), (var, new_var)):
        if training and running is not None and moved is not None:
            running.copy_(torch.where(present(channels, running, 0), moved, running))
    return only_present(y, channels, 1)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    channels_in: int,
    channels_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> Tensor:
    """The convolution of the sizes that are given; the widths say how many of these channels are present."""
    _check_slice(x, weight, groups, channels_in, channels_out, width_in, width_out)
    filters = _first(weight, channels_out, 0)
    if _depthwise(weight, groups):
        groups = channels_out
    else:
        filters = only_present(_first(filters, channels_in // groups, 1), width_in, 1)
    # Filters of absent channels too, whose NaN would otherwise pass into the gradient of x.
    filters = only_present(filters, width_out, 0)
    used = only_present(_first(x, channels_in, 1), width_in, 1)
    used_bias = None if bias is None else _first(bias, channels_out, 0)
    out = functional.conv2d(used, filters, used_bias, stride, padding, dilation, groups)
    return only_present(out, width_out, 1)


def _first(value: Tensor, count: int, dim: int) -> Tensor:
    """The first entries along a dimension; no view where that is all, which autograd would undo by a copy."""
    return value if value.shape[dim] == count else value.narrow(dim, 0, count)


def _pair(value: Pair) -> list[int]:
    return [value, value] if isinstance(value, (int, torch.SymInt)) else list(value)


def _depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1


def _one_number(
    used: int, width: Tensor | None, out_channels: int | Tensor | None, free: bool
) -> tuple[int, Tensor | None]:
    """A depthwise convolution's channels: what in_channels says, or out_channels where that is not given."""
    if out_channels is None:
        return used, width
    made, made_width = width_of("out_channels", out_channels, used)
    if free:
        return made, made_width
    if (width is None) != (made_width is None) or made != used or width is not made_width:
        raise InputError("in_channels and out_channels of a depthwise convolution must be the same; give one of them")
    return used, width


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype where that is on.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together.
    """
    named = {"x": (x, 4), "weight": (weight, 4)} | ({} if bias is None else {"bias": (bias, 1)})
    for name, (value, dimensions) in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
        if value.dim() != dimensions:
            raise InputError(f"{name} must have {dimensions} dimensions, got shape {list(value.shape)}")
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {parameter.dtype}")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise InputError(f"bias must be [{weight.shape[0]}], got shape {list(bias.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups must divide the {weight.shape[0]} stored output channels, got {groups}")
    return x, weight, bias


def _check_slice(
    x: Tensor,
    weight: Tensor,
    groups: int,
    channels_in: int,
    channels_out: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> None:
    stored_out, stored_in = weight.shape[0], weight.shape[1] * groups
    if not 1 <= channels_in <= min(stored_in, x.shape[1]):
        raise InputError(
            f"in_channels must be from 1 to {min(stored_in, x.shape[1])}, what weight and x have, got {channels_in}"
        )
    if not 1 <= channels_out <= stored_out:
        raise InputError(f"out_channels must be from 1 to {stored_out}, what weight stores, got {channels_out}")
    if _depthwise(weight, groups):
        if channels_in != channels_out:
            raise InputError(
                f"a depthwise convolution makes as many channels as it takes, got {channels_in} and {channels_out}"
            )
    elif groups > 1:
        whole = channels_in == stored_in and channels_out == stored_out and width_in is None and width_out is None
        if not whole:
            raise InputError(
                f"groups: got {groups}; only convolutions with groups=1 and depthwise ones can be sliced, and x must "
                f"have all {stored_in} channels"
            )
    check_width("in_channels", width_in, x)
    check_width("out_channels", width_out, x)


def _check_norm(x: Tensor, stored: dict[str, Tensor | None], channels: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() < 2:
        raise InputError(f"x must be [N, C, ...], got shape {list(x.shape)}")
    for name, value in stored.items():
        if value is not None and not 1 <= x.shape[1] <= value.shape[0]:
            raise InputError(
                f"x must have 1 to {value.shape[0]} channels, what {name} stores, got shape {list(x.shape)}"
            )
    if channels is not None and not isinstance(channels, Tensor):
        raise TypeError(f"channels must be an int32 tensor [] or None, got {type(channels).__name__}")
    check_width("channels", channels, x)


def _conv2d_op(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    groups = arguments[5]
    return _convolve(*_checked(x, weight, bias, groups), *arguments)


def _batch_norm_op(x: Tensor, *arguments: Any) -> Tensor:
    *others, channels = arguments
    return sliced_batch_norm(x, *others, channels=channels)


define_composite(
    "sliced_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt channels_in, SymInt channels_out, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, int groups, Tensor? width_in, Tensor? width_out) -> Tensor",
    _conv2d_op,
    "PyTorch's convolution on views of the slice",
)
define_composite(
    "sliced_batch_norm(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "bool training, float momentum, float eps, Tensor? channels) -> Tensor",
    _batch_norm_op,
    "PyTorch's batch norm on views of the slice",
)
