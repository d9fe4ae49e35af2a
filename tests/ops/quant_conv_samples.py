"""Small arguments for quant_conv2d; random values, so that no code lies within a rounding error of a tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.ops.quant_samples import BITS, DTYPES

Arguments = tuple[Any, ...]
# N, C, H, W, C_out, kernel, groups, stride, padding, dilation
_SHAPES = (
    (3, 5, 7, 9, 11, 3, 1, 1, 1, 1),
    (2, 16, 6, 5, 16, 3, 16, 2, 1, 1),
    (2, 12, 8, 8, 6, 3, 3, 1, 2, 2),
    (1, 33, 5, 6, 20, 1, 1, 2, 0, 1),
)


def _quant_conv2d() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(17)
    for dtype in DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for position, (n, c, h, w, out, k, groups, stride, padding, dilation) in enumerate(_SHAPES):
            x = torch.randn(n, c, h, w, generator=generator).to(dtype)
            if position % 3 != 2:
                x = x.contiguous(memory_format=torch.channels_last)
            weight = (torch.randn(out, c // groups, k, k, generator=generator) * 0.4).to(wide if position else dtype)
            bias = torch.randn(out, generator=generator).to(dtype) if position % 2 else None
            affine = torch.randn(2, c, generator=generator, dtype=wide) if position != 2 else (None, None)
            mode = ("pact", "pact_residual", "lsq")[position % 3]
            act_step = torch.full((5,), 0.31 if mode == "lsq" else 2.1, dtype=wide)
            lsq, per_channel = position % 2 == 1, position == 3
            steps = 0.1 + torch.rand((5, out) if per_channel else (5,), generator=generator, dtype=wide)
            act, chosen = torch.tensor(position), torch.tensor((position + DTYPES.index(dtype)) % 5)
            quantizers = (act_step, BITS, act, mode, steps if lsq else None, BITS, chosen, "lsq" if lsq else "dorefa")
            settings = ([stride] * 2, [padding] * 2, [dilation] * 2, groups, position != 1)
            found.append((x, weight, bias, *affine, *quantizers, per_channel, *settings))
    return found


QUANT_CONV_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {"quant_conv2d": _quant_conv2d}
