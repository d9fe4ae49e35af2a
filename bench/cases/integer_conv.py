"""A convolution in scoring, quantization and batch statistics included, on the stages of ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from bench.peers import quantization as peers
from bench.peers.compiled import compiled
from bench.registry import OURS, Bind, Case
from spos_fast import ops

BITS, STEP, WEIGHT_STEP = 4, 0.25, 0.125
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, height and width
LAST = torch.channels_last
Inputs = tuple[Tensor, Tensor]
Run = Callable[[Tensor], tuple[Tensor, ...]]


def cases(device: str) -> list[Case]:
    """All stages, on the CPU: packed weights are for CPUs."""
    return [_case(*stage) for stage in STAGES] if device == "cpu" else []


def _ours(weight: Tensor) -> Run:
    settings: Any = dict(act_step=torch.tensor([STEP]), weight_step=torch.tensor([WEIGHT_STEP]), padding=1)
    settings |= dict(act_bits=BITS, weight_bits=BITS, act_mode="lsq", weight_mode="lsq", weight_index=0, stride=1)
    settings |= dict(per_channel=False, dilation=1, groups=1, in_channels=None, out_channels=None)
    packed = ops.PackedConv2d(weight, None, **settings)
    return lambda x: cast(ops.BNStats, packed(x, statistics=True))


def _in_floats(weight: Tensor) -> Run:
    """What full precision takes, on values that codes stand for."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return peers.with_moments(functional.conv2d(x, weight, padding=1))

    return run


def _case(channels: int, side: int) -> Case:
    batch = 32
    values = batch * channels * side * side

    def inputs(where: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x = STEP * torch.randint(0, 2**BITS, (batch, channels, side, side), generator=generator)
        weight = torch.randint(-(2 ** (BITS - 1)), 2 ** (BITS - 1), (channels, channels, 3, 3), generator=generator)
        return x.to(where).contiguous(memory_format=LAST), (WEIGHT_STEP * weight).to(where).contiguous(
            memory_format=LAST
        )

    def bind(make: Callable[[Tensor], Run], wrap: Callable[[Run], Run] = lambda run: run) -> Bind:
        def bound(given: Inputs) -> Callable[[], Any]:
            x, weight = given
            run = wrap(make(weight))

            def measured() -> Any:
                with torch.no_grad():
                    return run(x)

            return measured

        return bound

    def onednn(weight: Tensor) -> Run:
        return peers.OneDnnConvolution(weight, STEP, WEIGHT_STEP, BITS, (batch, channels, side, side))

    return Case(
        op="convolution on codes, with moments",
        shape=f"{batch}x{channels}x{side}x{side} {BITS} bits",
        dtype="float32",
        device="cpu",
        bytes=2 * 4 * values,
        flops=0,  # of integers, for which the machine's rate is not measured
        inputs=inputs,
        contenders={
            OURS: bind(_ours),
            "oneDNN on codes": bind(onednn),
            "compile oneDNN on codes": bind(onednn, compiled),
            "full precision": bind(_in_floats),
        },
        tests=("tests/ops/test_quant_conv2d.py", "tests/ops/test_every_op.py"),
        items=batch,
        unit="images",
        note="images and weights are multiples of their steps, so that full precision computes the same",
    )
