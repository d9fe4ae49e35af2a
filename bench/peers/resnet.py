"""ResNet-18 and -34 in plain PyTorch (He et al., arXiv 1512.03385), with torchvision's names; fp32 or quantized.

The quantized one composes what other projects compose: a quantizer on the input of each residual block's convolutions,
one on their weights, ``torch.nn.functional.conv2d``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

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
