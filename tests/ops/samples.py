"""Small arguments for every op: what test_every_op.py, the sanitizers and the benchmarks' gate run them on.

Odd sizes, sizes around the vector widths, every layout that a kernel treats by itself, and halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.block_samples import BLOCK_SAMPLES
from tests.ops.sliced_samples import SLICED_SAMPLES
from tests.ops.unit_samples import UNIT_SAMPLES

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


SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "bn_moments": _bn_moments,
    **BLOCK_SAMPLES,
    **SLICED_SAMPLES,
    **UNIT_SAMPLES,
}


def on(arguments: Arguments, device: torch.device | str) -> Arguments:
    """The arguments on a device, strides and all: a slice stays a slice of something larger."""
    return tuple(_moved(value, device) if isinstance(value, Tensor) else value for value in arguments)


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return torch.as_strided(whole.to(device), x.shape, x.stride(), x.storage_offset())
