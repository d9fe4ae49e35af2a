"""The choice blocks of the ShuffleNetV2 space as ops: in training with batch statistics, and with them folded in.

Batch statistics need a convolution's whole output before the next layer can start, so the training kernels make one
pass a convolution, and normalise and clip where the next pass loads. The outputs of the convolutions are what they keep
for the backward pass. With normalisation folded into a scale and a shift nothing stands in the way of a single pass.

Two chains of layers (``unit_layers``) make the two units; everything here is written once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops import unit_reference
from spos_fast.ops.channels import in_autocast_dtype
from spos_fast.ops.dispatch import LIBRARY, define_op, differentiable_once
from spos_fast.ops.layout import channels_last
from spos_fast.ops.unit_layers import (
    NAMES,
    Chain,
    Projection,
    Unit,
    check_vector,
    make_unit,
    shuffle_chain,
    statistics_dtype,
    xception_chain,
)

_LAST = torch.channels_last


class UnitOutput(NamedTuple):
    """What a unit makes in training.

    Attributes:
        out: [N, beside + out, H', W'], channels last: the channels that pass or the projection's, then the branch's.
        mean: [normalised], float32 (float64 for float64): batch means in front of the BN layers, one layer behind the
            other: main branch, then projection. Not differentiable.
        var: likewise, the batch variances, divided by N * H * W of the layer. Not differentiable.
    """

    out: Tensor
    mean: Tensor
    var: Tensor


Slice = int | Tensor | None


def shuffle_unit(
    x: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    projection: tuple[Tensor, Tensor] | None = None,
    mid: Slice = None,
    stride: int = 1,
    eps: float = 1e-5,
) -> UnitOutput:
    """ShuffleNetV2 unit with batch statistics (arXiv 1807.11164, figure 3c and d, as in arXiv 1904.00420).

    1x1 convolution, BN, ReLU; depthwise convolution, BN; 1x1 convolution, BN, ReLU. Without a projection even channels
    pass, odd channels go through that branch, and both are concatenated: the channel shuffle of the published code.
    With one, both branches see all channels. The result is differentiable once, the same for any number of threads, and
    channels last.

    Args:
        x: [N, C, H, W], channels last (anything else is copied, with one warning); float32, float64, float16 or
            bfloat16. Under autocast, x and the convolutions' weights are cast to its dtype.
        pw1: [M, b, 1, 1], the first 1x1 convolution; b = C / 2, or C with a projection. Dtype of x, like all weights.
        dw: [M, 1, k, k], the depthwise convolution, k odd, padded by k // 2.
        pw2: [out, M, 1, 1], the second 1x1 convolution.
        gamma: [normalised], the scales of the BN layers one behind the other: 2 * mid + out, with a projection 2 * C
            more; None for ones.
        beta: their shifts; None for zeros.
        projection: depthwise [C, 1, k, k] and 1x1 convolution [C, C, 1, 1] of the other branch: depthwise convolution,
            BN; 1x1 convolution, BN, ReLU.
        mid: how many of the M stored channels are used, the first ones; None for all. No other is read, and the
            gradients of the others are exactly zero. An int32 tensor [] on x's device is read by the kernels, so that
            one captured CUDA graph serves all widths; sizes (of gamma, beta, mean, var) then go by M, and what belongs
            to absent channels is zero.
        stride: of the depthwise convolution and of the projection; 2 only with a projection.
        eps: added to the variances.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, ``mid`` or ``stride`` out of range, or a single pixel, which has no
            variance.
    """
    return _train("shuffle_unit", x, (pw1, dw, pw2), gamma, beta, projection, mid, stride, eps)


def xception_unit(
    x: Tensor,
    dw1: Tensor,
    pw1: Tensor,
    dw2: Tensor,
    pw2: Tensor,
    dw3: Tensor,
    pw3: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    projection: tuple[Tensor, Tensor] | None = None,
    mid: Slice = None,
    stride: int = 1,
    eps: float = 1e-5,
) -> UnitOutput:
    """The Xception choice block with batch statistics (arXiv 1904.00420, figure 5).

    Three times depthwise convolution, BN; 1x1 convolution, BN, ReLU. Everything else as :func:`shuffle_unit`.

    Args:
        x: [N, C, H, W].
        dw1: [b, 1, k, k]; b = C / 2, or C with a projection. Takes the stride.
        pw1: [M, b, 1, 1].
        dw2: [M, 1, k, k].
        pw2: [M, M, 1, 1].
        dw3: [M, 1, k, k].
        pw3: [out, M, 1, 1].
        gamma, beta: [b + 4 * mid + out], with a projection 2 * C more.
        projection, mid, stride, eps: see :func:`shuffle_unit`.
    """
    return _train("xception_unit", x, (dw1, pw1, dw2, pw2, dw3, pw3), gamma, beta, projection, mid, stride, eps)


def shuffle_unit_infer(
    x: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    projection: tuple[Tensor, Tensor] | None = None,
    mid: Slice = None,
    stride: int = 1,
) -> Tensor:
    """:func:`shuffle_unit` with every BN layer replaced by a scale and a shift: ``gamma / sqrt(var + eps)`` and
    ``beta - mean * scale``.

    Args:
        x, pw1, dw, pw2, projection, mid, stride: see :func:`shuffle_unit`.
        scale: [normalised], float32 (float64); None where it is already in the weights.
        shift: [normalised].

    Returns:
        [N, beside + out, H', W'], channels last. Differentiable, the backward pass in plain PyTorch.

    Raises:
        TypeError, InputError: as :func:`shuffle_unit`.
    """
    return _infer("shuffle_unit_infer", x, (pw1, dw, pw2), scale, shift, projection, mid, stride)


def xception_unit_infer(
    x: Tensor,
    dw1: Tensor,
    pw1: Tensor,
    dw2: Tensor,
    pw2: Tensor,
    dw3: Tensor,
    pw3: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    projection: tuple[Tensor, Tensor] | None = None,
    mid: Slice = None,
    stride: int = 1,
) -> Tensor:
    """:func:`xception_unit` with every BN layer replaced by a scale and a shift; see :func:`shuffle_unit_infer`."""
    weights = (dw1, pw1, dw2, pw2, dw3, pw3)
    return _infer("xception_unit_infer", x, weights, scale, shift, projection, mid, stride)


def _train(
    name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    projection: tuple[Tensor, Tensor] | None,
    mid: Slice,
    stride: int,
    eps: float,
) -> UnitOutput:
    x, weights, beside, mid, width = _prepared(name, x, weights, projection, mid)
    unit = make_unit(_CHAINS[name], x, weights, beside, mid, stride, on_batch=True)
    check_vector("gamma", gamma, unit)
    check_vector("beta", beta, unit)
    differentiated = (x, *weights, *beside, gamma, beta)
    save = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in differentiated)
    out, _, mean, var = _OPS[name](x, *weights, *beside, gamma, beta, mid, width, stride, eps, save)
    return UnitOutput(out, mean, var)


def _infer(
    name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    shift: Tensor,
    projection: tuple[Tensor, Tensor] | None,
    mid: Slice,
    stride: int,
) -> Tensor:
    x, weights, beside, mid, width = _prepared(name, x, weights, projection, mid)
    unit = make_unit(_CHAINS[name], x, weights, beside, mid, stride, on_batch=False)
    if shift is None:
        raise TypeError("shift must be a tensor, got None; a layer without one has zeros")
    check_vector("scale", scale, unit)
    check_vector("shift", shift, unit)
    out: Tensor = _OPS[name](x, *weights, *beside, scale, shift, mid, width, stride)
    return out


def _prepared(
    name: str, x: Tensor, weights: Sequence[Tensor], projection: tuple[Tensor, Tensor] | None, mid: Slice
) -> tuple[Tensor, Sequence[Tensor], Projection, int, Tensor | None]:
    """The input as the kernels read it; weights, projection; the number of mid channels, and the device's width."""
    for argument, value in zip(("x", *NAMES[_CHAINS[name]]), (x, *weights), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if projection is not None and not (isinstance(projection, (tuple, list)) and len(projection) == 2):
        raise TypeError("projection must be a pair of weights, depthwise and 1x1, or None")
    stored = weights[-1].shape[1] if weights[-1].dim() > 1 else 0
    width = None
    if isinstance(mid, Tensor):
        if mid.dtype != torch.int32 or mid.dim() or mid.device != x.device:
            raise TypeError(
                f"mid must be an int, or an int32 tensor without dimensions on {x.device}; got {mid.dtype} "
                f"{list(mid.shape)} on {mid.device}"
            )
        mid, width = None, mid
    elif mid is not None and (not isinstance(mid, (int, torch.SymInt)) or isinstance(mid, bool)):
        raise TypeError(f"mid must be an int or an int32 tensor, got {type(mid).__name__}")
    beside: Projection = (None, None) if projection is None else (projection[0], projection[1])
    if torch.is_autocast_enabled(x.device.type):
        x, *weights, proj_dw, proj_pw = in_autocast_dtype(x, *weights, *beside)
        beside = proj_dw, proj_pw
    return channels_last(x, name), weights, beside, stored if mid is None else mid, width


_CHAINS: dict[str, Chain] = {
    "shuffle_unit": shuffle_chain,
    "shuffle_unit_infer": shuffle_chain,
    "xception_unit": xception_chain,
    "xception_unit_infer": xception_chain,
}
_OPS: dict[str, Any] = {}


def _image(unit: Unit, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=unit.x.dtype, device=unit.x.device, memory_format=_LAST)


def _define(name: str, chain: Chain) -> None:
    """Define the four ops of a unit. Their arguments: x, weights, projection, two vectors, mid, width, stride, ..."""
    count = len(NAMES[chain])
    weights = ", ".join(f"Tensor {argument}" for argument in NAMES[chain])
    given = f"{weights}, Tensor? proj_dw, Tensor? proj_pw"
    made = f"{weights}, Tensor proj_dw, Tensor proj_pw"

    def parsed(arguments: Sequence[Any], optional: Sequence[Any]) -> tuple[Unit, Unit | None, tuple[Any, ...]]:
        """The unit, the slice of it that is used, and what stands in ``arguments`` behind the weights."""
        x, stored, projection = arguments[0], arguments[1 : 1 + count], (arguments[1 + count], arguments[2 + count])
        first, second, mid, width, *late = arguments[3 + count :]
        late += optional[len(late) :]  # torch leaves out arguments that equal their defaults
        unit = make_unit(chain, x, stored, projection, mid, late[0], on_batch=len(optional) > 1)
        return unit, _narrowed(unit, chain, stored, projection, mid, width), (first, second, *late)

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        unit, used, (gamma, beta, _, eps, save) = parsed(arguments, (1, 1e-5, True))
        check_vector("gamma", gamma, unit)
        check_vector("beta", beta, unit)
        return unit_reference.forward(unit, used or unit, gamma, beta, eps, save)

    def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
        unit, _, (_, _, _, _, save) = parsed(_without_width(arguments, count), (1, 1e-5, True))
        size, dtype = unit.normalised, statistics_dtype(unit.x)
        return (
            _image(unit, unit.out_shape),
            unit.x.new_empty(unit.saved_size if save else 0),
            unit.x.new_empty(size, dtype=dtype),
            unit.x.new_empty(size, dtype=dtype),
        )

    def backward(grad: Tensor, x: Tensor, saved: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        unit, used, (gamma, beta, _, eps) = parsed((x, *rest), (1, 1e-5))
        _check_saved(unit, saved)
        return unit_reference.backward(unit, used or unit, grad, saved, mean, var, gamma, beta, eps)

    def backward_fake(grad: Tensor, x: Tensor, saved: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Any:
        return gradients_fake(parsed(_without_width((x, *rest), count), (1, 1e-5))[0])

    def infer(*arguments: Any) -> Tensor:
        unit, used, (scale, shift, _) = parsed(arguments, (1,))
        check_vector("scale", scale, unit)
        check_vector("shift", shift, unit)
        return unit_reference.infer(unit, used or unit, scale, shift)

    def infer_fake(*arguments: Any) -> Tensor:
        unit = parsed(_without_width(arguments, count), (1,))[0]
        return _image(unit, unit.out_shape)

    def infer_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        unit, used, (scale, shift, _) = parsed(arguments, (1,))
        return unit_reference.infer_backward(unit, used or unit, grad, scale, shift)

    def infer_backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return gradients_fake(parsed(_without_width(arguments, count), (1,))[0])

    def gradients_fake(unit: Unit) -> tuple[Tensor, ...]:
        beside = [layer.weight for layer in unit.projection] or [unit.x.new_empty(0)] * 2
        weights = [weight.new_empty(weight.shape) for weight in (*(layer.weight for layer in unit.main), *beside)]
        vectors = [unit.x.new_empty(unit.normalised, dtype=statistics_dtype(unit.x)) for _ in range(2)]
        return _image(unit, unit.x.shape), *weights, *vectors

    slice_of = "SymInt mid, Tensor? width, int stride=1"
    _OPS[name] = define_op(
        f"{name}(Tensor x, {given}, Tensor? gamma, Tensor? beta, {slice_of}, float eps=1e-05, bool save=True) "
        "-> (Tensor out, Tensor saved, Tensor mean, Tensor var)",
        reference=forward,
        fake=forward_fake,
        triton=f"spos_fast.kernels.units:{name}",
        autocast=range(3 + count),
    )
    backward_op = define_op(
        f"{name}_backward(Tensor grad, Tensor x, Tensor saved, Tensor mean, Tensor var, {given}, Tensor? gamma, "
        f"Tensor? beta, {slice_of}, float eps=1e-05) -> (Tensor x, {made}, Tensor gamma, Tensor beta)",
        reference=backward,
        fake=backward_fake,
        triton=f"spos_fast.kernels.units:{name}_backward",
    )
    _OPS[f"{name}_infer"] = define_op(
        f"{name}_infer(Tensor x, {given}, Tensor? scale, Tensor shift, {slice_of}) -> Tensor",
        reference=infer,
        fake=infer_fake,
        triton=f"spos_fast.kernels.units:{name}_infer",
        autocast=range(3 + count),
    )
    infer_backward_op = define_op(
        f"{name}_infer_backward(Tensor grad, Tensor x, {given}, Tensor? scale, Tensor shift, {slice_of}) "
        f"-> (Tensor x, {made}, Tensor scale, Tensor shift)",
        reference=infer_backward,
        fake=infer_backward_fake,
        plain="nothing trains through a folded unit often enough for a kernel",
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *weights, gamma, beta, ctx.mid, width, ctx.stride, ctx.eps, _ = inputs
        ctx.save_for_backward(x, *output[1:], *weights, gamma, beta, width)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])

    def differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (count + 10)
        *saved, width = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_LAST)
        grads = backward_op(grad, *saved, ctx.mid, width, ctx.stride, ctx.eps)
        return *_fitting(grads, (saved[0], *saved[4:])), None, None, None, None, None

    def keep_folded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.mid, width, ctx.stride = inputs
        ctx.save_for_backward(*tensors, width)

    def differentiate_folded(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, width = ctx.saved_tensors
        grads = infer_backward_op(grad, *tensors, ctx.mid, width, ctx.stride)
        return *_fitting(grads, tensors), None, None, None

    def register(op: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        torch.library.register_autograd(f"spos_fast::{op}", backward, setup_context=setup, lib=LIBRARY)

    register(name, differentiate, keep)
    differentiable_once(f"{name}_backward", name)
    register(f"{name}_infer", differentiate_folded, keep_folded)


def _narrowed(
    unit: Unit, chain: Chain, weights: Sequence[Tensor], projection: Any, mid: int, width: Tensor | None
) -> Unit | None:
    """The unit at the width that a tensor says; None if there is no such tensor."""
    if width is None:
        return None
    used = min(max(int(width), 1), mid)
    return make_unit(chain, unit.x, weights, projection, used, unit.stride, on_batch=False)  # checked with the unit


def _without_width(arguments: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The arguments with None for the width, whose value a fake tensor has not."""
    at = 6 + count
    return *arguments[:at], None, *arguments[at + 1 :]


def _check_saved(unit: Unit, saved: Tensor) -> None:
    if saved.numel() != unit.saved_size:
        raise InputError(
            f"saved must hold {unit.saved_size} values, which a forward pass with save=True leaves; got {saved.numel()}"
        )


def _fitting(grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of the inputs, None for inputs that were not given."""
    return tuple(None if value is None else grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=True))


_define("shuffle_unit", shuffle_chain)
_define("xception_unit", xception_chain)
