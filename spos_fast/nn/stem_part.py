"""The beginning of a network as a part of a path: convolution, normalisation, ReLU, maybe max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spos_fast import ops
from spos_fast.nn import fused
from spos_fast.nn.parts import Moments, Part, Statistics, single_value


class StemPart(Part):
    """A stem whose normalisation and ReLU are one pass, over what max pooling leaves.

    Normalisation by a positive scale and ReLU keep the order of values, and so does rounding: the greatest of a window
    can be taken before them, with the same bits.

    Args:
        module: the stem, for which :meth:`takes` holds.
    """

    def __init__(self, module: nn.Sequential) -> None:
        super().__init__(module)
        self._convolution, self._pool = module[0], module[3] if len(module) == 4 else None
        self.fuses = True

    @staticmethod
    def takes(module: nn.Sequential) -> bool:
        """Whether a module is such a stem, of plain layers, with a scale that is positive."""
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
        if type(module) is not nn.Sequential or tuple(map(type, module)) not in (kinds[:3], kinds):
            return False
        norm = cast("nn.BatchNorm2d", module[1])
        if norm.running_mean is None or any(map(fused.changed, (module, *module))):
            return False
        return len(module) == 3 or not (norm.affine and bool((norm.weight <= 0).any()))

    def calibrate(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor | None, Moments]]:
        """For each batch the output, normalised by the batch's own statistics, and these.

        Raises:
            InputError: a single value a channel, which has no variance.
        """
        inputs = _last(inputs)
        if not _fits(inputs):
            return super().calibrate(inputs)
        made: list[tuple[Tensor | None, Moments]] = []
        for x in inputs:
            z = self._convolution(x)
            count = z.numel() // z.shape[1]
            if count < 2:
                raise single_value(x)
            mean, m2 = ops.bn_moments(z)
            var = m2 / count
            gamma, beta = self.affine()
            scale = (var + self.norms[0].eps).rsqrt()
            scale = scale if gamma is None else scale * gamma
            shift = -mean * scale if beta is None else beta - mean * scale
            made.append((self._end(z, scale, shift), Moments([mean[0]], [var[0]], [count])))
        return made

    def infer(self, inputs: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[Tensor]:
        """For each batch the output, normalised by given statistics."""
        inputs = _last(inputs)
        if not _fits(inputs):
            return super().infer(inputs, statistics)
        given = [(cast(Tensor, each.scale)[None], cast(Tensor, each.shift)[None]) for each in statistics]
        return [self._end(self._convolution(x), *pair) for x, pair in zip(inputs, given, strict=True)]

    def _end(self, z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return ops.bn_normalize(z if self._pool is None else self._pool(z), scale, shift, relu=True)


def _last(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Images come as data sets hold them; the convolution would bring its few channels into this order anyway."""
    return [x.contiguous(memory_format=torch.channels_last) for x in inputs]


def _fits(inputs: Sequence[Tensor]) -> bool:
    return all(fused.takes(x) and fused.has_kernel("bn_normalize", x) for x in inputs)
