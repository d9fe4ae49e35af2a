"""What recalibration runs beside the units: bn_normalize, and bn_merge over a population."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.peers import calibration as peers
from bench.peers.compiled import compiled
from bench.registry import OURS, Bind, Case
from spos_fast import ops

# The four stages of the ImageNet supernet: channels of a branch, blocks. A block of the usual kind has three BN layers.
STAGES = ((32, 4), (80, 4), (160, 8), (320, 4))
CANDIDATES = 50


def cases(device: str) -> list[Case]:
    """Normalisation in both layouts and with groups; merging with vectors of every candidate, and with rows of one."""
    batch = 128 if device == "cuda" else 32
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    found = []
    for dtype in dtypes:
        for shape, layout, groups in (
            ((batch, 32, 56, 56), "NHWC", 1),
            ((batch, 160, 14, 14), "NHWC", 1),
            ((batch, 160, 14, 14), "NCHW", 1),
            ((batch, 160, 14, 14), "NHWC", 8),
        ):
            found.append(_normalize(device, shape, dtype, layout, groups))
    layers = [channels for channels, blocks in STAGES for _ in range(3 * blocks)]
    found.append(_merge(device, f"{CANDIDATES} x {len(layers)} layers", [(c,) for c in layers] * CANDIDATES))
    found.append(_merge(device, f"{len(layers)} layers of {CANDIDATES} rows", [(CANDIDATES, c) for c in layers]))
    return found


def _normalize(device: str, shape: tuple[int, ...], dtype: str, layout: str, groups: int) -> Case:
    values = torch.Size(shape).numel()

    def inputs(where: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(where, getattr(torch, dtype))
        scale, shift = (torch.rand(groups, shape[1], generator=generator).to(where) for _ in range(2))
        memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        return x.contiguous(memory_format=memory_format), scale + 0.5, shift - 0.5, True, groups

    def ours(given: Any) -> Callable[[], Tensor]:
        x, scale, shift, relu, _ = given
        return lambda: ops.bn_normalize(x, scale, shift, relu=relu, groups=groups)

    return Case(
        op="bn_normalize",
        shape="x".join(map(str, shape)) + f" {layout}" + (f" groups={groups}" if groups > 1 else ""),
        dtype=dtype,
        device=device,
        bytes=2 * values * getattr(torch, dtype).itemsize,
        flops=0,  # 2 a value, on vector units: no roof of the matrix rate
        inputs=inputs,
        contenders={
            OURS: ours,
            "eager batch_norm": _bind(peers.batch_norm_relu),
            "compile batch_norm": lambda given: _bind(compiled(peers.batch_norm_relu))(given),
        },
        tests=("tests/ops/test_bn_normalize.py", "tests/ops/test_every_op.py"),
        tolerance=1e-2 if dtype == "bfloat16" else 1e-5,
    )


def _merge(device: str, shape: str, sizes: Sequence[tuple[int, ...]]) -> Case:
    def inputs(where: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)

        def vectors(dtype: torch.dtype) -> list[Tensor]:
            return [torch.rand(size, generator=generator).to(where, dtype) for size in sizes]

        count = [1000] * len(sizes)
        states, batch = [vectors(torch.float64) for _ in range(2)], [vectors(torch.float32) for _ in range(2)]
        return *states, count, *batch, count, "cumulative", 3, 0.1, False

    def ours(given: Any) -> Callable[[], Any]:
        *lists, mode, batches, momentum, biased = given
        return lambda: ops.bn_merge(*lists, mode=mode, batches=batches, momentum=momentum, biased=biased)

    values = sum(torch.Size(size).numel() for size in sizes)
    return Case(
        op="bn_merge",
        shape=shape,
        dtype="float64",
        device=device,
        bytes=values * (4 * 8 + 2 * 4),  # states in and out, the batch's statistics
        flops=0,
        inputs=inputs,
        contenders={
            OURS: ours,
            "loop over layers": _bind(peers.merged_in_a_loop),
            "torch._foreach": _bind(peers.merged_by_foreach),
        },
        tests=("tests/ops/test_bn_states.py", "tests/ops/test_every_op.py"),
        tolerance=1e-6,
        items=len(sizes),
        unit="layers",
    )


def _bind(function: Callable[..., Any]) -> Bind:
    return lambda given: lambda: function(*given)
