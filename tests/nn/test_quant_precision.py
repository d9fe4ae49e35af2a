"""Quantized layers in half and double precision: steps keep theirs, and the layers run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spos_fast.nn import QuantAct, QuantBasicBlock, QuantConv2d
from spos_fast.nn.steps import step_vectors

HALVES = [torch.bfloat16, torch.float16]


def with_gradients(model: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
    """The output; parameters get gradients."""
    out: Tensor = model(x, *arguments)
    out.float().square().mean().backward()
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("act_quantizer", ["pact", "lsq", "lsq+"])
def test_steps_keep_their_values_in_half(act_quantizer: str, per_channel: bool, dtype: torch.dtype) -> None:
    """Weights become half, steps, offsets and their gradients stay bitwise what they are in float32, there and back;
    the forward gives the dtype of its input and moves the steps.
    """
    torch.manual_seed(0)
    quantizers = dict(weight_quantizer="lsq", act_quantizer=act_quantizer, per_channel=per_channel)
    layer = QuantConv2d(8, 12, 3, padding=1, weight_bits=(2, 3, 4), act_bits=(2, 3, 4), **quantizers)
    x = 4 * torch.rand(2, 8, 7, 7)
    wanted = with_gradients(layer, x, 1, 2)
    before = {name: (vector.detach().clone(), vector.grad.clone()) for name, vector, _ in step_vectors(layer)}
    layer.to(dtype)
    assert layer.weight.dtype == layer.weight.grad.dtype == layer.bias.dtype == dtype
    for name, vector, _ in step_vectors(layer):
        assert vector.dtype == torch.float32
        assert torch.equal(vector, before[name][0]) and torch.equal(vector.grad, before[name][1]), name
    layer.zero_grad()
    made = with_gradients(layer, x.to(dtype), 1, 2)
    assert made.dtype == dtype and (made.float() - wanted).norm() < 0.15 * wanted.norm()
    assert all(vector.grad.dtype == torch.float32 and vector.grad.any() for _, vector, _ in step_vectors(layer))
    layer.float()
    assert all(torch.equal(vector, before[name][0]) for name, vector, _ in step_vectors(layer))


def test_double_and_devices() -> None:
    """Steps go to float64 with their layer, from there to half by way of float32, and to other devices."""
    layer = QuantConv2d(4, 4, 3, weight_quantizer="lsq").double()
    assert layer.act.step.dtype == layer.weight_step.dtype == torch.float64
    assert layer(torch.rand(1, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64
    layer.half()
    assert layer.act.step.dtype == layer.weight_step.dtype == torch.float32
    layer.to("meta", torch.bfloat16)
    assert layer.act.step.device == layer.weight_step.device == layer.weight.device == torch.device("meta")
    assert layer.weight.dtype == torch.bfloat16 and layer.weight_step.dtype == torch.float32
    assert QuantAct((2, 4), quantizer="lsq+", channels=3).half().offset.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("training", [True, False])
def test_block_in_half(training: bool, dtype: torch.dtype) -> None:
    """The block runs with its norm folded into the second convolution, and its packed form too, near float32's
    result."""
    torch.manual_seed(0)
    quantizers = dict(weight_quantizer="lsq", act_quantizer="lsq")
    block = QuantBasicBlock(8, 16, 16, 2, weight_bits=(2, 4), act_bits=(2, 4), **quantizers).train(training)
    x = 4 * torch.rand(4, 8, 9, 9)
    wanted = block(x, (12, 1, 1)).detach()
    block.to(dtype)
    made = with_gradients(block, x.to(dtype), (12, 1, 1))
    assert made.dtype == dtype and (made.float() - wanted).norm() < 0.15 * wanted.norm()
    assert all(vector.dtype == torch.float32 and vector.grad.any() for _, vector, _ in step_vectors(block))
    block.eval()
    packed = block.packed((12, 1, 1))(x.to(dtype))
    assert packed.dtype == dtype and (packed - block(x.to(dtype), (12, 1, 1))).norm() < 0.05 * packed.norm()
