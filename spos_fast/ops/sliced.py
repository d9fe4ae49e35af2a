"""Convolution and batch norm on the first channels of what is stored: the layers of slimmable networks.

Nothing is copied but what PyTorch's convolution packs for itself, which is the slice and not the whole weight; so both
run PyTorch's own kernels on views. What is added is the rule for slices, exact zeros in the gradients outside of them,
and widths that only the device knows.
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
from spos_fast.ops.dispatch import LIBRARY, define_op

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
    is ``torch.nn.functional.conv2d`` on views: cuDNN, oneDNN. Those pack a weight that does not lie in one piece, but
    only the slice of it. With numbers that only the device knows all stored channels are computed and masked.
    Differentiable any number of times.

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
    if isinstance(weight, Tensor):
        x, weight = in_autocast_dtype(x, weight)
        x, bias = in_autocast_dtype(x, bias)
    _check_tensors(x, weight, bias, groups)
    used_in, width_in = width_of("in_channels", in_channels, x.shape[1])
    depthwise = _depthwise(weight, groups)
    if depthwise:
        used_in, width_in = _one_number(used_in, width_in, out_channels, in_channels is None)
    used_out, width_out = (used_in, width_in) if depthwise else width_of("out_channels", out_channels, weight.shape[0])
    _check_slice(x, weight, groups, used_in, used_out, width_in, width_out)
    out: Tensor = _op(
        x, weight, bias, used_in, used_out, *map(_pair, (stride, padding, dilation)), groups, width_in, width_out
    )
    return out


def sliced_conv2d_reference(
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
    """What the op sliced_conv2d computes, and what runs: PyTorch's convolution. The widths: how many are present."""
    _check_tensors(x, weight, bias, groups)
    _check_slice(x, weight, groups, channels_in, channels_out, width_in, width_out)
    used, filters, used_groups = _used(x, weight, channels_in, channels_out, groups, width_in, width_out)
    used_bias = None if bias is None else bias[:channels_out]
    out = functional.conv2d(used, filters, used_bias, stride, padding, dilation, used_groups)
    return only_present(out, width_out, 1).contiguous(memory_format=_format(x, weight))


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
    mean, var, scale, shift = (value if value is None else value[: x.shape[1]] for value in stored.values())
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


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """That of the output, as conv2d has it: channels last where x, be it a slice, or weight is."""
    weight_is = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if x.stride(1) == 1 or weight_is else torch.contiguous_format


def _used(
    x: Tensor,
    weight: Tensor,
    channels_in: int,
    channels_out: int,
    groups: int,
    width_in: Tensor | None,
    width_out: Tensor | None,
) -> tuple[Tensor, Tensor, int]:
    """The slices of x and weight, zero where absent, and the slice's groups."""
    used = only_present(x[:, :channels_in], width_in, 1)
    if _depthwise(weight, groups):
        return used, only_present(weight[:channels_out], width_out, 0), channels_out
    filters = weight[:channels_out, : channels_in // groups]
    return used, only_present(only_present(filters, width_in, 1), width_out, 0), groups


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    for name, value, dimensions in (("x", x, 4), ("weight", weight, 4), ("bias", bias, 1)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
        if value.dim() != dimensions:
            raise InputError(f"{name} must have {dimensions} dimensions, got shape {list(value.shape)}")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise InputError(f"bias must be [{weight.shape[0]}], got shape {list(bias.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups must divide the {weight.shape[0]} stored output channels, got {groups}")


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


def _fake(
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
    height, width = (
        (x.shape[2 + at] + 2 * padding[at] - dilation[at] * (weight.shape[2 + at] - 1) - 1) // stride[at] + 1
        for at in range(2)
    )
    size = (x.shape[0], channels_out, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_format(x, weight))


_op = define_op(
    "sliced_conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt channels_in, SymInt channels_out, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, int groups, Tensor? width_in, Tensor? width_out) -> Tensor",
    reference=sliced_conv2d_reference,
    fake=_fake,
    autocast=(0, 1, 2),
    plain="PyTorch's own convolution on views of the slice",
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.settings, width_in, width_out = inputs
    ctx.save_for_backward(x, weight, width_in, width_out)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, width_in, width_out = ctx.saved_tensors
    channels_in, channels_out, stride, padding, dilation, groups = ctx.settings
    used, filters, used_groups = _used(x, weight, channels_in, channels_out, groups, width_in, width_out)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    bias_sizes = [channels_out] if ctx.has_bias else None
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        only_present(grad, width_out, 1), used, filters, bias_sizes, stride, padding, dilation, False, [0, 0],
        used_groups, wanted,
    )  # fmt: skip
    if wanted[0]:
        grad_x = _extended(only_present(grad_x, width_in, 1), x.shape[1], 1)
    if wanted[1]:
        # Zero factors do not keep a NaN out of the entries that are absent.
        if not _depthwise(weight, groups):
            grad_weight = _extended(only_present(grad_weight, width_in, 1), weight.shape[1], 1)
        grad_weight = _extended(only_present(grad_weight, width_out, 0), weight.shape[0], 0)
    if wanted[2]:
        grad_bias = _extended(grad_bias, weight.shape[0], 0)
    return grad_x, grad_weight, grad_bias, *(None,) * 8


def _extended(part: Tensor, size: int, dim: int) -> Tensor:
    """Zeros behind ``part`` along a dimension, up to ``size``."""
    missing = size - part.shape[dim]
    return part if missing == 0 else functional.pad(part, [0, 0] * (part.dim() - 1 - dim) + [0, missing])


torch.library.register_autograd("spos_fast::sliced_conv2d", _backward, setup_context=_save_for_backward, lib=LIBRARY)
