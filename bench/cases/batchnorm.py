"""bn_moments on the four stages of the ImageNet supernet (the half of the channels that a branch normalises)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers import batchnorm as peers
from bench.peers.compiled import compiled
from bench.registry import OURS, Bind, Case
from spos_fast import ops

STATISTICS = "batch norm's own statistics"
STAGES = ((32, 56), (80, 28), (160, 14), (320, 7))  # channels, height and width


def cases(device: str) -> list[Case]:
    """Every stage in the dtypes of the device, both layouts, and one case with groups."""
    batch = 128 if device == "cuda" else 32
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    found = []
    for dtype in dtypes:
        for channels, side in STAGES:
            for layout in ("NHWC", "NCHW"):
                headline = layout == "NHWC" and dtype == dtypes[0] and side in (56, 14)
                found.append(_case(device, (batch, channels, side, side), dtype, layout, 1, headline))
    found.append(_case(device, (batch, 80, 28, 28), dtypes[0], "NHWC", 8, False))
    return found


def _case(device: str, shape: tuple[int, ...], dtype: str, layout: str, groups: int, headline: bool) -> Case:
    batch, channels, height, width = shape
    values = batch * channels * height * width

    def inputs(where: torch.device) -> tuple[Tensor, int]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1
        x = x.to(where, getattr(torch, dtype))
        return x.contiguous(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format), groups

    contenders: dict[str, Bind] = {
        OURS: _bind(ops.bn_moments),
        "torch.var_mean": _bind(peers.var_mean),
        "two reads": _bind(peers.two_reads),
        "compile var_mean": lambda given: _bind(compiled(peers.var_mean))(given),
        "compile two reads": lambda given: _bind(compiled(peers.two_reads))(given),
    }
    if groups == 1:
        contenders[STATISTICS] = lambda given: peers.statistics_of_batch_norm(given[0])
    if device == "cuda":
        autotuned = functools.partial(compiled, mode="max-autotune-no-cudagraphs")
        contenders["compile max-autotune"] = lambda given: _bind(autotuned(peers.var_mean))(given)
    return Case(
        op="bn_moments",
        shape="x".join(map(str, shape)) + f" {layout}" + (f" groups={groups}" if groups > 1 else ""),
        dtype=dtype,
        device=device,
        bytes=values * getattr(torch, dtype).itemsize,
        flops=0,  # 3 a value, on vector units: no roof of the matrix rate
        inputs=inputs,
        contenders=contenders,
        convert={STATISTICS: lambda given: peers.moments_from(given, device, values // channels)},
        tests=("tests/ops/test_batchnorm.py", "tests/ops/test_every_op.py"),
        tolerance=1e-4,
        headline=headline,
    )


def _bind(function: Callable[..., Any]) -> Bind:
    return lambda given: lambda: function(*given)
