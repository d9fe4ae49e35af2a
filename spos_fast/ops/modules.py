"""Ops for modules that hold normalisation layers of torch.nn: what those keep goes in as it lies, a list of tensors.

A unit's kernels take a fraction of a millisecond where images are small, and fill the caches; every call of an op that
comes before or after then costs 50 microseconds or so. Folding a unit's statistics, or moving them, is one call here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops import unit_reference
from spos_fast.ops.dispatch import LIBRARY, define_op
from spos_fast.ops.unit_layers import Unit, make_unit, shuffle_chain, statistics_dtype, xception_chain

_CHAINS = {3: shuffle_chain, 6: xception_chain}  # by the weights of a main branch


def unit_of(x: Tensor, weights: Sequence[Tensor], mid: int, stride: int) -> Unit:
    """The unit that the arguments of ``unit_eval`` describe."""
    count = len(weights) - (2 if len(weights) % 3 else 0)
    if count not in _CHAINS:
        raise InputError(f"weights must hold 3 or 6 tensors, and 2 of a projection; got {len(weights)}")
    *_, proj_dw, proj_pw = weights if len(weights) > count else (None, None)
    return make_unit(_CHAINS[count], x, weights[:count], (proj_dw, proj_pw), mid, stride, on_batch=False)


def unit_eval_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    mid: int,
    stride: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """A unit that normalises by running statistics, in plain PyTorch.

    Args:
        x: [N, C, H, W], channels last.
        weights: of the main branch (3 of a shuffle unit, 6 of an Xception unit), then of the projection, if any; shapes
            as :func:`spos_fast.ops.shuffle_unit` and :func:`spos_fast.ops.xception_unit` have them.
        mean, var: running statistics, a vector a layer, main branch before projection; the channels in use are read.
        gamma, beta: likewise, or empty.
        mid: how many mid channels are used.
        stride: of the unit.
        eps: added to the variances.
    """
    unit = unit_of(x, weights, mid, stride)
    dtype = statistics_dtype(x)

    def joined(vectors: Sequence[Tensor]) -> Tensor:
        return torch.cat([vector[:size].to(dtype) for vector, size in zip(vectors, unit.sizes, strict=True)])

    scale = (joined(var) + eps).rsqrt()
    if gamma:
        scale = scale * joined(gamma)
    shift = -joined(mean) * scale
    if beta:
        shift = shift + joined(beta)
    return unit_reference.infer(unit, unit, scale, shift)


def bn_update_running_reference(
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    counters: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    channels: Sequence[int],
    count: Sequence[int],
    momentum: Sequence[float],
) -> None:
    """Moves layers' running statistics by a batch's, as torch.nn.BatchNorm2d does, in plain PyTorch.

    Args:
        running_mean, running_var: one vector a layer, of which the first channels move.
        counters: int64 tensors of one value, each of which goes up by one.
        mean, var: of the batch, all layers behind one another; var divided by the count.
        channels: of each layer.
        count: values a channel.
        momentum: the batch's share.
    """
    with torch.no_grad():
        for counter in counters:
            counter += 1
        means, variances = mean.split(list(channels)), var.split(list(channels))
        for layer, share in enumerate(momentum):
            size, unbiased = channels[layer], count[layer] / (count[layer] - 1)
            running_mean[layer][:size].mul_(1 - share).add_(means[layer], alpha=share)
            running_var[layer][:size].mul_(1 - share).add_(variances[layer], alpha=share * unbiased)


def unit_train_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    counters: Sequence[Tensor],
    gamma: Sequence[Tensor],
    beta: Sequence[Tensor],
    momentum: Sequence[float],
    mid: int,
    stride: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """A unit that normalises by its batch's statistics and moves the running ones, in plain PyTorch.

    Args: see :func:`unit_eval_reference` and :func:`bn_update_running_reference`.
    """
    unit = unit_of(x, weights, mid, stride)

    def joined(vectors: Sequence[Tensor]) -> Tensor | None:
        pairs = zip(vectors, unit.sizes, strict=True)
        return torch.cat([vector[:size].to(statistics_dtype(x)) for vector, size in pairs]) if vectors else None

    out, _, mean, var = unit_reference.forward(unit, unit, joined(gamma), joined(beta), eps, False)
    count = [shape[0] * shape[2] * shape[3] for shape in unit.saved_shapes]
    bn_update_running_reference(running_mean, running_var, counters, mean, var, unit.sizes, count, momentum)
    return out


def _fake_train(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> Tensor:
    return _fake(x, weights, *rest[6:])


def _fake_eval(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> Tensor:
    return _fake(x, weights, *rest[4:])


def _fake(x: Tensor, weights: Sequence[Tensor], mid: int, stride: int = 1, eps: float = 1e-5) -> Tensor:
    unit = unit_of(x, weights, mid, stride)
    return torch.empty(unit.out_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_update(*_: Any) -> None:
    return None


def _not_differentiable(*_: Any) -> None:
    raise RuntimeError("unit_eval and unit_train are not differentiable; shuffle_unit, xception_unit and _infer are")


unit_eval = define_op(
    "unit_eval(Tensor x, Tensor[] weights, Tensor[] mean, Tensor[] var, Tensor[] gamma, Tensor[] beta, SymInt mid, "
    "int stride=1, float eps=1e-05) -> Tensor",
    reference=unit_eval_reference,
    fake=_fake_eval,
)
torch.library.register_autograd("spos_fast::unit_eval", _not_differentiable, lib=LIBRARY)

unit_train = define_op(
    "unit_train(Tensor x, Tensor[] weights, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, "
    "Tensor(c!)[] counters, Tensor[] gamma, Tensor[] beta, float[] momentum, SymInt mid, int stride=1, "
    "float eps=1e-05) -> Tensor",
    reference=unit_train_reference,
    fake=_fake_train,
)

bn_update_running = define_op(
    "bn_update_running(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] counters, Tensor mean, "
    "Tensor var, int[] channels, int[] count, float[] momentum) -> ()",
    reference=bn_update_running_reference,
    fake=_fake_update,
)
