"""Small arguments for every op: what test_every_op.py, the sanitizers and the benchmarks' gate run them on.

Odd sizes, sizes around the vector widths, every layout that a kernel treats by itself, and halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spos_fast.ops import shuffle_unit_reference
from tests.ops.block_samples import BLOCK_SAMPLES

Arguments = tuple[Any, ...]


def _bn_moments() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for shape, groups in (((4, 40, 7, 7), 2), ((3, 5, 9, 1), 1), ((2, 66, 5, 6), 1), ((1, 1, 1, 3), 1)):
            x = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
            wide = torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)
            found += [(x, groups), (x.contiguous(memory_format=torch.channels_last), groups), (wide[:, ::2], groups)]
    return found


# N, half, H, W, stored mid channels, used ones, channels made, kernel, affine: widths 1 and 3, kernels larger than the
# image, counts that no vector width divides, and one image of more rows than a task takes.
_UNITS = (
    (3, 8, 9, 7, 20, 12, 8, 5, False),
    (1, 3, 1, 3, 5, 5, 4, 7, True),
    (2, 20, 5, 1, 33, 33, 18, 3, True),
    (2, 16, 15, 16, 48, 32, 16, 7, False),
    (1, 4, 70, 65, 17, 3, 6, 9, True),
)


def _unit_arguments(dtype: torch.dtype, seed: int) -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # The statistics of few channels that halves round are a matter of luck, for the reference as for a kernel.
    units = _UNITS if dtype == torch.float32 else _UNITS[:-1]
    for samples, half, height, width, stored, mid, made, kernel, affine in units:
        x = (normal(samples, 2 * half, height, width) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
        weights = [normal(stored, half, 1, 1), normal(stored, 1, kernel, kernel), normal(made, stored, 1, 1)]
        size = 2 * mid + made
        gamma = 0.5 + torch.rand(size, generator=generator) if affine else None
        beta = normal(size) if affine else None
        found.append((x, *(weight.to(dtype) for weight in weights), gamma, beta, mid))
    return found


def _shuffle_unit() -> list[Arguments]:
    found = [a for dtype in (torch.float32, torch.float16) for a in _unit_arguments(dtype, 0)]
    nchw, *rest = found[0]
    return [*found, (nchw.contiguous(), *rest), (*found[1], 1e-3, False), *_unit_arguments(torch.bfloat16, 1)]


def _shuffle_unit_backward() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for x, *rest in _unit_arguments(dtype, 2):
            out, *saved = shuffle_unit_reference(x, *rest)
            grad = torch.randn(out.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
            found.append((grad, x, *saved, *rest))
    return found


SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "bn_moments": _bn_moments,
    "shuffle_unit": _shuffle_unit,
    "shuffle_unit_backward": _shuffle_unit_backward,
    **BLOCK_SAMPLES,
}


def on(arguments: Arguments, device: torch.device | str) -> Arguments:
    """The arguments on a device, strides and all: a slice stays a slice of something larger."""
    return tuple(_moved(value, device) if isinstance(value, Tensor) else value for value in arguments)


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return torch.as_strided(whole.to(device), x.shape, x.stride(), x.storage_offset())
