"""SlicedConv2d and SlicedBatchNorm2d stand in for torch.nn's, and their slices for layers of that width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spos_fast.errors import InputError
from spos_fast.nn import SlicedBatchNorm2d, SlicedConv2d

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAST = torch.channels_last

# Settings, and a width to use: channels in and out, of 6 and 8 (depthwise: of 8).
CONVOLUTIONS: list[tuple[dict[str, Any], int, int]] = [
    ({"kernel_size": 3, "padding": 1}, 4, 5),
    ({"kernel_size": (3, 5), "stride": 2, "bias": False}, 2, 8),
    ({"kernel_size": 4, "padding": "same"}, 6, 3),
    ({"kernel_size": 3, "padding": "valid", "dilation": 2}, 5, 5),
    ({"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}, 3, 4),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, 3, 4),
    ({"kernel_size": 5, "padding": 2, "groups": 8, "padding_mode": "replicate"}, 3, 3),
    ({"kernel_size": 3, "padding": 1, "stride": 2, "groups": 8, "bias": False}, 8, 8),
]


def convolution(options: dict[str, Any]) -> SlicedConv2d:
    """The widest layer of these settings."""
    torch.manual_seed(0)
    return SlicedConv2d(8 if "groups" in options else 6, 8, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # nn.Conv2d's
@pytest.mark.parametrize(("options", "narrow", "made"), CONVOLUTIONS, ids=str)
def test_convolution(options: dict[str, Any], narrow: int, made: int) -> None:
    """In full it is nn.Conv2d with the same state dict; a slice is the plain layer that extract() gives."""
    sliced = convolution(options)
    plain = nn.Conv2d(sliced.in_channels, 8, **options)
    plain.load_state_dict(sliced.state_dict())
    x = torch.randn(2, sliced.in_channels, 9, 8).contiguous(memory_format=LAST)
    torch.testing.assert_close(sliced(x), plain(x))

    small = sliced.extract(narrow, made)
    assert type(small) is nn.Conv2d
    assert small.weight.shape[0] == made and small.weight.data_ptr() != sliced.weight.data_ptr()
    part = x[:, :narrow].contiguous(memory_format=LAST)
    torch.testing.assert_close(sliced(part, made), small(part))
    torch.testing.assert_close(sliced(x, made, in_channels=narrow), small(part))
    sliced(part, made).sum().backward()
    small(part).sum().backward()
    assert sliced.weight.grad is not None and small.weight.grad is not None
    inside = sliced.weight.grad[:made, : small.weight.shape[1]]
    torch.testing.assert_close(inside, small.weight.grad)
    assert sliced.weight.grad.count_nonzero() == inside.count_nonzero()


def test_convolution_with_a_number_on_the_device() -> None:
    """Absent channels come out as zeros, the others as in the slice."""
    sliced = convolution({"kernel_size": 3, "padding": 1})
    x = torch.randn(2, 6, 5, 5)
    got = sliced(x, torch.tensor(5, dtype=torch.int32), in_channels=torch.tensor(4, dtype=torch.int32))
    torch.testing.assert_close(got[:, :5], sliced(x[:, :4], 5))
    assert not got[:, 5:].any()


def test_convolutions_that_cannot_be_sliced() -> None:
    """Grouped convolutions run and extract in full, and say why they do not slice."""
    sliced = SlicedConv2d(6, 8, 3, groups=2)
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(sliced(x), sliced.extract()(x))
    for call in (lambda: sliced(x, 4), lambda: sliced(x[:, :3]), lambda: sliced.extract(3, 4)):
        with pytest.raises(InputError, match="groups: got 2"):
            call()
    with pytest.raises(InputError, match="as many channels out as in"):
        convolution({"kernel_size": 3, "groups": 8}).extract(3, 4)
    for number in (0, 9):
        with pytest.raises(InputError, match=f"out_channels must be from 1 to 8, what is stored, got {number}"):
            convolution({"kernel_size": 3}).extract(3, number)


NORMS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
]


@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("width", [3, 6])
def test_batch_norm(options: dict[str, Any], width: int) -> None:
    """At any width it is nn.BatchNorm2d of that width: outputs in training and evaluation, gradients, the state that is
    left. What lies beyond stays as it was."""
    torch.manual_seed(0)
    sliced = SlicedBatchNorm2d(6, **options)
    if sliced.affine:
        nn.init.uniform_(sliced.weight, 0.5, 1.5)
        nn.init.normal_(sliced.bias)
    nn.BatchNorm2d(6, **options).load_state_dict(sliced.state_dict())
    before = {name: value.clone() for name, value in sliced.state_dict().items()}
    small = sliced.extract(width)
    assert type(small) is nn.BatchNorm2d
    batches = [torch.randn(4, width, 5, 3) * 2 + 1 for _ in range(3)]
    for x in batches:
        torch.testing.assert_close(sliced(x), small(x))
    inputs = [batches[0].clone().requires_grad_() for _ in range(2)]
    for layer, x in zip((sliced, small), inputs, strict=True):
        layer(x).pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, value in sliced.state_dict(keep_vars=True).items():
        mine, theirs = value.detach(), small.state_dict()[name]
        torch.testing.assert_close(mine[:width] if mine.dim() else mine, theirs)
        if mine.dim():
            assert torch.equal(mine[width:], before[name][width:])
        if value.grad is not None:
            torch.testing.assert_close(value.grad[:width], dict(small.named_parameters())[name].grad)
            assert not value.grad[width:].any()
    torch.testing.assert_close(sliced.eval()(batches[1]), small.eval()(batches[1]))
    assert sliced.extract(width).training is False


def test_batch_norm_with_a_number_on_the_device() -> None:
    """Absent channels come out as zeros and leave their running statistics alone."""
    norm, reference = SlicedBatchNorm2d(6), SlicedBatchNorm2d(6)
    x = torch.randn(3, 6, 4, 4)
    got = norm(x, channels=torch.tensor(4, dtype=torch.int32))
    torch.testing.assert_close(got[:, :4], reference(x[:, :4]))
    assert not got[:, 4:].any()
    for mine, theirs in zip(norm.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_batch_norm_errors() -> None:
    """More channels than are stored are refused, as are images that are none."""
    norm = SlicedBatchNorm2d(4)
    with pytest.raises(InputError, match="x must have 1 to 4 channels"):
        norm(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.zeros(2, 4))
    with pytest.raises(InputError, match="channels must be from 1 to 4, what is stored, got 5"):
        norm.extract(5)


class Slimmable(nn.Module):
    """Two layers of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = SlicedConv2d(3, 8, 3, padding=1), SlicedBatchNorm2d(8)
        self.conv2, self.norm2 = SlicedConv2d(8, 8, 3, padding=1, groups=8), SlicedBatchNorm2d(8)

    def forward(self, x: Tensor, width: int) -> Tensor:
        x = self.norm1(self.conv1(x, width)).relu()
        return self.norm2(self.conv2(x)).relu()


def test_compile_fullgraph() -> None:
    """A network of these layers compiles in one graph, and trains as it does eagerly."""
    torch.manual_seed(0)
    net, x = Slimmable(), torch.randn(2, 3, 6, 6)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    states = []
    for function in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.load_state_dict(start)
        net.zero_grad()
        for width in (4, 6):
            function(x, width).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
        states.append([*gradients, *(value.clone() for value in net.buffers())])
    assert len(states[0]) == len(states[1]) == 14
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
