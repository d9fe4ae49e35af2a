"""Which channels of a tensor an op uses: checks, and the plain-PyTorch references' way of picking and masking them.

A width is an int32 tensor [] on the device: how many of the channels that the sizes speak of are really used. A kernel
reads it at run time, so that a CUDA graph can be replayed on another value; the others are absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import DTYPES
from spos_fast.ops.groups import each
from spos_fast.ops.unit_layers import statistics_dtype

LAST = torch.channels_last


def width_of(name: str, channels: int | Tensor | None, stored: int) -> tuple[int, Tensor | None]:
    """A user's number of channels as the raw ops take it: the size to work in, and the width if it is a tensor.

    Raises:
        TypeError: neither an int nor a tensor.
    """
    if channels is None:
        return stored, None
    if isinstance(channels, Tensor):
        return stored, channels
    if not isinstance(channels, (int, torch.SymInt)) or isinstance(channels, bool):
        raise TypeError(f"{name} must be an int or an int32 tensor [], got {type(channels).__name__}")
    return channels, None


def in_autocast_dtype(*values: Any) -> tuple[Any, ...]:
    """The tensors (the first is the image) in the dtype of autocast where that is on; float64 images leave all as is.

    What is no tensor stays: a missing argument, or a mistake that is refused later.
    """
    x = values[0]
    if not isinstance(x, Tensor) or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return values
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in values)


def check_width(name: str, width: Tensor | None, x: Tensor) -> None:
    """Refuse what is no width on x's device."""
    if width is None:
        return
    if width.dtype != torch.int32:
        raise TypeError(f"{name} must be an int or an int32 tensor [], got a tensor of {width.dtype}")
    if width.dim() != 0 or width.device != x.device:
        raise InputError(
            f"{name} must be an int or an int32 tensor [] on {x.device}, got shape {list(width.shape)} "
            f"on {width.device}"
        )


def check_image(name: str, x: Tensor, *, empty_batch: bool = False) -> None:
    """Refuse what is no image; a batch of none too, unless ``empty_batch``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise InputError(f"{name} must be [N, C, H, W], got shape {list(x.shape)}")
    if x.numel() == 0 and not (empty_batch and 0 not in x.shape[1:]):
        raise InputError(f"{name} must hold at least one value in each channel, got shape {list(x.shape)}")


def check_weight(weight: Tensor, x: Tensor) -> None:
    """Refuse what is no convolution's weight for x."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    if weight.dim() != 4:
        raise InputError(f"weight must have 4 dimensions, got shape {list(weight.shape)}")


def check_affine(
    scale_name: str,
    scale: Tensor | None,
    shift_name: str,
    shift: Tensor | None,
    channels: int,
    x: Tensor,
    groups: int = 1,
) -> None:
    """Refuse a scale and a shift that are not both there, or do not fit ``channels`` channels of x's groups."""
    if (scale is None) != (shift is None):
        raise InputError(f"{scale_name} and {shift_name} must be given both or not at all")
    for name, value in ((scale_name, scale), (shift_name, shift)):
        if value is not None:
            check_statistics(name, value, each(groups, channels), x)


def check_statistics(name: str, value: Tensor, shape: list[int], x: Tensor) -> None:
    """Refuse what is not of this shape, or not of the dtype of x's statistics."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != statistics_dtype(x):
        raise TypeError(f"{name} must be {statistics_dtype(x)} for x of {x.dtype}, got {value.dtype}")
    if list(value.shape) != shape:
        raise InputError(f"{name} must be {shape}, one for each channel used, got shape {list(value.shape)}")


def picked(x: Tensor, first: int, step: int, channels: int) -> Tensor:
    """The channels first, first + step, ... of an image, as a view."""
    return x[:, first : first + step * (channels - 1) + 1 : step]


def scattered(part: Tensor, x: Tensor, first: int, step: int) -> Tensor:
    """An image of x's size with ``part`` where :func:`picked` takes it from, and zeros elsewhere."""
    if part.shape[1] == x.shape[1]:
        return part
    whole = torch.zeros_like(x)
    picked(whole, first, step, part.shape[1]).copy_(part)
    return whole


def present(width: Tensor, like: Tensor, dim: int) -> Tensor:
    """Which entries along ``dim`` are below the width, in a shape that broadcasts against ``like``."""
    mask = torch.arange(like.shape[dim], device=like.device) < width
    return mask.view([-1 if at == dim else 1 for at in range(like.dim())])


def only_present(value: Tensor, width: Tensor | None, dim: int) -> Tensor:
    """The value with exact zeros for absent entries along ``dim``, whatever stood there."""
    return value if width is None else torch.where(present(width, value, dim), value, 0)


def padded(part: Tensor, shape: torch.Size) -> Tensor:
    """A slice from the beginning of a weight's first two dimensions, with zeros up to the whole shape."""
    rows, columns = shape[0] - part.shape[0], shape[1] - part.shape[1]
    return functional.pad(part, (0, 0, 0, 0, 0, columns, 0, rows)).contiguous()


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Scales and shifts the channels of x, in the dtype of statistics."""
    wide = x.to(statistics_dtype(x))
    return wide if scale is None or shift is None else wide * scale[:, None, None] + shift[:, None, None]


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
    """What a layer loads: x with scale, shift and maybe ReLU, in the dtype of x."""
    wide = affine(x, scale, shift)
    return (wide.relu() if relu else wide).to(x.dtype)


def new_image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised channels-last image like x."""
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=LAST)


def new_statistics(x: Tensor, *size: int) -> Tensor:
    """An uninitialised tensor of statistics of x."""
    return x.new_empty(size, dtype=statistics_dtype(x))


def strided_size(x: Tensor, stride: int) -> tuple[int, int]:
    """Rows and columns after a convolution of odd kernel and half as much padding."""
    return (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1
