"""The end of a residual block, bn_add_relu, on the first and third stage of a ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases.blocks import in_both_layouts
from bench.peers import blocks as peers
from bench.registry import Bind, Case
from spos_fast import ops

STAGES = ((64, 56), (256, 14))  # channels, height and width
LAST = torch.channels_last
Inputs = tuple[Tensor, ...]


def cases(device: str) -> list[Case]:
    """Forwards with both kinds of shortcut; forwards and backwards with the identity."""
    dtype, batch = ("bfloat16", 128) if device == "cuda" else ("float32", 32)
    return [
        _case(device, dtype, (batch, channels, side, side), shortcut, training)
        for shortcut, training in (("identity", False), ("projected", False), ("identity", True))
        for channels, side in STAGES
    ]


def _ours(x: Tensor, residual: Tensor, *vectors: Tensor) -> Tensor:
    scale, shift, *beside = (vector[None] for vector in vectors)
    return ops.bn_add_relu(x, scale, shift, residual, *beside)


def _case(device: str, dtype: str, shape: tuple[int, int, int, int], shortcut: str, training: bool) -> Case:
    kind, values = getattr(torch, dtype), int(torch.Size(shape).numel())

    def inputs(where: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        vectors = 4 if shortcut == "projected" else 2
        return (
            *(torch.randn(shape, generator=generator).to(where, kind).contiguous(memory_format=LAST) for _ in range(3)),
            *(torch.randn(shape[1], generator=generator).to(where) for _ in range(vectors)),
        )

    def bind(function: Callable[..., Tensor], layout: torch.memory_format = LAST) -> Bind:
        def bound(given: Inputs) -> Callable[[], Any]:
            laid_out = (v.contiguous(memory_format=layout) if v.dim() == 4 else v for v in given)
            grad, *leaves = (v.detach().requires_grad_(training) for v in laid_out)

            def run() -> Any:
                with torch.set_grad_enabled(training):
                    out = function(*leaves)
                return (out.detach(), *torch.autograd.grad(out, leaves, grad)) if training else out

            return run

        return bound

    return Case(
        op="bn_add_relu" + (" forward+backward" if training else ""),
        shape="x".join(map(str, shape)) + f" {shortcut}",
        dtype=dtype,
        device=device,
        # Forwards read two images and write one; backwards read the gradient, x and what the ReLU clipped, write two.
        bytes=(8 if training else 3) * values * kind.itemsize,
        flops=0,  # a few a value, on vector units
        inputs=inputs,
        contenders=in_both_layouts(_ours, peers.bn_add_relu, bind),
        tests=("tests/ops/test_bn_add_relu.py", "tests/ops/test_every_op.py"),
        tolerance=1e-4 if dtype == "float32" else 3e-2,
    )
