"""The one memory layout that the fused ops read and write: channels last."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

_warned: set[str] = set()  # ops


def channels_last(x: Tensor, op: str, name: str = "x") -> Tensor:
    """The tensor itself if it is packed with the channels last; else a copy that is, with one warning an op."""
    if x.dim() != 4 or x.is_contiguous(memory_format=torch.channels_last):
        return x
    if op not in _warned and not torch.compiler.is_compiling():
        _warned.add(op)
        warnings.warn(
            f"{op}: {name} is not channels last and is copied; convert the model and its input once with "
            ".to(memory_format=torch.channels_last)",
            RuntimeWarning,
            stacklevel=4,
        )
    return x.contiguous(memory_format=torch.channels_last)


def packed_channels_last(x: Tensor) -> Tensor:
    """With the strides of channels last in all dimensions, also in those of size 1."""
    _, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)
