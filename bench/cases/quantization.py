"""Fake quantization of an activation and of weights, forwards and backwards. So far what our ops will have to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers import quantization as peers
from bench.peers.compiled import compiled
from bench.registry import Bind, Case

BITS = 4


def cases(device: str) -> list[Case]:
    """One large activation, and the weights of a ResNet's last block."""
    batch = 128 if device == "cuda" else 32
    activation, weights = (batch, 64, 56, 56), (512, 512, 3, 3)
    found = []
    for name, functions in (
        ("PACT", {"composed": peers.pact}),
        (
            "LSQ",
            {
                "composed": lambda x, step, bits: peers.lsq(x, step, bits, signed=False),
                "aten learnable": peers.aten_learnable,
            },
        ),
        (
            "fixed step",
            {
                "composed": lambda x, step, bits: peers.lsq(x, step.detach(), bits, signed=False),
                "aten cachemask": peers.aten_cachemask,
            },
        ),
    ):
        found.append(_case(device, f"fake_quant {name}", activation, functions))
    found.append(
        _case(
            device,
            "quantize_weights DoReFa",
            weights,
            {"composed": lambda x, step, bits: peers.dorefa_weights(x, bits)},
        )
    )
    return found


def _case(device: str, op: str, shape: tuple[int, ...], functions: dict[str, Callable[..., Tensor]]) -> Case:
    values = int(torch.Size(shape).numel())

    def inputs(where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(shape, generator=generator).to(where) for _ in range(2))
        step = torch.full((1,), 2.0 if "PACT" in op else 0.25, device=where)
        return x.requires_grad_(), step.requires_grad_(), grad

    contenders: dict[str, Bind] = {name: _bind(function) for name, function in functions.items()}
    contenders["compile composed"] = lambda given: _bind(compiled(functions["composed"]))(given)
    return Case(
        op=op,
        shape="x".join(map(str, shape)) + f" {BITS} bits",
        dtype="float32",
        device=device,
        bytes=5 * values * 4,  # forwards read and write; backwards read x and the gradient and write one
        flops=0,
        inputs=inputs,
        contenders=contenders,
        tolerance=None,
        note="no kernel of ours yet",
    )


def _bind(function: Callable[..., Tensor]) -> Bind:
    def bind(given: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
        x, step, grad = given

        def run() -> Any:
            out = function(x, step, BITS)
            return out.detach(), *torch.autograd.grad(out, [x, step], grad, allow_unused=True)

        return run

    return bind
