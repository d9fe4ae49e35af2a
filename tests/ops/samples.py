"""Small arguments for every op: what test_every_op.py, the sanitizers and the benchmarks' gate run them on.

Odd sizes, sizes around the vector widths, every layout that a kernel treats by itself, and halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.ops.block_samples import BLOCK_SAMPLES
from tests.ops.norm_samples import NORM_SAMPLES
from tests.ops.quant_conv_samples import QUANT_CONV_SAMPLES
from tests.ops.quant_samples import QUANT_SAMPLES
from tests.ops.sliced_samples import SLICED_SAMPLES
from tests.ops.unit_samples import UNIT_SAMPLES

Arguments = tuple[Any, ...]


SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    **BLOCK_SAMPLES,
    **NORM_SAMPLES,
    **QUANT_CONV_SAMPLES,
    **QUANT_SAMPLES,
    **SLICED_SAMPLES,
    **UNIT_SAMPLES,
}


def on(arguments: Arguments, device: torch.device | str) -> Arguments:
    """The arguments on a device, strides and all: a slice stays a slice of something larger."""
    moved: Arguments = tree_map_only(Tensor, lambda value: _moved(value, device), arguments)
    return moved


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return torch.as_strided(whole.to(device), x.shape, x.stride(), x.storage_offset())
