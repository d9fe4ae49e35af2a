"""The choice blocks of the ShuffleNetV2 space as ops: in training with batch statistics, and with them folded in.

Batch statistics need a convolution's whole output before the next layer can start, so the training kernels make one
pass a convolution, and normalise and clip where the next pass loads. The outputs of the convolutions are what they keep
for the backward pass. With normalisation folded into a scale and a shift nothing stands in the way of a single pass.

Two chains of layers (``unit_layers``) make the two units; everything here is written once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spos_fast.ops.channels import in_autocast_dtype
from spos_fast.ops.layout import channels_last
from spos_fast.ops.unit_definitions import CHAINS, UNIT_OPS
from spos_fast.ops.unit_layers import NAMES, Projection, check_vector, make_unit


class UnitOutput(NamedTuple):
    """What a unit makes in training.

    Attributes:
        out: [groups * N, beside + out, H', W'], channels last: the channels that pass or the projection's, then the
            branch's.
        mean: [normalised], with several groups [groups, normalised], float32 (float64 for float64): batch means in
            front of the BN layers, one layer behind the other: main branch, then projection. Not differentiable.
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
    groups: int = 1,
) -> UnitOutput:
    """ShuffleNetV2 unit with batch statistics (arXiv 1807.11164, figure 3c and d, as in arXiv 1904.00420).

    1x1 convolution, BN, ReLU; depthwise convolution, BN; 1x1 convolution, BN, ReLU. Without a projection even channels
    pass, odd channels go through that branch, and both are concatenated: the channel shuffle of the published code.
    With one, both branches see all channels. The result is differentiable once, the same for any number of threads, and
    channels last.

    Args:
        x: [groups * N, C, H, W], channels last (anything else is copied, with one warning); float32, float64, float16
            or bfloat16. Under autocast, x and the convolutions' weights are cast to its dtype.
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
        groups: how many runs of N images stand in x one behind the other, each normalised by statistics of its own. On
            the CPU every run has the bits of a call of its own; weights' gradients are summed in the runs' order.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, ``mid`` or ``stride`` out of range, groups of different sizes, or
            a single pixel, which has no variance.
    """
    return _train("shuffle_unit", x, (pw1, dw, pw2), gamma, beta, projection, mid, stride, eps, groups)


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
    groups: int = 1,
) -> UnitOutput:
    """The Xception choice block with batch statistics (arXiv 1904.00420, figure 5).

    Three times depthwise convolution, BN; 1x1 convolution, BN, ReLU. Everything else as :func:`shuffle_unit`.

    Args:
        x: [groups * N, C, H, W].
        dw1: [b, 1, k, k]; b = C / 2, or C with a projection. Takes the stride.
        pw1: [M, b, 1, 1].
        dw2: [M, 1, k, k].
        pw2: [M, M, 1, 1].
        dw3: [M, 1, k, k].
        pw3: [out, M, 1, 1].
        gamma, beta: [b + 4 * mid + out], with a projection 2 * C more.
        projection, mid, stride, eps, groups: see :func:`shuffle_unit`.
    """
    return _train("xception_unit", x, (dw1, pw1, dw2, pw2, dw3, pw3), gamma, beta, projection, mid, stride, eps, groups)


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
    groups: int = 1,
) -> Tensor:
    """:func:`shuffle_unit` with every BN layer replaced by a scale and a shift: ``gamma / sqrt(var + eps)`` and
    ``beta - mean * scale``.

    Args:
        x, pw1, dw, pw2, projection, mid, stride, groups: see :func:`shuffle_unit`.
        scale: [normalised], with several groups [groups, normalised], float32 (float64); None where it is already in
            the weights.
        shift: likewise.

    Returns:
        [groups * N, beside + out, H', W'], channels last. Differentiable, the backward pass in plain PyTorch.

    Raises:
        TypeError, InputError: as :func:`shuffle_unit`.
    """
    return _infer("shuffle_unit_infer", x, (pw1, dw, pw2), scale, shift, projection, mid, stride, groups)


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
    groups: int = 1,
) -> Tensor:
    """:func:`xception_unit` with every BN layer replaced by a scale and a shift; see :func:`shuffle_unit_infer`."""
    weights = (dw1, pw1, dw2, pw2, dw3, pw3)
    return _infer("xception_unit_infer", x, weights, scale, shift, projection, mid, stride, groups)


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
    groups: int,
) -> UnitOutput:
    x, weights, beside, mid, width = _prepared(name, x, weights, projection, mid)
    unit = make_unit(CHAINS[name], x, weights, beside, mid, stride, on_batch=True, groups=groups)
    check_vector("gamma", gamma, unit)
    check_vector("beta", beta, unit)
    differentiated = (x, *weights, *beside, gamma, beta)
    save = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in differentiated)
    out, _, mean, var = UNIT_OPS[name](x, *weights, *beside, gamma, beta, mid, width, stride, eps, save, groups)
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
    groups: int,
) -> Tensor:
    x, weights, beside, mid, width = _prepared(name, x, weights, projection, mid)
    unit = make_unit(CHAINS[name], x, weights, beside, mid, stride, on_batch=False, groups=groups)
    if shift is None:
        raise TypeError("shift must be a tensor, got None; a layer without one has zeros")
    check_vector("scale", scale, unit, grouped=True)
    check_vector("shift", shift, unit, grouped=True)
    out: Tensor = UNIT_OPS[name](x, *weights, *beside, scale, shift, mid, width, stride, groups)
    return out


def _prepared(
    name: str, x: Tensor, weights: Sequence[Tensor], projection: tuple[Tensor, Tensor] | None, mid: Slice
) -> tuple[Tensor, Sequence[Tensor], Projection, int, Tensor | None]:
    """The input as the kernels read it; weights, projection; the number of mid channels, and the device's width."""
    for argument, value in zip(("x", *NAMES[CHAINS[name]]), (x, *weights), strict=True):
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
