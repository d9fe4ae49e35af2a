"""A quantized residual block in training, forwards and backwards, on the first and the third stage of ResNet-18."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.compiled import compiled
from bench.peers.resnet import BasicBlock, ComposedConv
from bench.registry import OURS, Bind, Case
from spos_fast.nn import QuantBasicBlock

BITS = 4
STAGES = ((64, 56), (256, 14))  # channels, height and width
QUANTIZERS = {"PACT, DoReFa": ("pact", "dorefa"), "LSQ": ("lsq", "lsq")}
Inputs = tuple[Tensor, Tensor]


def cases(device: str) -> list[Case]:
    """Both stages with both quantizers."""
    batch = 64 if device == "cuda" else 8
    return [_case(device, batch, *stage, name) for stage in STAGES for name in QUANTIZERS]


def _case(device: str, batch: int, channels: int, side: int, name: str) -> Case:
    act, weight = QUANTIZERS[name]
    values = batch * channels * side * side

    def inputs(where: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(batch, channels, side, side, generator=generator).to(where) for _ in range(2))
        last = torch.channels_last
        return x.contiguous(memory_format=last).requires_grad_(), grad.contiguous(memory_format=last)

    def ours() -> nn.Module:
        quantizers: Any = dict(weight_bits=BITS, act_bits=BITS, act_quantizer=act, weight_quantizer=weight)
        return QuantBasicBlock(channels, channels, channels, **quantizers)

    def composed() -> nn.Module:
        return BasicBlock(channels, channels, 1, functools.partial(ComposedConv, quantizer=act))

    def bind(make: Callable[[], nn.Module], wrap: Callable[[Any], Any] = lambda block: block) -> Bind:
        def bound(given: Inputs) -> Callable[[], Any]:
            x, grad = given
            torch.manual_seed(1)
            block = make().to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            with torch.no_grad():
                for number, layer in enumerate((block.conv1, block.conv2)):
                    generator = torch.Generator().manual_seed(number)
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / (3 * channels**0.5))
                    (layer.act_step if isinstance(layer, ComposedConv) else layer.act.step).fill_(
                        2.03 if act == "pact" else 0.203
                    )
                    if weight == "lsq":
                        layer.weight_step.fill_(0.0151)
            run, leaves = wrap(block), [x, block.conv1.weight, block.conv2.weight]

            def step() -> Any:
                out = run(x)
                return out.detach(), *torch.autograd.grad(out, leaves, grad)

            return step

        return bound

    return Case(
        op="quantized residual block",
        shape=f"{batch}x{channels}x{side}x{side} {BITS} bits {name}",
        dtype="float32",
        device=device,
        bytes=(3 * 4 + 2 * 1 + 2 * 4) * values,  # x, both convolutions' outputs, codes; both gradients
        flops=3 * 2 * 2 * 9 * values * channels,
        inputs=inputs,
        contenders={
            OURS: bind(ours),
            "composed": bind(composed),
            "compile composed": bind(composed, compiled),
        },
        tests=("tests/ops/test_quant_conv2d.py", "tests/ops/test_every_op.py", "tests/nn/test_quant.py"),
        tolerance=2e-2,
        items=batch,
        unit="images",
        note="values near a tie may be rounded either way; x is not clipped, as gradients at 0 differ",
    )
