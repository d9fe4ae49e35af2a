"""Blocks of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) as NAS-Bench-Macro runs them."""

from __future__ import annotations

from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; added to the input where the shape stays.

    Args:
        in_channels, out_channels: of the images that come and go.
        expansion: channels in the middle over input channels.
        kernel_size: of the depthwise convolution, odd.
        stride: of the depthwise convolution.
        affine: whether batch normalisation has scale and shift.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, kernel_size: int, stride: int, affine: bool
    ) -> None:
        super().__init__()
        mid = expansion * in_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, mid, 1, bias=False),
            nn.BatchNorm2d(mid, affine=affine),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, mid, kernel_size, stride, kernel_size // 2, groups=mid, bias=False),
            nn.BatchNorm2d(mid, affine=affine),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor, _setting: int = 0) -> Tensor:
        """Shapes ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``. It has one
        setting.
        """
        return self.conv(x) + x if self.shortcut else self.conv(x)


class Shortcut(nn.Module):
    """The block that is left out: the input itself, or where the shape changes a strided 1x1 convolution with batch
    normalisation. Arguments and shapes as of :class:`InvertedResidual`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels, affine=affine)
            )

    def forward(self, x: Tensor, _setting: int = 0) -> Tensor:
        """It has one setting."""
        return x if self.downsample is None else self.downsample(x)
