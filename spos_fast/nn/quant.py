"""The residual block of ResNet-18 and -34 on quantized convolutions, which are in quant_act.py and quant_conv.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from spos_fast.errors import InputError
from spos_fast.nn import fused
from spos_fast.nn.quant_act import Bits, Index, QuantAct
from spos_fast.nn.quant_conv import QuantConv2d
from spos_fast.nn.quantize_model import initialize_steps, quantize_model
from spos_fast.nn.sliced import SlicedBatchNorm2d
from spos_fast.ops import BNStats, PackedConv2d, bn_add_relu
from spos_fast.ops.unit_layers import statistics_dtype

__all__ = ["QuantAct", "QuantBasicBlock", "QuantConv2d", "fold", "initialize_steps", "quantize_model"]


class QuantBasicBlock(nn.Module):
    """The residual block of ResNet-18 and -34 on quantized convolutions, with torchvision's names.

    Both convolutions and the 1x1 shortcut run with the same bits. The block's input is an image behind a ReLU: conv1
    and the shortcut quantize it, each with steps of its own, and the identity shortcut takes it as it is. conv2's
    quantizer clips at 0 and so is the ReLU in between.

    Args:
        in_channels, out_channels: of the block; a shortcut convolution stands where they differ or stride is not 1.
        mid_channels: the most that can be between conv1 and conv2.
        stride: of conv1 and of the shortcut.
        weight_bits, act_bits, weight_quantizer, act_quantizer: see :class:`QuantConv2d`.
        affine: whether normalisation layers have weights and biases.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        stride: int = 1,
        *,
        weight_bits: Bits,
        act_bits: Bits,
        weight_quantizer: str = "dorefa",
        act_quantizer: str = "pact",
        affine: bool = True,
    ) -> None:
        super().__init__()

        def convolution(narrow: int, wide: int, size: int, stride: int) -> QuantConv2d:
            return QuantConv2d(
                narrow,
                wide,
                size,
                stride,
                size // 2,
                bias=False,
                weight_bits=weight_bits,
                act_bits=act_bits,
                weight_quantizer=weight_quantizer,
                act_quantizer=act_quantizer,
            )

        self.conv1 = convolution(in_channels, mid_channels, 3, stride)
        self.bn1 = SlicedBatchNorm2d(mid_channels, affine=affine)
        self.conv2 = convolution(mid_channels, out_channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, affine=affine)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = convolution(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels, affine=affine))

    def forward(self, x: Tensor, setting: tuple[int, Index, Index] | None = None) -> Tensor:
        """The block on x, [N, in_channels, H, W].

        Args:
            x: the image, behind a ReLU.
            setting: the number of mid channels that are used, and the indices of the weights' and the activations'
                bit-widths; None for all channels and index 0.

        Returns:
            [N, out_channels, H', W'], behind a ReLU.
        """
        mid, weight_index, act_index = (self.conv1.out_channels, 0, 0) if setting is None else setting
        if self._fuses() and x.numel():
            on_batch = uses_batch_statistics(self.bn1)
            made = self.conv1.convolve(x, weight_index, act_index, out_channels=mid, statistics=on_batch)
            z = made.z if isinstance(made, BNStats) else made
            scale, shift = fold(self.bn1, z, made if isinstance(made, BNStats) else None)
            y = cast(Tensor, self.conv2.convolve(z, weight_index, act_index, scale=scale, shift=shift, in_channels=mid))
        else:
            y = self.bn1(self.conv1(x, weight_index, act_index, out_channels=mid))
            y = self.conv2(y, weight_index, act_index, in_channels=mid)
        y = self.bn2(y)
        if self.downsample is not None:
            convolution, norm = self.downsample
            x = norm(convolution(x, weight_index, act_index))
        y += x
        return functional.relu(y, inplace=True)

    def packed(self, setting: tuple[int, int, int] | None = None) -> PackedBasicBlock:
        """The block with one setting for many evaluations: its weights quantized and packed once.

        Raises:
            InputError: a layer that does not run on codes.
        """
        mid, weight_index, act_index = (self.conv1.out_channels, 0, 0) if setting is None else setting
        first = self.conv1.packed(weight_index, out_channels=mid)
        second = self.conv2.packed(weight_index, in_channels=mid)
        norms: list[nn.BatchNorm2d] = [self.bn1, self.bn2]
        shortcut = None
        if self.downsample is not None:
            shortcut = cast(QuantConv2d, self.downsample[0]).packed(weight_index)
            norms.append(cast(nn.BatchNorm2d, self.downsample[1]))
        return PackedBasicBlock(first, second, shortcut, act_index, norms, mid)

    def _fuses(self) -> bool:
        """Whether bn1 can be folded into the load of conv2; compilers, and who hooks into layers, see them all."""
        if torch.compiler.is_compiling() or _has_any_global_hook():
            return False
        layers = self.conv1, self.bn1, self.conv2
        return self.conv1.on_codes and self.conv2.on_codes and not any(map(fused.changed, layers))


class PackedBasicBlock:
    """A :class:`QuantBasicBlock` with one setting on given statistics; :meth:`QuantBasicBlock.packed` makes it.

    Attributes:
        norms: its normalisation layers: bn1, bn2 and the shortcut's.
    """

    def __init__(
        self,
        first: PackedConv2d,
        second: PackedConv2d,
        shortcut: PackedConv2d | None,
        act_index: int,
        norms: Sequence[nn.BatchNorm2d],
        mid: int,
    ) -> None:
        self._first, self._second, self._shortcut = first, second, shortcut
        self._act_index, self.norms, self._mid = act_index, tuple(norms), mid

    @torch.no_grad()
    def __call__(self, x: Tensor, folded: Sequence[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """The block on x, [N, in_channels, H, W], behind a ReLU.

        Args:
            x: the image.
            folded: scale and shift of each of ``norms``, bn1's of the mid channels; None for running statistics.

        Returns:
            [N, out_channels, H', W'], behind a ReLU.
        """
        if folded is None:
            widths = [self._mid, *(norm.num_features for norm in self.norms[1:])]
            folded = [fold_running(norm, width) for norm, width in zip(self.norms, widths, strict=True)]
        index, (scale, shift) = self._act_index, folded[0]
        y = cast(Tensor, self._second(cast(Tensor, self._first(x, index)), index, scale=scale, shift=shift))
        return self._end(x if self._shortcut is None else cast(Tensor, self._shortcut(x, index)), y, folded[1:])

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], int]:
        """The block on batch statistics, which move nothing.

        Args:
            x: [N, in_channels, H, W], behind a ReLU.

        Returns:
            The output; mean and variance (divided by the count) in front of each of ``norms``; the count, which all of
            them share.
        """
        index = self._act_index
        first = cast(BNStats, self._first(x, index, statistics=True))
        count = first.z.numel() // first.z.shape[1]
        scale, shift = _scale_and_shift(self.norms[0], first.mean, first.m2 / count)
        made = [first, cast(BNStats, self._second(first.z, index, scale=scale, shift=shift, statistics=True))]
        if self._shortcut is not None:
            made.append(cast(BNStats, self._shortcut(x, index, statistics=True)))
        mean, var = [each.mean for each in made], [each.m2 / count for each in made]
        folded = [_scale_and_shift(*given) for given in zip(self.norms[1:], mean[1:], var[1:], strict=True)]
        return self._end(made[2].z if len(made) == 3 else x, made[1].z, folded), mean, var, count

    def _end(self, residual: Tensor, y: Tensor, folded: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        values = [value[None] for pair in folded for value in pair]
        beside = (values[2], values[3]) if len(values) == 4 else (None, None)
        return bn_add_relu(y, values[0], values[1], residual, *beside)


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether a layer normalises by the batch: in training, or without running statistics."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def fold(norm: nn.BatchNorm2d, z: Tensor, statistics: BNStats | None) -> tuple[Tensor, Tensor]:
    """Batch norm of z's channels as a scale and a shift, [channels]; moves the running statistics as the layer does.

    Args:
        norm: the layer, of at least as many channels.
        z: [N, C, H, W], its input.
        statistics: of z; None to take the running ones.

    Raises:
        InputError: a single value a channel, which has no variance.
    """
    channels = z.shape[1]
    if statistics is None:
        return fold_running(norm, channels)
    count = z.numel() // channels
    if count < 2:
        raise InputError(f"x must give more than one value a channel in training, got shape {list(z.shape)}")
    mean, var = statistics.mean, statistics.m2 / count
    fused.move_statistics([norm], [mean.detach()], [var.detach()], [count])
    return _scale_and_shift(norm, mean, var)


def fold_running(norm: nn.BatchNorm2d, channels: int) -> tuple[Tensor, Tensor]:
    """A layer on its running statistics as a scale and a shift of its first channels, [channels]."""
    mean, var = cast(Tensor, norm.running_mean)[:channels], cast(Tensor, norm.running_var)[:channels]
    return _scale_and_shift(norm, mean, var)


def _scale_and_shift(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(var)  # that of scales, also where the layer's statistics are in half precision
    mean, scale = mean.to(wide), (var.to(wide) + norm.eps).rsqrt()
    if not norm.affine:
        return scale, -mean * scale
    scale = scale * norm.weight[: len(mean)]
    return scale, norm.bias[: len(mean)] - mean * scale
