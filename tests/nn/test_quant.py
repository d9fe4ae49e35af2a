"""Quantized layers and the residual block: the same as their parts, drop-in names, steps, one graph for all bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.peers.resnet import BasicBlock, plain_conv
from spos_fast import recalibrate
from spos_fast.errors import InputError
from spos_fast.nn import QuantAct, QuantBasicBlock, QuantConv2d, initialize_steps, quantize_model

LAST = torch.channels_last


def image(*shape: int) -> Tensor:
    """Behind a ReLU, channels last."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).relu().contiguous(memory_format=LAST)


def by_parts(layer: QuantConv2d, x: Tensor, weight_index: Any, act_index: Any) -> Tensor:
    """What the layer's docstring says, from its quantizers."""
    padding = layer.padding
    y = layer.act(x, act_index)
    if layer.padding_mode != "zeros":
        y, padding = functional.pad(y, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
    weight = layer.quantized_weight(weight_index)
    return functional.conv2d(y, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("weight_quantizer", ["dorefa", "lsq"])
@pytest.mark.parametrize(
    ("act_quantizer", "more"),
    [
        ("pact", {}),
        ("pact_residual", {}),
        ("lsq", {}),
        ("lsq+", {}),
        ("lsq", {"signed_act": True}),
        ("lsq", {"per_channel": True}),
    ],
)
def test_layer_is_its_parts(act_quantizer: str, more: dict[str, Any], weight_quantizer: str) -> None:
    """Forward and gradients of the fused layer are those of quantizers and a plain convolution, for all bits."""
    torch.manual_seed(0)
    quantizers = dict(weight_quantizer=weight_quantizer, act_quantizer=act_quantizer, **more)
    layer = QuantConv2d(8, 12, 3, stride=2, padding=1, weight_bits=(1, 2, 4, 8), act_bits=(2, 4, 8), **quantizers)
    x = (torch.randn(2, 8, 7, 7) + 0.5).contiguous(memory_format=LAST).requires_grad_()
    for weight_index, act_index in ((0, 0), (1, 2), (2, torch.tensor(1)), (torch.tensor(3), 0)):
        made, wanted = layer(x, weight_index, act_index), by_parts(layer, x, weight_index, act_index)
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
        leaves = [x, *layer.parameters()]
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (made, wanted)]
        for got, right in zip(*grads, strict=True):
            assert float((got - right).norm()) <= 1e-4 * float(right.norm()) + 1e-5


def test_other_paddings() -> None:
    """Paddings that the op does not know run as their parts."""
    for padding, mode in ((1, "reflect"), ("same", "zeros"), ("valid", "zeros")):
        layer = QuantConv2d(4, 6, 3, padding=padding, weight_bits=4, act_bits=4)
        if mode != "zeros":
            layer = QuantConv2d.from_float(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
        torch.testing.assert_close(layer(image(2, 4, 6, 6)), by_parts(layer, image(2, 4, 6, 6), 0, 0))


def test_names_are_torchvisions() -> None:
    """A state dict of the plain block loads but for the steps."""
    plain = BasicBlock(8, 16, 2, plain_conv)
    block = QuantBasicBlock(8, 16, 16, 2, weight_bits=(1, 2), act_bits=4, weight_quantizer="lsq")
    loaded = block.load_state_dict(plain.state_dict(), strict=False)
    steps = [f"{name}.{step}" for name in ("conv1", "conv2", "downsample.0") for step in ("weight_step", "act.step")]
    assert not loaded.unexpected_keys and sorted(loaded.missing_keys) == sorted(steps)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_block_with_the_fold_is_its_modules(training: bool, stride: int, affine: bool) -> None:
    """bn1 folded into conv2's load gives the output, gradients and running statistics of the modules one by one; at
    fewer mid channels too, with zero gradients and untouched statistics beyond."""
    torch.manual_seed(1)
    quantizers = dict(weight_bits=(2, 4), act_bits=(2, 4), weight_quantizer="lsq", act_quantizer="lsq")
    blocks = [QuantBasicBlock(8, 8, 12, stride, affine=affine, **quantizers) for _ in range(2)]
    for number, block in enumerate(blocks):
        block.load_state_dict(blocks[0].state_dict())
        block.to(memory_format=LAST).train(training)  # type: ignore[call-overload]
        block.bn1.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
        if number == 1:  # who looks at the layer keeps the modules
            block.bn1.register_forward_hook(lambda *_: None)
    for setting in (None, (12, 1, 1), (7, 0, 1)):
        outputs = []
        for block in blocks:
            x = image(4, 8, 9, 9).requires_grad_()
            block.zero_grad()
            out = block(x, setting)
            out.square().mean().backward()
            outputs.append([out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
        for got, wanted in zip(*outputs, strict=True):
            assert (got - wanted).double().norm() <= 1e-4 * wanted.double().norm() + 1e-7
        if setting is not None and setting[0] == 7:
            assert not blocks[0].conv1.weight.grad[7:].any() and not blocks[0].conv2.weight.grad[:, 7:].any()


def test_only_the_chosen_step_has_a_gradient() -> None:
    """The other entries' is exactly zero."""
    block = QuantBasicBlock(4, 4, 4, weight_bits=(1, 2, 4), act_bits=(2, 3, 4), weight_quantizer="lsq")
    block(image(2, 4, 6, 6) * 4, (4, 2, 1)).square().sum().backward()
    for layer in (block.conv1, block.conv2):
        assert layer.act.step.grad[1] and not layer.act.step.grad[[0, 2]].any()
        assert layer.weight_step.grad[2] and not layer.weight_step.grad[:2].any()


def test_recalibrating_a_block() -> None:
    """Statistics are seen in the folded block as in its modules, and do not move the layer twice."""
    torch.manual_seed(2)
    folded, modules = (QuantBasicBlock(6, 6, 9, weight_bits=4, act_bits=4) for _ in range(2))
    modules.load_state_dict(folded.state_dict())
    modules.bn1.register_forward_hook(lambda *_: None)
    batches = [image(4, 6, 8, 8), image(3, 6, 8, 8) * 2]
    for block in (folded, modules):
        recalibrate(block, batches, mode="pooled")
    torch.testing.assert_close(folded.state_dict(), modules.state_dict(), rtol=1e-4, atol=1e-5)


def test_extracted_slice_is_the_slice() -> None:
    """A layer of the slice's weights gives the slice's output: weights are quantized as they are used."""
    for quantizers in ({}, {"weight_quantizer": "lsq", "per_channel": True}, {"act_quantizer": "lsq+"}):
        layer = QuantConv2d(8, 10, 3, padding=1, weight_bits=(1, 3), act_bits=(2, 4), **quantizers)
        x = image(2, 5, 6, 6)
        for bits in ((0, 1), (1, 0)):
            small = layer.extract(5, 7)
            torch.testing.assert_close(small(x, *bits), layer(x, *bits, out_channels=7, in_channels=5))


def test_packed_layer() -> None:
    """Weights packed once give the layer's bits."""
    layer = QuantConv2d(8, 10, 3, padding=1, weight_bits=(2, 4), act_bits=(2, 4), weight_quantizer="lsq")
    packed = layer.packed(1, in_channels=6, out_channels=7)
    for index in (0, 1):
        assert torch.equal(packed(image(2, 6, 5, 5), index), layer(image(2, 6, 5, 5), 1, index, out_channels=7))
    with pytest.raises(InputError, match="packed"):
        QuantConv2d(8, 10, 3, act_quantizer="lsq+").packed()


@pytest.mark.parametrize("stride", [1, 2])
def test_packed_block(stride: int) -> None:
    """Weights packed once, normalisation folded on both sides: the block's output on running statistics."""
    torch.manual_seed(5)
    block = QuantBasicBlock(8, 8, 12, stride, weight_bits=(2, 4), act_bits=(2, 4), weight_quantizer="lsq")
    for _ in range(3):
        block(torch.randn(4, 8, 9, 9).relu())
    block.eval()
    for setting in (None, (12, 1, 1), (7, 0, 1)):
        packed, x = block.packed(setting), image(3, 8, 9, 9)
        for _ in range(2):
            wanted = block(x, setting).detach()
            torch.testing.assert_close(packed(x), wanted, rtol=1e-4, atol=1e-4)


def test_model_in_place() -> None:
    """All convolutions but the first are replaced, share their parameters, and the model still trains."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()))
    weight = model[2][0].weight
    assert quantize_model(model, weight_bits=2, act_bits=(2, 4), act_quantizer="lsq") is model
    assert type(model[0]) is nn.Conv2d and isinstance(model[2][0], QuantConv2d) and model[2][0].weight is weight
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    with pytest.raises(InputError, match=r"skip: nothing"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3)), skip=["nothing"])
    with pytest.raises(InputError, match="model"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_a_shared_convolution_stays_shared() -> None:
    """One convolution in two places, or in a block that is, becomes one quantized one in all of them; skipped under one
    of its names it stays in all.
    """

    def model() -> nn.Sequential:
        head, block = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        return nn.Sequential(head, block, block, nn.Sequential(block[0]))

    quantized = quantize_model(model(), weight_quantizer="lsq")
    places = [quantized[1][0], quantized[2][0], quantized[3][0]]
    assert isinstance(places[0], QuantConv2d) and places[0] is places[1] is places[2]
    assert len(list(quantized.parameters())) == 2 + 4  # the plain one's, and weight, bias and two steps
    for name in ("1.0", "2.0", "3.0"):
        with pytest.raises(InputError, match=r"no torch\.nn\.Conv2d to replace"):
            quantize_model(model(), skip=["0", name])
        kept = quantize_model(model(), skip=lambda each, _, name=name: each == name)
        assert isinstance(kept[0], QuantConv2d) and type(kept[1][0]) is type(kept[3][0]) is nn.Conv2d


def test_first_steps() -> None:
    """Steps start at LSQ's rule for a rectified normal input, and from data for what each quantizer sees."""
    rectified = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu().mean()
    for quantizer in ("lsq", "pact"):
        act = QuantAct((1, 2, 4), quantizer=quantizer)
        of_one = torch.tensor([1.0, 3.0, 15.0]) if quantizer == "pact" else torch.ones(3)
        wanted = 2 * rectified / torch.tensor([1.0, 3.0, 15.0]).sqrt() * of_one
        torch.testing.assert_close(act.step.detach(), wanted, rtol=0.02, atol=0)
    block = QuantBasicBlock(4, 4, 4, weight_bits=2, act_bits=3, weight_quantizer="lsq", act_quantizer="lsq")
    x = image(8, 4, 6, 6) * 3
    initialize_steps(block, x)
    assert block.conv1.act.step.item() == pytest.approx(2 * x.mean().item() / 7**0.5, rel=1e-5)
    assert block.conv2.weight_step.item() == pytest.approx(2 * block.conv2.weight.abs().mean().item(), rel=1e-5)
    with torch.no_grad():
        seen = block.train().bn1(block.conv1(x)).relu().mean()
    assert block.conv2.act.step.item() == pytest.approx(2 * seen.item() / 7**0.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["tensors", "ints"])
@pytest.mark.parametrize("name", ["layer", "block"])
def test_compiled_draws_of_bits(name: str, kind: str) -> None:
    """100 random draws of bits run in at most two graphs, and give eager's bits: as tensors, or as ints with
    ``dynamic=True``."""
    from torch._dynamo.testing import CompileCounter

    quantizers = dict(weight_bits=(1, 2, 3, 4), act_bits=(2, 4))
    layer, block = QuantConv2d(4, 6, 3, padding=1, **quantizers), QuantBasicBlock(4, 4, 6, **quantizers).eval()
    model, given = (layer, lambda *bits: bits) if name == "layer" else (block, lambda *bits: ((6, *bits),))
    counter, x, eager = CompileCounter(), image(2, 4, 6, 6), copy.deepcopy(model)
    if name == "block":  # as its modules, which is what a compiler sees
        eager.bn1.register_forward_hook(lambda *_: None)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True if kind == "ints" else None)
    draws = torch.randint(0, 1000, (100, 2), generator=torch.Generator().manual_seed(0)) % torch.tensor([4, 2])
    for draw in draws:
        bits = given(*(draw.tolist() if kind == "ints" else draw))
        assert torch.equal(compiled(x, *bits), eager(x, *bits))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("training", [True, False])
def test_no_images(training: bool) -> None:
    """An empty batch passes layers and block as torch.nn's: an empty image, gradients of zero, statistics that stay."""
    quantizers = dict(weight_bits=(2, 4), act_bits=(2, 4), weight_quantizer="lsq")
    models: list[tuple[nn.Module, tuple[int, ...]]] = [
        (QuantBasicBlock(4, 6, 5, 2, **quantizers), (0, 6, 3, 3)),
        (QuantBasicBlock(4, 4, 4, **quantizers), (0, 4, 6, 6)),
        (QuantConv2d(4, 8, 3, act_quantizer="lsq+", **quantizers), (0, 8, 4, 4)),
        (QuantConv2d(4, 4, 3, padding="same", groups=4, **quantizers), (0, 4, 6, 6)),
    ]
    for model, shape in models:
        before = {name: value.clone() for name, value in model.named_buffers() if name.endswith(("mean", "var"))}
        out = model.train(training)(image(0, 4, 6, 6))
        assert out.shape == shape
        out.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name
        for name, value in before.items():
            assert torch.equal(value, model.get_buffer(name)), name
    with pytest.raises(InputError, match="x must hold at least one value"):
        QuantConv2d(4, 4, 3).packed()(image(0, 4, 6, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight_bits=9), "weight_bits must be from 1 to 8"),
        (dict(act_bits=()), "act_bits must be from 1 to 8"),
        (dict(act_bits=(4, 2)), "act_bits must be ascending"),
        (dict(weight_quantizer="pact"), "weight_quantizer must be one of dorefa, lsq"),
        (dict(act_quantizer="dorefa"), "act_quantizer must be one of"),
        (dict(signed_act=True), "signed"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    """One line that names the argument."""
    with pytest.raises(InputError, match=message):
        QuantConv2d(4, 4, 3, **arguments)
