"""Quantized residual blocks as parts of a path: scored on integers, their weights quantized and packed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from spos_fast.nn import fused
from spos_fast.nn.parts import Moments, Part, Statistics, single_value
from spos_fast.nn.quant import PackedBasicBlock, QuantBasicBlock, QuantConv2d


class QuantPart(Part):
    """A :class:`QuantBasicBlock` with one setting, (mid channels, index of weight bits, index of activation bits).

    On the CPU its convolutions run on integer codes: exact sums, scaled once. Elsewhere, and for images that the ops do
    not take, its own forward runs.

    Args:
        module: the block, for which :meth:`takes` holds.
        setting: how it runs.
    """

    def __init__(self, module: QuantBasicBlock, setting: tuple[int, int, int]) -> None:
        super().__init__(module, setting)
        self.widths = [setting[0], *self.widths[1:]]
        self._packed: PackedBasicBlock = module.packed(setting)  # which quantizes the weights at its first call
        self.fuses = True

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such a block that runs as it was written."""
        if type(module) is not QuantBasicBlock or any(map(fused.changed, module.modules())):
            return False
        layers: list[nn.Module] = [module.conv1, module.bn1, module.conv2, module.bn2, *(module.downsample or ())]
        convolutions = [layer for layer in layers if isinstance(layer, QuantConv2d)]
        norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        alike = {(norm.eps, norm.affine, norm.running_mean is None) for norm in norms}
        return all(layer.on_codes for layer in convolutions) and len(alike) == 1 and norms[0].running_mean is not None

    def concurrent(self, images: Tensor) -> bool:
        """Likewise; what runs in floats gives other bits with other numbers of threads."""
        block, (_, weight_index, _) = self.module, cast("tuple[int, int, int]", self.setting)
        layers = [layer for layer in block.modules() if isinstance(layer, QuantConv2d)]
        return super().concurrent(images) and all(layer.on_integers(weight_index) for layer in layers)

    def calibrate(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor | None, Moments]]:
        """For batches of one shape the outputs, normalised by the batch's own statistics, and these.

        Raises:
            InputError: a layer gets a single value a channel, which has no variance.
        """
        if not _on_integers(inputs):
            return super().calibrate(inputs)
        made: list[tuple[Tensor | None, Moments]] = []
        for x in inputs:
            out, mean, var, count = self._packed.calibrate(x)
            if count < 2:
                raise single_value(x)
            made.append((out, Moments(mean, var, [count] * len(mean))))
        return made

    def infer(self, inputs: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[Tensor]:
        """For batches of one shape the outputs, each normalised by given statistics."""
        if not _on_integers(inputs):
            return super().infer(inputs, statistics)
        outputs = []
        for x, given in zip(inputs, statistics, strict=True):
            scales, shifts = (cast(Tensor, values).split(self.widths) for values in (given.scale, given.shift))
            outputs.append(self._packed(x, list(zip(scales, shifts, strict=True))))
        return outputs


def _on_integers(inputs: Sequence[Tensor]) -> bool:
    return inputs[0].device.type == "cpu" and all(map(fused.takes, inputs))
