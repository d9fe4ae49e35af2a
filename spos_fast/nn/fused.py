"""When a unit's modules can be run as one fused op, and running them so.

The modules stay what they are: parameters, buffers and state-dict names do not change, and running statistics move as
``torch.nn.BatchNorm2d`` moves them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from spos_fast import ops
from spos_fast.ops.dispatch import OPS

_CONV, _NORM, _RELU = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
_LAYERS: tuple[Any, ...] = (_CONV, _NORM, _RELU, _CONV, _NORM, _CONV, _NORM, _RELU)
_CONVOLUTIONS, _NORMS = (0, 3, 5), (1, 4, 6)
_KINDS: tuple[type[nn.Module], ...] = (_CONV, _NORM, _RELU)
_FORWARDS = {kind: kind.forward for kind in _KINDS}  # what the op stands in for


def applies(x: Tensor, branch: nn.Sequential) -> bool:
    """Whether the branch of a shuffle unit runs as the op: same result, faster, and nobody looks inside.

    It does on float32 images that are channels last, with batch statistics in all three layers, on devices that have a
    kernel. Hooks on the branch or in it would not fire, and replaced forwards not be called, so they keep the plain
    path; as do torch.compile, which fuses by itself, and autocast.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() != 4 or x.dtype != torch.float32:
        return False
    choice = OPS["shuffle_unit"].choices.get(x.device.type)
    if choice is None or choice.kernel == "reference" or torch.is_autocast_enabled(x.device.type):
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    layers = list(branch)
    if len(layers) != len(_LAYERS) or any(type(a) is not b for a, b in zip(layers, _LAYERS, strict=True)):
        return False
    if any(kind.forward is not forward for kind, forward in _FORWARDS.items()):
        return False
    if _has_any_global_hook() or any(map(_changed, (branch, *layers))):
        return False
    norms = _norms(branch)
    alike = len({norm.eps for norm in norms}) == 1 and len({norm.affine for norm in norms}) == 1
    return alike and all(map(_on_batch_statistics, norms)) and all(p.dtype == x.dtype for p in branch.parameters())


def shuffle_unit(x: Tensor, branch: nn.Sequential) -> Tensor:
    """The unit of stride 1 whose branch is given, by ``ops.shuffle_unit``; running statistics move."""
    pw1, dw, pw2 = (cast(nn.Conv2d, branch[at]).weight for at in _CONVOLUTIONS)
    norms = _norms(branch)
    gamma = torch.cat([norm.weight for norm in norms]) if norms[0].affine else None
    beta = torch.cat([norm.bias for norm in norms]) if norms[0].affine else None
    out, mean, var = ops.shuffle_unit(x, pw1, dw, pw2, gamma, beta, eps=norms[0].eps)
    sizes = [norm.num_features for norm in norms]
    count = x.shape[0] * x.shape[2] * x.shape[3]
    for norm, norm_mean, norm_var in zip(norms, mean.split(sizes), var.split(sizes), strict=True):
        move_statistics(norm, norm_mean, norm_var, count)
    return out


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move a layer's running statistics as its own forward does.

    Args:
        norm: the layer.
        mean, var: of the batch; the variance divided by ``count``.
        count: values a channel.
    """
    if not norm.training or not norm.track_running_stats:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:  # the average of all batches
        share = 1 / float(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0
    for running, value in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        if running is not None:
            running.mul_(1 - share).add_(value, alpha=share)


def _norms(branch: nn.Sequential) -> list[nn.BatchNorm2d]:
    return [cast(nn.BatchNorm2d, branch[at]) for at in _NORMS]


def _on_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _changed(module: nn.Module) -> bool:
    """Whether somebody hooked into this module, or gave it a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
