"""The building blocks of the fused units, on the middle two stages of the ImageNet supernet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers import blocks as peers
from bench.peers.compiled import compiled
from bench.registry import OURS, Bind, Case
from spos_fast import ops

STAGES = ((80, 28), (160, 14))  # channels of a branch, height and width
KERNEL = 5
Inputs = tuple[Tensor, ...]


def cases(device: str) -> list[Case]:
    """Three blocks on two stages."""
    dtype, batch = ("bfloat16", 128) if device == "cuda" else ("float32", 32)
    return [
        _case(device, dtype, (batch, channels, side, side), op)
        for op in ("pw_bnstats", "dw_bnstats", "bn_act_cat")
        for channels, side in STAGES
    ]


def in_both_layouts(ours: Callable[..., Any], peer: Callable[..., Any], bind: Callable[..., Bind]) -> dict[str, Bind]:
    """The contenders of a block: ours, and one peer, eager and compiled, in NCHW and channels_last.

    Args:
        ours, peer: functions of the block's tensors.
        bind: makes a contender of a function, given a layout, or else in channels_last.
    """
    nchw = torch.contiguous_format
    return {
        OURS: bind(ours),
        "eager NCHW": bind(peer, nchw),
        "eager channels_last": bind(peer),
        "compile NCHW": lambda given: bind(compiled(peer), nchw)(given),
        "compile channels_last": lambda given: bind(compiled(peer))(given),
    }


def _ours(op: str) -> Callable[..., Any]:
    if op == "bn_act_cat":
        return lambda z, scale, shift, other: ops.bn_act_cat(z, scale, shift, other)
    return lambda x, weight, scale, shift: tuple(getattr(ops, op)(x, weight, scale, shift, relu=True))


def _case(device: str, dtype: str, shape: tuple[int, int, int, int], op: str) -> Case:
    batch, channels, height, width = shape
    kind, pixels = getattr(torch, dtype), batch * height * width
    weight_shape = (channels, channels, 1, 1) if op == "pw_bnstats" else (channels, 1, KERNEL, KERNEL)

    def inputs(where: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(where)

        x = normal(*shape).to(kind).contiguous(memory_format=torch.channels_last)
        vectors = (normal(channels), normal(channels))
        if op == "bn_act_cat":
            other = normal(batch, 2 * channels, height, width).to(kind)
            return x, *vectors, other.contiguous(memory_format=torch.channels_last)
        return x, (normal(*weight_shape) / weight_shape[1] ** 0.5).to(kind), *vectors

    def bind(function: Callable[..., Any], layout: torch.memory_format | None = None) -> Bind:
        def bound(given: Inputs) -> Callable[[], Any]:
            if layout is not None:
                given = tuple(v.contiguous(memory_format=layout) if v.dim() == 4 else v for v in given)

            def run() -> Any:
                with torch.no_grad():
                    return function(*given)

            return run

        return bound

    values = pixels * channels
    work = {"pw_bnstats": values * channels, "dw_bnstats": values * KERNEL**2, "bn_act_cat": 0}[op]
    moved = {"pw_bnstats": 2, "dw_bnstats": 2, "bn_act_cat": 5}[op]
    return Case(
        op=op,
        shape="x".join(map(str, shape)) + (f" k{KERNEL}" if op == "dw_bnstats" else ""),
        dtype=dtype,
        device=device,
        bytes=moved * values * kind.itemsize,
        flops=2 * work,
        inputs=inputs,
        contenders=in_both_layouts(_ours(op), getattr(peers, op), bind),
        tests=("tests/ops/test_blocks.py", "tests/ops/test_every_op.py"),
        tolerance=1e-4 if dtype == "float32" else 3e-2,
    )
