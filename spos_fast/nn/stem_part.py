"""The beginning of a network as a part of a path: convolution, normalisation, ReLU, maybe max pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
        self._join: Callable[[Iterable[Tensor], int], Tensor] = (
            _MaxPool(cast("nn.MaxPool2d", module[3])) if len(module) == 4 else _joined
        )
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
        running = _RunningMoments()
        joined = self._join(running.along(self._convolved(x)), len(x))
        if running.count < 2:
            raise single_value(x)
        mean, var = running.mean[0], running.m2[0] / running.count
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        gamma, beta = self.affine()
        (scale,), (shift,) = ops.bn_finalize([mean], [var], [gamma], [beta], self.norms[0].eps, dtype=dtype)
        out = ops.bn_normalize(joined, scale, shift, relu=True)
        return out, Moments([mean[0].to(dtype)], [var[0].to(dtype)], [running.count])

    def infer(self, inputs: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[Tensor]:
        """For each batch the output, normalised by given statistics."""
        if not _fits(inputs):
            return super().infer([_last(x) for x in inputs], statistics)
        outputs = []
        for x, given in zip(inputs, statistics, strict=True):
            scale, shift = cast(Tensor, given.scale)[None], cast(Tensor, given.shift)[None]
            outputs.append(ops.bn_normalize(self._join(self._convolved(x), len(x)), scale, shift, relu=True))
        return outputs

    def _convolved(self, x: Tensor) -> Iterator[Tensor]:
        """What the convolution makes of a batch, in order, a few images at a time."""
        rows, columns = (-(-size // stride) for size, stride in zip(x.shape[2:], self._convolution.stride, strict=True))
        image = self._convolution.out_channels * rows * columns * x.element_size()
        for images in x.split(max(_AT_ONCE // image, 1) if x.device.type == "cpu" else len(x)):
            yield self._convolution(_last(images))


class _RunningMoments:
    """Mean and second moment of what passes by, [1, C] of one layer each, and the number of values a channel."""

    def __init__(self) -> None:
        self.mean: list[Tensor] = []
        self.m2: list[Tensor] = []
        self.count = 0

    def along(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same pieces, looked at."""
        for done, z in enumerate(pieces):
            batch, values = ops.bn_moments(z), z.numel() // z.shape[1]
            self.mean, self.m2 = ops.bn_merge(
                self.mean, self.m2, [self.count], batch[:1], batch[1:], [values], mode="pooled", batches=done
            )
            self.count += values
            yield z


class _MaxPool:
    """Max pooling of the pieces of a batch into one tensor. The next batch takes it over: fresh pages cost as much."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        self._pool = pool
        self._out = self._indices = torch.empty(0)

    def __call__(self, pieces: Iterable[Tensor], images: int) -> Tensor:
        pool, done = self._pool, 0
        sizes = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        for z in pieces:
            if done == 0:
                self._make_room(images, z)
            place = self._out[done : done + len(z)]
            torch.ops.aten.max_pool2d_with_indices.out(z, *sizes, out=place, indices=self._indices[: len(z)])
            done += len(z)
        return self._out[:images]

    def _make_room(self, images: int, z: Tensor) -> None:
        shape = self._pool(z.to("meta")).shape[1:]

        def room(kept: Tensor, count: int, dtype: torch.dtype) -> Tensor:
            fits = len(kept) >= count and kept.shape[1:] == shape and kept.dtype == dtype and kept.device == z.device
            if fits and kept.is_inference() == torch.is_inference_mode_enabled():
                return kept
            return torch.empty([count, *shape], dtype=dtype, device=z.device, memory_format=torch.channels_last)

        self._out, self._indices = room(self._out, images, z.dtype), room(self._indices, len(z), torch.int64)


def _last(x: Tensor) -> Tensor:
    """Images come as data sets hold them; the convolution would bring its few channels into this order anyway."""
    return x.contiguous(memory_format=torch.channels_last)


def _fits(inputs: Sequence[Tensor]) -> bool:
    return all(fused.takes(_last(x[:1])) and fused.has_kernel("bn_normalize", x) for x in inputs)


def _joined(pieces: Iterable[Tensor], _: int) -> Tensor:
    parts = list(pieces)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
