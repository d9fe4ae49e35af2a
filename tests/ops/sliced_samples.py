"""Small arguments for the sliced layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = tuple[Any, ...]

# N, channels of x, H, W, stored weight, used in and out, stride, padding, dilation, groups, widths in and out
_CONVOLUTIONS = (
    (3, 9, 9, 7, (12, 9, 3, 3), 6, 8, (1, 1), (1, 1), (1, 1), 1, None, None),
    (1, 5, 1, 3, (7, 8, 1, 1), 5, 7, (1, 1), (0, 0), (1, 1), 1, None, 3),
    (2, 33, 8, 5, (40, 1, 5, 3), 17, 17, (2, 1), (2, 1), (1, 1), 40, None, None),
    (2, 8, 8, 6, (8, 1, 3, 3), 8, 8, (1, 1), (2, 2), (2, 2), 8, 5, 5),
    (2, 6, 5, 6, (4, 3, 3, 3), 6, 4, (1, 1), (1, 0), (1, 1), 2, None, None),
    (2, 16, 6, 6, (20, 16, 3, 3), 16, 20, (2, 2), (1, 1), (1, 1), 1, 9, 20),
)


def _sliced_conv2d() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for position, (n, c, h, w, stored, used_in, used_out, *settings, width_in, width_out) in enumerate(
            _CONVOLUTIONS
        ):
            x = torch.randn(n, c, h, w, generator=generator).to(dtype)
            if position % 3 != 2:
                x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(stored, generator=generator) / (stored[1] * stored[2] * stored[3]) ** 0.5
            bias = torch.randn(stored[0], generator=generator).to(dtype) if position % 2 else None
            widths = (w and torch.tensor(w, dtype=torch.int32) for w in (width_in, width_out))
            found.append((x, weight.to(dtype), bias, used_in, used_out, *settings, *widths))
    return found


def _sliced_batch_norm() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for channels, training, affine, width in ((9, True, True, None), (5, True, False, 3), (12, False, True, 7)):
            x = (torch.randn(3, channels, 5, 6, generator=generator) + 0.5).to(dtype)
            stored = [torch.rand(12, generator=generator) + 0.5 for _ in range(4)]
            vectors = [*stored[:2], *(stored[2:] if affine else (None, None))]
            present = None if width is None else torch.tensor(width, dtype=torch.int32)
            found.append((x.contiguous(memory_format=torch.channels_last), *vectors, training, 0.1, 1e-5, present))
    return found


SLICED_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "sliced_batch_norm": _sliced_batch_norm,
    "sliced_conv2d": _sliced_conv2d,
}
