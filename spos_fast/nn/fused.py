"""When a choice block's modules can be run as one fused op, and running them so.

The modules stay what they are: parameters, buffers and state-dict names do not change, and running statistics move as
``torch.nn.BatchNorm2d`` moves them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from spos_fast import ops
from spos_fast.ops.dispatch import OPS

_CONV, _NORM, _RELU = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
_KINDS: tuple[type[nn.Module], ...] = (_CONV, _NORM, _RELU)
_FORWARDS = {kind: kind.forward for kind in _KINDS}  # what the ops stand in for
_PROJECTION = (_CONV, _NORM, _CONV, _NORM, _RELU)


@dataclass(frozen=True)
class Plan:
    """A block that an op computes.

    Attributes:
        op: name of the op in training; with ``_infer`` behind it, of the one with statistics folded in.
        layers: types of the branch's modules.
        sliced: for every normalisation layer of the branch whether its channels are mid channels.
    """

    op: str
    layers: tuple[type[nn.Module], ...]
    sliced: tuple[bool, ...]


SHUFFLE = Plan("shuffle_unit", (_CONV, _NORM, _RELU, _CONV, _NORM, _CONV, _NORM, _RELU), (True, True, False))
XCEPTION = Plan("xception_unit", _PROJECTION * 3, (False, True, True, True, True, False))


def run(
    plan: Plan, x: Tensor, branch: nn.Sequential, projection: nn.Sequential | None, stride: int, mid: int | None = None
) -> Tensor | None:
    """The block's output by its op; None where only the modules will do.

    The op runs on images that are channels last, float32 or (on a GPU) under autocast, on devices that have a kernel:
    with batch statistics in all layers, or with running statistics in all layers where no gradient is wanted. Hooks on
    the branches or in them would not fire, and replaced forwards not be called, so they keep the modules; as does
    torch.compile, which fuses by itself.

    Args:
        plan: which block it is.
        x: [N, C, H, W].
        branch, projection: the block's branches.
        stride: of the block.
        mid: how many mid channels are used, the first ones; None for all. Running statistics move inside of the slice.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() != 4 or not _fits(x):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    branches = [(branch, plan.layers)] + ([(projection, _PROJECTION)] if projection is not None else [])
    if _has_any_global_hook() or any(kind.forward is not forward for kind, forward in _FORWARDS.items()):
        return None
    if not all(itertools.starmap(_plain, branches)):
        return None
    norms = [layer for part, _ in branches for layer in part if type(layer) is _NORM]
    if len({(norm.eps, norm.affine) for norm in norms}) > 1 or not all(_is_float(part) for part, _ in branches):
        return None
    on_batch = [_on_batch_statistics(norm) for norm in norms]
    if all(on_batch) and _has_kernel(plan.op, x):
        return _train(plan, x, branch, projection, norms, stride, mid)
    if not any(on_batch) and not _wants_gradients(x, branch, projection) and _has_kernel(f"{plan.op}_infer", x):
        return _infer(plan, x, branch, projection, norms, stride, mid)
    return None


def _train(
    plan: Plan,
    x: Tensor,
    branch: nn.Sequential,
    projection: nn.Sequential | None,
    norms: list[nn.BatchNorm2d],
    stride: int,
    mid: int | None,
) -> Tensor:
    widths = _widths(plan, norms, mid)
    gamma = _joined(norms, widths, lambda norm: norm.weight) if norms[0].affine else None
    beta = _joined(norms, widths, lambda norm: norm.bias) if norms[0].affine else None
    given: dict[str, Any] = dict(
        projection=projection and _weights(projection), mid=mid, stride=stride, eps=norms[0].eps
    )
    made = getattr(ops, plan.op)(x, *(_weights(branch) or ()), gamma, beta, **given)
    height, width = made.out.shape[2:]
    # Only a shuffle unit's first layer runs in front of the stride.
    before = plan is SHUFFLE
    means, variances = made.mean.split(widths), made.var.split(widths)
    for position, (norm, mean, var) in enumerate(zip(norms, means, variances, strict=True)):
        pixels = x.shape[2] * x.shape[3] if before and position == 0 else height * width
        move_statistics(norm, mean, var, x.shape[0] * pixels)
    return cast(Tensor, made.out)


def _infer(
    plan: Plan,
    x: Tensor,
    branch: nn.Sequential,
    projection: nn.Sequential | None,
    norms: list[nn.BatchNorm2d],
    stride: int,
    mid: int | None,
) -> Tensor:
    widths = _widths(plan, norms, mid)
    scale = (_joined(norms, widths, lambda norm: norm.running_var) + norms[0].eps).rsqrt()
    if norms[0].affine:
        scale = scale * _joined(norms, widths, lambda norm: norm.weight)
    shift = -_joined(norms, widths, lambda norm: norm.running_mean) * scale
    if norms[0].affine:
        shift = shift + _joined(norms, widths, lambda norm: norm.bias)
    given: dict[str, Any] = dict(projection=_weights(projection), mid=mid, stride=stride)
    return cast(Tensor, getattr(ops, f"{plan.op}_infer")(x, *(_weights(branch) or ()), scale, shift, **given))


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move a layer's running statistics as its own forward does.

    Args:
        norm: the layer.
        mean, var: of the batch, of the first channels or of all; the variance divided by ``count``.
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
            running[: len(value)].mul_(1 - share).add_(value, alpha=share)


def _widths(plan: Plan, norms: Sequence[nn.BatchNorm2d], mid: int | None) -> list[int]:
    """Channels that are used of every normalisation layer."""
    sliced = itertools.chain(plan.sliced, itertools.repeat(False))
    return [mid if mid is not None and inner else norm.num_features for norm, inner in zip(norms, sliced, strict=False)]


def _joined(norms: Sequence[nn.BatchNorm2d], widths: Sequence[int], of: Callable[[Any], Tensor]) -> Tensor:
    return torch.cat([of(norm)[:width] for norm, width in zip(norms, widths, strict=True)])


def _weights(branch: nn.Sequential | None) -> tuple[Tensor, ...] | None:
    if branch is None:
        return None
    return tuple(layer.weight for layer in branch if isinstance(layer, _CONV))


def _fits(x: Tensor) -> bool:
    """On a CPU autocast keeps the modules: PyTorch's own bfloat16 convolutions use instructions that ours do not."""
    if torch.is_autocast_enabled(x.device.type):
        return x.device.type != "cpu" and x.dtype in (torch.float32, torch.get_autocast_dtype(x.device.type))
    return x.dtype == torch.float32


def _has_kernel(op: str, x: Tensor) -> bool:
    choice = OPS[op].choices.get(x.device.type)
    return choice is not None and choice.kernel != "reference"


def _wants_gradients(x: Tensor, *branches: nn.Sequential | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    parameters: Iterator[Tensor] = itertools.chain.from_iterable(b.parameters() for b in branches if b is not None)
    return x.requires_grad or any(parameter.requires_grad for parameter in parameters)


def _is_float(branch: nn.Sequential) -> bool:
    return all(parameter.dtype == torch.float32 for parameter in branch.parameters())


def _on_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _plain(branch: nn.Sequential, layers: tuple[type[nn.Module], ...]) -> bool:
    """Whether the branch holds these layers and nobody hooked into them, or gave them forwards of their own."""
    found = list(branch)
    if len(found) != len(layers) or any(type(a) is not b for a, b in zip(found, layers, strict=True)):
        return False
    return not any(map(_changed, (branch, *found)))


def _changed(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
