"""Small arguments for the ops of batch norm: statistics, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arguments = tuple[Any, ...]
LAST = torch.channels_last
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _bn_moments() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape, groups in (((4, 40, 7, 7), 2), ((3, 5, 9, 1), 1), ((2, 66, 5, 6), 1), ((1, 1, 1, 3), 1)):
            x = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
            wide = torch.cat((x, x), 1).contiguous(memory_format=LAST)
            found += [(x, groups), (x.contiguous(memory_format=LAST), groups), (wide[:, ::2], groups)]
    return found


def _bn_normalize() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(1)
    for position, (x, groups) in enumerate(_bn_moments()):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale, shift = (torch.randn(groups, x.shape[1], generator=generator, dtype=wide) for _ in range(2))
        found.append((x, scale + 1, shift, position % 2 == 0, groups))
    return found


def _bn_add_relu() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(4)
    for position, (x, scale, shift, _, groups) in enumerate(_bn_normalize()):
        x = x.contiguous(memory_format=LAST)
        residual = torch.randn(x.shape, generator=generator).to(x.dtype).contiguous(memory_format=LAST)
        beside = (None, None) if position % 2 else (shift + 1, scale)
        found.append((x, scale, shift, residual, *beside, groups))
    return found


def _bn_add_relu_backward() -> list[Arguments]:
    found: list[Arguments] = []
    for x, scale, _, residual, residual_scale, _, groups in _bn_add_relu():
        out = (x * 2 - residual).relu().contiguous(memory_format=LAST)
        found.append((residual + 1, out, x, scale, residual, residual_scale, groups))
    return found


# Of each layer the shape of its statistics, the values behind the state and those of the batch.
_LAYERS = (((5,), 12, 9), ((2, 3, 8), 2, 2), ((1,), 700, 49), ((600,), 1, 300))


def _states(generator: torch.Generator, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    means = [torch.randn(shape, generator=generator).to(dtype) for shape, _, _ in _LAYERS]
    return means, [(torch.rand(shape, generator=generator) + 0.5).to(dtype) for shape, _, _ in _LAYERS]


def _bn_merge() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(2)
    done, count = ([layer[position] for layer in _LAYERS] for position in (1, 2))
    for dtype in (torch.float32, torch.float64):
        for mode in ("cumulative", "pooled", "ema"):
            mean, var = _states(generator, torch.float64)
            batch_mean, batch_m2 = _states(generator, dtype)
            mean[1] = mean[1].transpose(0, 2).contiguous().transpose(0, 2)
            found.append((mean, var, done, batch_mean, batch_m2, count, mode, 3, 0.2, dtype == torch.float64))
            found.append(([], [], [], batch_mean, batch_m2, count, mode, 0, 0.1, False))
    return found


def _bn_finalize() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(3)
    count = [layer[1] for layer in _LAYERS]
    for dtype in (torch.float32, torch.float64):
        mean, var = _states(generator, torch.float64)
        gamma, beta = ([torch.randn(shape[-1], generator=generator).to(dtype) for shape, _, _ in _LAYERS] for _ in "ab")
        gamma[2] = beta[0] = torch.empty(0, dtype=dtype)  # none
        found += [(mean, var, gamma, beta, 1e-5, [], dtype), (mean, var, [], [], 1e-3, count, dtype)]
    return found


def _bn_update_running() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.float64):
        mean, var = ([torch.rand(n, generator=generator).to(dtype) for n in (5, 33, 1)] for _ in range(2))
        mean[1] = torch.stack((mean[1], mean[1]), 1)[:, 0]
        batch_mean, batch_var = (torch.rand(26, generator=generator).to(dtype) for _ in range(2))
        counters = [torch.tensor(7), torch.tensor(0)]
        found.append((mean, var, counters, batch_mean, batch_var, [5, 20, 1], [2, 300, 12], [0.1, 1.0, 0.0]))
    return found


NORM_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "bn_add_relu": _bn_add_relu,
    "bn_add_relu_backward": _bn_add_relu_backward,
    "bn_finalize": _bn_finalize,
    "bn_merge": _bn_merge,
    "bn_moments": _bn_moments,
    "bn_normalize": _bn_normalize,
    "bn_update_running": _bn_update_running,
}
