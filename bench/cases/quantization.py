"""Fake quantization of an activation and of weights, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.peers import quantization as peers
from bench.peers.compiled import compiled
from bench.registry import OURS, Bind, Case
from spos_fast import ops

BITS = 4
Quantizer = Callable[[Tensor, Tensor, int], Tensor]

# Values that lie within a rounding error of a tie go to either level. It takes one among millions to differ by this.
ONE_LEVEL = 2e-3
ATEN = "aten passes gradients up to half a step outside, so that gradients differ"


def cases(device: str) -> list[Case]:
    """One large activation, and the weights of a ResNet's last block."""
    batch = 128 if device == "cuda" else 32
    activation, weights = (batch, 64, 56, 56), (512, 512, 3, 3)
    return [
        _case(
            device,
            "fake_quant PACT",
            activation,
            {OURS: lambda x, step, bits: ops.fake_quant(x, step, bits, mode="pact"), "composed": peers.pact},
        ),
        _case(device, "fake_quant LSQ", activation, {OURS: ops.fake_quant, "composed": _lsq}),
        _case(
            device, "fake_quant learned step", activation, {OURS: ops.fake_quant, "aten": peers.aten_learnable}, ATEN
        ),
        _case(
            device,
            "fake_quant fixed step",
            activation,
            {
                OURS: lambda x, step, bits: ops.fake_quant(x, step.detach(), bits),
                "composed": lambda x, step, bits: _lsq(x, step.detach(), bits),
                "aten cachemask": peers.aten_cachemask,
            },
            ATEN,
        ),
        _case(
            device,
            "quantize_weights DoReFa",
            weights,
            {
                OURS: lambda x, step, bits: ops.quantize_weights(x, bits),
                "composed": lambda x, step, bits: peers.dorefa_weights(x, bits),
            },
        ),
        _case(
            device,
            "quantize_weights LSQ",
            weights,
            {
                OURS: lambda x, step, bits: ops.quantize_weights(x, bits, mode="lsq", step=step),
                "composed": lambda x, step, bits: peers.lsq(x, step, bits, signed=True),
            },
        ),
    ]


def _lsq(x: Tensor, step: Tensor, bits: int) -> Tensor:
    return peers.lsq(x, step, bits, signed=False)


def _case(
    device: str, op: str, shape: tuple[int, ...], functions: Mapping[str, Quantizer], incomparable: str = ""
) -> Case:
    values = int(torch.Size(shape).numel())

    def inputs(where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(shape, generator=generator).to(where) for _ in range(2))
        step = torch.full((1,), 2.0 if "PACT" in op else 0.25, device=where)
        return x.requires_grad_(), step.requires_grad_(), grad

    contenders: dict[str, Bind] = {name: _bind(function) for name, function in functions.items()}
    if "composed" in functions:
        contenders["compile composed"] = lambda given: _bind(compiled(functions["composed"]))(given)
    weights = op.startswith("quantize_weights")
    return Case(
        op=op,
        shape="x".join(map(str, shape)) + f" {BITS} bits",
        dtype="float32",
        device=device,
        bytes=5 * values * 4,  # forwards read and write; backwards read x and the gradient and write one
        flops=0,
        inputs=inputs,
        contenders=contenders,
        tests=(f"tests/ops/test_{'quantize_weights' if weights else 'fake_quant'}.py", "tests/ops/test_every_op.py"),
        tolerance=None if incomparable else ONE_LEVEL,
        note=incomparable,
    )


def _bind(function: Quantizer) -> Bind:
    def bind(given: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
        x, step, grad = given

        def run() -> Any:
            out = function(x, step, BITS)
            return out.detach(), *torch.autograd.grad(out, [x, step], grad, allow_unused=True)

        return run

    return bind
