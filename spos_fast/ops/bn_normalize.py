"""Batch norm with given statistics and its ReLU in one pass, for several candidates stacked in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.channels import LAST, check_image, check_statistics
from spos_fast.ops.dispatch import LIBRARY, define_op
from spos_fast.ops.unit_layers import statistics_dtype


def bn_normalize(x: Tensor, scale: Tensor, shift: Tensor, *, relu: bool, groups: int = 1) -> Tensor:
    """Scale and shift of each channel and group, scale * x + shift, then clipped at zero if ``relu``.

    Computed in the dtype of the statistics and rounded once. The bits of a group are those of a call of its own; a NaN
    stays where it is. Differentiable, twice. Autocast leaves x in its dtype, as it does for batch norm.

    Args:
        x: [N, C, H, W], not empty; float32, float64, float16 or bfloat16. Channels-last and contiguous tensors, and
            slices of their channels, are read where they lie; anything else is copied once.
        scale: [groups, C], float32 (float64 for float64); see :func:`bn_finalize`.
        shift: likewise.
        relu: whether to clip at zero.
        groups: splits the batch in this many equal runs of samples; divides N.

    Returns:
        [N, C, H, W], dtype of x: channels last where the channels of x are neighbours in memory, else contiguous.

    Raises:
        TypeError: an argument is no tensor or of a dtype that does not fit; groups is no int.
        InputError: shapes that do not fit together; groups does not divide N.
    """
    _check(x, scale, shift, groups)
    out: Tensor = _op(x, scale, shift, relu, groups)
    return out


def bn_normalize_reference(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, groups: int = 1) -> Tensor:
    """What bn_normalize computes, in plain PyTorch."""
    _check(x, scale, shift, groups)
    wide = _affine(x, scale, shift, groups)
    out = (wide.relu() if relu else wide).flatten(0, 1).to(x.dtype)
    return out.contiguous(memory_format=_memory_format(x))


def _affine(x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> Tensor:
    """[groups, N / groups, C, H, W] in the dtype of the statistics."""
    wide = x.to(statistics_dtype(x)).unflatten(0, (groups, x.shape[0] // groups))
    return wide * _per_channel(scale) + _per_channel(shift)


def _per_channel(values: Tensor) -> Tensor:
    """[groups, C] as it broadcasts against [groups, N / groups, C, H, W]."""
    return values[:, None, :, None, None]


def _memory_format(x: Tensor) -> torch.memory_format:
    return LAST if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def _check(x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> None:
    check_image("x", x)
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or x.shape[0] % groups != 0:
        raise InputError(f"groups must divide the batch of {x.shape[0]} samples, got {groups}")
    for name, value in (("scale", scale), ("shift", shift)):
        check_statistics(name, value, [groups, x.shape[1]], x)


def _fake(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, groups: int = 1) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


_op = define_op(
    "bn_normalize(Tensor x, Tensor scale, Tensor shift, bool relu, int groups=1) -> Tensor",
    reference=bn_normalize_reference,
    fake=_fake,
    triton="spos_fast.kernels.batchnorm:bn_normalize",
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, ctx.relu, ctx.groups = inputs
    ctx.save_for_backward(x, scale, shift)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift = ctx.saved_tensors
    through = grad.to(scale.dtype).unflatten(0, (ctx.groups, -1))
    if ctx.relu:
        through = torch.where(_affine(x, scale, shift, ctx.groups) > 0, through, 0)
    wide = x.to(scale.dtype).unflatten(0, (ctx.groups, -1))
    grad_x = (through * _per_channel(scale)).flatten(0, 1).to(x.dtype)
    return grad_x, (through * wide).sum((1, 3, 4)), through.sum((1, 3, 4)), None, None


torch.library.register_autograd("spos_fast::bn_normalize", _backward, setup_context=_save_for_backward, lib=LIBRARY)
