"""ResNet-18 in plain PyTorch (He et al., arXiv 1512.03385): fp32, or quantized as other projects compose it.

There each convolution of the residual blocks has a quantizer on its input and one on its weights in front of
``torch.nn.functional.conv2d``. Their greatest codes are tensors, so that torch.compile makes one graph for all bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.peers.quantization import round_through

# Makes a convolution: channels in, channels out, kernel size, stride.
MakeConv = Callable[[int, int, int, int], nn.Module]


def plain_conv(narrow: int, wide: int, size: int, stride: int) -> nn.Conv2d:
    """A convolution without bias, padded to keep the image's size."""
    return nn.Conv2d(narrow, wide, size, stride, size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, narrow: int, wide: int, stride: int, conv: MakeConv) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(narrow, wide, 3, stride), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = conv(wide, wide, 3, 1), nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or narrow != wide:
            self.downsample = nn.Sequential(conv(narrow, wide, 1, stride), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        """The block on x, [N, narrow, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


# Makes a residual block: channels in, channels out, stride.
MakeBlock = Callable[[int, int, int], nn.Module]


class ResNet(nn.Module):
    """A residual network for ImageNet; ``depths`` counts the blocks of the four stages."""

    def __init__(self, depths: tuple[int, ...], block: MakeBlock, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        narrow = 64
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths):
            wide = 64 * 2**stage
            for position in range(depth):
                self.stages.append(block(narrow, wide, 2 if stage > 0 and position == 0 else 1))
                narrow = wide
        self.fc = nn.Linear(narrow, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x, [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for block in self.stages:
            x = block(x)
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18(conv: MakeConv = plain_conv) -> ResNet:
    """ResNet-18 whose residual blocks have the convolutions that ``conv`` makes."""
    return ResNet((2, 2, 2, 2), lambda narrow, wide, stride: BasicBlock(narrow, wide, stride, conv))


def _pact(x: Tensor, alpha: Tensor, levels: Tensor) -> Tensor:
    scale = levels / alpha.detach()
    return round_through(torch.minimum(torch.relu(x), alpha) * scale) / scale


def _dorefa(weight: Tensor, levels: Tensor) -> Tensor:
    squashed = torch.tanh(weight)
    return 2 * round_through(levels * (squashed / (2 * squashed.abs().max()) + 0.5)) / levels - 1


def _lsq(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    factor = (x.numel() * high) ** -0.5
    step = (step - step * factor).detach() + step * factor
    return round_through(torch.minimum(torch.maximum(x / step, low), high)) * step


class ComposedConv(nn.Conv2d):
    """A convolution with composed quantizers, whose bit-widths are set from outside.

    Attributes:
        levels: greatest codes of the weights and of the input, float32 [2]; as :meth:`set_bits` sets them.
    """

    levels: Tensor

    def __init__(self, narrow: int, wide: int, size: int, stride: int, quantizer: str) -> None:
        super().__init__(narrow, wide, size, stride, size // 2, bias=False)
        self.quantizer = quantizer
        self.register_buffer("levels", torch.ones(2), persistent=False)
        self.act_step = nn.Parameter(torch.tensor(2.0 if quantizer == "pact" else 0.2))
        self.weight_step = nn.Parameter(torch.tensor(0.02)) if quantizer == "lsq" else None
        self.set_bits(4, 4)

    def set_bits(self, weight_bits: int, act_bits: int) -> None:
        """From the next call on."""
        signed = self.quantizer == "lsq"
        self.levels[0] = 2 ** (weight_bits - 1) - 1 if signed else 2**weight_bits - 1
        self.levels[1] = 2**act_bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolution of the quantized input with the quantized weights."""
        of_weights, of_act = self.levels
        if self.weight_step is None:
            values = _pact(x, self.act_step, of_act)
            weight = _dorefa(self.weight, of_weights)
        else:
            values = _lsq(x, self.act_step, torch.zeros_like(of_act), of_act)
            weight = _lsq(self.weight, self.weight_step, -of_weights - 1, of_weights)
        return functional.conv2d(values, weight, None, self.stride, self.padding)
