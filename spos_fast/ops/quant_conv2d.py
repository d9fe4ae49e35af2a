"""Convolution of quantized activations with quantized weights, on their integer codes where that is exact.

The input is quantized as it is loaded, with the batch norm in front of it as a scale and a shift; the quantizer's lower
end, 0, is the ReLU. What autograd keeps of it are codes of 8 bits. On the CPU the convolution is one on integers, whose
sums are exact; they are scaled once, by the product of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.ops.batchnorm import bn_moments_reference
from spos_fast.ops.blocks import BNStats
from spos_fast.ops.channels import LAST, affine
from spos_fast.ops.dispatch import LIBRARY, define_op
from spos_fast.ops.integer_conv import Settings, fake_weights, pack, quantized_convolution
from spos_fast.ops.integer_conv2d import moments_or_none
from spos_fast.ops.layout import packed_channels_last
from spos_fast.ops.quant_call import Call, as_call, check
from spos_fast.ops.quant_codes import quantize_codes_backward, quantize_codes_reference
from spos_fast.ops.sliced import Pair


def quant_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act_step: Tensor,
    act_bits: int | Tensor,
    act_index: int | Tensor = 0,
    act_mode: str = "pact",
    weight_step: Tensor | None = None,
    weight_bits: int | Tensor,
    weight_index: int | Tensor = 0,
    weight_mode: str = "dorefa",
    per_channel: bool = False,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    statistics: bool = False,
    in_channels: int | None = None,
    out_channels: int | None = None,
) -> Tensor | BNStats:
    """Convolution of fake-quantized values of x with fake-quantized weights; maybe the batch statistics of the result.

    ``conv2d(fake_quant(scale * x + shift), quantize_weights(weight), bias)``, see :func:`fake_quant` and
    :func:`quantize_weights`. On the CPU it runs on integer codes where these fit (weights of up to 7 bits, with LSQ 8;
    activations of up to 8 bits, on machines without VNNI 7; sums within 32 bits): the sums are then exact, only scaling
    them rounds, and a NaN in x makes the whole result NaN. Elsewhere on the CPU it is a convolution of fake-quantized
    values. On a GPU it is Triton's product of int8 codes, for all bit-widths, and with ``groups`` PyTorch's convolution
    of codes as floats. Differentiable once.

    Args:
        x: [N, C, H, W], N can be 0; float32, float64, float16 or bfloat16. Under autocast it is cast to its dtype.
        weight: [stored out, stored in / groups, kh, kw]; of x's dtype or float32 (float64 for float64).
        bias: None, or [stored out], likewise.
        act_step: [K], float32 (float64 for float64): PACT's clipping level or LSQ's step, an entry for each bit-width.
        act_bits: 1 to 8: an int, or an int32 tensor [K].
        act_index: which of the K; an int, or an int32 or int64 tensor [].
        act_mode: "pact", "pact_residual" or "lsq"; codes are not signed.
        weight_step, weight_bits, weight_index, weight_mode, per_channel: see :func:`quantize_weights`.
        stride: of the convolution, one number or (vertical, horizontal).
        padding: zeros on each side, likewise.
        dilation: distance between the kernel's taps, likewise.
        groups: as for conv2d.
        scale: [channels used], float32 (float64 for float64), applied to x on load; given with ``shift``.
        shift: likewise.
        statistics: whether to give the batch statistics of the result too; not of an empty batch.
        in_channels: how many channels of x are used, the first ones; None for all that x has. The weights are sliced
            first and then quantized, so that this is the convolution of the stored slice. With ``groups`` only
            depthwise convolutions (weight [channels, 1, kh, kw]) can be sliced.
        out_channels: how many channels are made; None for all that are stored, or, if depthwise, for ``in_channels``.

    Returns:
        [N, out_channels, H', W'] of x's dtype, channels last; with ``statistics`` (z, mean, m2), see :class:`BNStats`,
        all of them differentiable.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        InputError: shapes, modes, bit-widths or indices that do not fit, or channels that are not there.
    """
    call = as_call(
        x,
        weight,
        bias,
        act_step=act_step,
        act_bits=act_bits,
        act_index=act_index,
        act_mode=act_mode,
        weight_step=weight_step,
        weight_bits=weight_bits,
        weight_index=weight_index,
        weight_mode=weight_mode,
        per_channel=per_channel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        scale=scale,
        shift=shift,
        statistics=statistics,
        in_channels=in_channels,
        out_channels=out_channels,
    )
    if x.shape[0] == 0:
        return _of_no_images(call)
    out, mean, m2, *_ = _op(*call)
    return BNStats(out, mean, m2) if statistics else cast(Tensor, out)


def _of_no_images(call: Call) -> Tensor:
    """The op on an empty batch, which its kernels do not take: in plain PyTorch, whose gradients are zeros."""
    scale, shift, step, bits, index, mode = call.activation
    values = torch.ops.spos_fast.fake_quant(affine(call.x, scale, shift), step, None, bits, index, mode, False, -1)
    filters, dtype = fake_weights(call.weight, *call.weights), call.x.dtype
    bias = None if call.bias is None else call.bias.to(dtype)
    return packed_channels_last(functional.conv2d(values.to(dtype), filters.to(dtype), bias, *call.settings))


def quant_conv2d_reference(*arguments: Any) -> tuple[Tensor, ...]:
    """What quant_conv2d computes, in plain PyTorch: a convolution of fake-quantized values.

    Args:
        arguments: those of :class:`spos_fast.ops.quant_call.Call`.

    Returns:
        out; mean and m2 (empty without ``statistics``); codes, uint8 [N, C, H, W], and step [] of the activations.
    """
    call = Call(*arguments)
    check(call)
    codes, step = quantize_codes_reference(call.x, *call.activation)
    values, filters = codes.to(step.dtype) * step, fake_weights(call.weight, *call.weights).to(step.dtype)
    bias = None if call.bias is None else call.bias.to(step.dtype)
    out = packed_channels_last(functional.conv2d(values, filters, bias, *call.settings).to(call.x.dtype))
    return out, *moments_or_none(out, call.statistics, bn_moments_reference), codes, step


def _on_codes(*arguments: Any) -> tuple[Tensor, ...]:
    """The kernel on the CPU: codes, and a convolution on them."""
    call = Call(*arguments)
    filters = pack(call.weight, *call.weights, call.settings, int(call.act_bits[call.act_index]), call.x.shape)
    return quantized_convolution(
        call.x, call.activation, filters, call.bias, statistics=call.statistics, keep_codes=True
    )


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    x, weight, step = call.x, call.weight, call.act_step
    lengths = zip(x.shape[2:], weight.shape[2:], call.stride, call.padding, call.dilation, strict=True)
    size = [(length + 2 * pad - apart * (kernel - 1) - 1) // by + 1 for length, kernel, by, pad, apart in lengths]

    def image(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=LAST)

    out, codes = image([x.shape[0], weight.shape[0], *size], x.dtype), image(x.shape, torch.uint8)
    channels = weight.shape[0] if call.statistics else 0
    return out, step.new_empty(channels), step.new_empty(channels), codes, step.new_empty(())


_op = define_op(
    "quant_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor act_step, "
    "Tensor act_bits, Tensor act_index, str act_mode, Tensor? weight_step, Tensor weight_bits, Tensor weight_index, "
    "str weight_mode, bool per_channel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, "
    "bool statistics) -> (Tensor out, Tensor mean, Tensor m2, Tensor codes, Tensor step)",
    reference=quant_conv2d_reference,
    fake=_fake,
    triton="spos_fast.kernels.quant_conv:quant_conv2d",
    triton_note="convolutions with groups by PyTorch's, on codes as floats",
    cpu=(_on_codes, "integer_conv2d, or oneDNN's convolution on the codes"),
    autocast=(0,),
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, (out, mean, m2, codes, step) = Call(*inputs), output
    ctx.mark_non_differentiable(codes, step, *(() if call.statistics else (mean, m2)))
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.modes = call.settings, (call.act_mode, call.weight_mode, call.per_channel)
    ctx.bias = None if call.bias is None else (call.bias.shape[0], call.bias.dtype)
    kept = (out, mean) if call.statistics else (None, None)
    ctx.save_for_backward(call.x, call.weight, *call.activation[:5], *call.weights[:3], codes, step, *kept)


def _backward(
    ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    needs, (act_mode, *weight_modes) = ctx.needs_input_grad, ctx.modes
    x, weight, *saved, codes, step, out, mean = ctx.saved_tensors
    activation, weights = (*saved[:5], act_mode), (*saved[5:], *weight_modes)
    whole = _through_statistics(grad, grad_mean, grad_m2, out, mean)
    found: dict[str, Tensor | None] = {}
    # Of what is loaded (with its scale, shift and step), of the weights (with theirs), of the bias.
    wanted = [any(needs[at] for at in (0, 3, 4, 5)), needs[1] or needs[9], needs[2]]
    if whole is not None and any(wanted):
        # One at a time, so that what only one of them takes is gone before the next begins.
        if wanted[0]:
            filters = fake_weights(weight, *weights).to(x.dtype)
            image = x.contiguous(memory_format=LAST)  # of which only shape and layout are looked at
            grad_values = _convolution_backward(whole, image, filters, None, ctx.settings, (True, False, False))[0]
            del filters, image
            grads = quantize_codes_backward(grad_values, x, *activation)
            del grad_values
            found |= zip(("x", "act_step", "scale", "shift"), grads, strict=True)
        if any(wanted[1:]):
            values = codes.to(step.dtype).mul_(step).to(x.dtype)
            sizes = None if ctx.bias is None else [ctx.bias[0]]
            _, grad_filters, grad_bias = _convolution_backward(
                whole, values, weight.to(x.dtype), sizes, ctx.settings, (False, *wanted[1:])
            )
            del values, whole, grad
            if wanted[1]:
                grads = _weights_backward(grad_filters.to(weight.dtype), weight, *weights)
                found |= zip(("weight", "weight_step"), grads, strict=True)
            if wanted[2]:
                found["bias"] = grad_bias.to(ctx.bias[1])
    return tuple(found.get(name) if need else None for name, need in zip(Call._fields, needs, strict=True))


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: list[int] | None, settings: Settings, wanted: tuple[bool, ...]
) -> tuple[Any, ...]:
    """The gradients of x, weight and bias that are wanted."""
    sizes = settings.stride, settings.padding, settings.dilation, False, [0, 0], settings.groups  # not transposed
    made: tuple[Any, ...] = torch.ops.aten.convolution_backward(grad, x, weight, bias, *sizes, wanted)
    return made


def _through_statistics(
    grad: Tensor | None, grad_mean: Tensor | None, grad_m2: Tensor | None, out: Tensor | None, mean: Tensor | None
) -> Tensor | None:
    """The gradient of z with what comes through its mean and m2: d mean / dz = 1/n, d m2 / dz = 2 (z - mean)."""
    if grad_mean is None and grad_m2 is None:
        return grad
    assert out is not None and mean is not None
    shift = mean.new_zeros(mean.shape)
    if grad_mean is not None:
        shift = shift + grad_mean / (out.numel() // len(mean))
    if grad_m2 is None:
        through = shift[:, None, None].expand_as(out)
    else:
        slope = 2 * grad_m2
        through = torch.addcmul((shift - slope * mean)[:, None, None], out.to(mean.dtype), slope[:, None, None])
    return (through if grad is None else through + grad).to(out.dtype)


def _weights_backward(
    grad: Tensor, weight: Tensor, step: Tensor | None, bits: Tensor, index: Tensor, mode: str, per_channel: bool
) -> tuple[Tensor, Tensor | None]:
    ops = torch.ops.spos_fast
    if mode == "dorefa":
        made, grad_step = ops.dorefa_weights_backward(grad, weight, bits, index, per_channel, False), None
    else:
        axis = 0 if per_channel else -1
        made, grad_step, _ = ops.fake_quant_backward(grad, weight, step, None, bits, index, "lsq", True, axis)
    # Gradients of weights stay until the optimizer's step is over. In the memory that the ops keep for their next call,
    # nothing else could use it between steps.
    return grad.copy_(made), grad_step


torch.library.register_autograd("spos_fast::quant_conv2d", _backward, setup_context=_save_for_backward, lib=LIBRARY)
