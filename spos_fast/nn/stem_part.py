"""The beginning of a network as a part of a path: convolution, normalisation, ReLU, maybe max pooling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spos_fast import ops
from spos_fast.nn import fused
from spos_fast.nn.parts import Moments, Part, Statistics, single_value

# Of the convolution's output made at a time, in bytes: it stays in the caches, and the allocator keeps its memory.
# Whole, page faults cost as much as the convolution; docs/performance.md.
_AT_ONCE = 8 << 20


class StemPart(Part):
    """A stem whose normalisation and ReLU are one pass, over what max pooling leaves.

    Normalisation by a positive scale and ReLU keep the order of values, and so does rounding: the greatest of a window
    can be taken before them, with the same bits.

    On the CPU a few images are convolved and pooled at a time. How many depends on their size alone, so an image set
    cut into the same batches gives the same bits.

    Args:
        module: the stem, for which :meth:`takes` holds.
    """

    def __init__(self, module: nn.Sequential) -> None:
        super().__init__(module)
        self._convolution = cast("nn.Conv2d", module[0])
        self._pool = module[3] if len(module) == 4 else None
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
        if len(module) == 4 and module[3].dilation not in (1, (1, 1)):  # a window can lie in the padding alone
            return False
        return len(module) == 3 or not (norm.affine and bool((norm.weight <= 0).any()))

    def calibrate(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor | None, Moments]]:
        """For each batch the output, normalised by the batch's own statistics, and these.

        Raises:
            InputError: a single value a channel, which has no variance.
        """
        if not _fits(inputs):
            return super().calibrate([_last(x) for x in inputs])
        return [self._calibrate(x) for x in inputs]

    def _calibrate(self, x: Tensor) -> tuple[Tensor, Moments]:
        pooled, mean, m2, count = self._pooled_moments(x)
        if count < 2:
            raise single_value(x)
        var, dtype = m2 / count, torch.float64 if x.dtype == torch.float64 else torch.float32
        gamma, beta = self.affine()
        (scale,), (shift,) = ops.bn_finalize([mean], [var], [gamma], [beta], self.norms[0].eps, dtype=dtype)
        out = ops.bn_normalize(pooled, scale, shift, relu=True)
        return out, Moments([mean[0].to(dtype)], [var[0].to(dtype)], [count])

    def _pooled_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """What pooling leaves of the convolution; the convolution's mean and second moment, [1, C], and values."""
        pooled: list[Tensor] = []
        mean: list[Tensor] = []
        m2: list[Tensor] = []
        count = 0
        for done, z in enumerate(self._convolved(x)):
            pooled.append(self._pooled(z))
            batch, values = ops.bn_moments(z), z.numel() // z.shape[1]
            mean, m2 = ops.bn_merge(mean, m2, [count], batch[:1], batch[1:], [values], mode="pooled", batches=done)
            count += values
        return _joined(pooled), mean[0], m2[0], count

    def infer(self, inputs: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[Tensor]:
        """For each batch the output, normalised by given statistics."""
        if not _fits(inputs):
            return super().infer([_last(x) for x in inputs], statistics)
        outputs = []
        for x, given in zip(inputs, statistics, strict=True):
            scale, shift = cast(Tensor, given.scale)[None], cast(Tensor, given.shift)[None]
            parts = [ops.bn_normalize(self._pooled(z), scale, shift, relu=True) for z in self._convolved(x)]
            outputs.append(_joined(parts))
        return outputs

    def _convolved(self, x: Tensor) -> Iterator[Tensor]:
        """What the convolution makes of a batch, in order, a few images at a time."""
        rows, columns = (-(-size // stride) for size, stride in zip(x.shape[2:], self._convolution.stride, strict=True))
        image = self._convolution.out_channels * rows * columns * x.element_size()
        for images in x.split(max(_AT_ONCE // image, 1) if x.device.type == "cpu" else len(x)):
            yield self._convolution(_last(images))

    def _pooled(self, z: Tensor) -> Tensor:
        return z if self._pool is None else cast(Tensor, self._pool(z))


def _last(x: Tensor) -> Tensor:
    """Images come as data sets hold them; the convolution would bring its few channels into this order anyway."""
    return x.contiguous(memory_format=torch.channels_last)


def _fits(inputs: Sequence[Tensor]) -> bool:
    return all(fused.takes(_last(x[:1])) and fused.has_kernel("bn_normalize", x) for x in inputs)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
