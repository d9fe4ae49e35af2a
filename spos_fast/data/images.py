"""Fixed image sets held on one device as uint8, and the normalization that turns uint8 into float32 there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spos_fast.errors import InputError


@dataclass(frozen=True)
class Normalization:
    """What turns raw pixels into network input: ``(pixels / scale - mean) / std`` per channel, as float32.

    ``mean`` and ``std`` hold one value a channel, in the order of the *output* channels. With ``bgr`` the three input
    channels (RGB) are reversed first. ``scale`` divides the pixels: 255 for the usual 0..1 range, 1 to keep 0..255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False
    scale: float = 255.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise InputError(f"mean has {len(self.mean)} values and std {len(self.std)}: both need one value a channel")
        if not all(value > 0 for value in (*self.std, self.scale)):
            raise InputError(f"std is {self.std} and scale {self.scale}: all of them must be above zero")
        if self.bgr and len(self.mean) != 3:
            raise InputError(f"bgr needs 3 channels, and mean has {len(self.mean)} values")

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 ``[N, C, H, W]`` to float32 of the same shape, device and memory format; an image's bits do not depend
        on its neighbours in the batch.

        Raises ``InputError`` if the dtype, the number of dimensions or the number of channels is another.
        """
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != len(self.mean):
            raise InputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}: normalization takes uint8 [N, {len(self.mean)}, H, W]"
            )
        if self.bgr:
            pixels = pixels.flip(1)
        factor, shift = _factor_and_shift(self, pixels.device)
        # Two roundings rather than one fused multiply-add: vectorised bodies and scalar tails of a kernel may differ in
        # whether they fuse, and then a pixel's bits would depend on where in the batch it stands.
        return pixels.to(torch.float32).mul_(factor).add_(shift)


@functools.lru_cache(maxsize=64)
def _factor_and_shift(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """``1 / (scale * std)`` and ``-mean / std`` as float32 ``[1, C, 1, 1]``: cached, since making them for every batch
    would wait for the device.
    """
    with torch.inference_mode(False):
        factor = torch.tensor([1.0 / (normalization.scale * s) for s in normalization.std], dtype=torch.float32)
        pairs = zip(normalization.mean, normalization.std, strict=True)
        shift = torch.tensor([-mean / std for mean, std in pairs], dtype=torch.float32)
        return factor.view(1, -1, 1, 1).to(device), shift.view(1, -1, 1, 1).to(device)


@dataclass(frozen=True, eq=False)
class Images:
    """A fixed image set on one device: the calibration and the validation set of a search.

    ``pixels`` is uint8 ``[N, C, H, W]``, ``labels`` int64 ``[N]`` on the same device. Kept as uint8 because a quarter
    of the memory lets the whole set stay on the device: 20,000 images of 3x224x224 are 3.0 GB.
    """

    pixels: Tensor
    labels: Tensor
    normalization: Normalization

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise InputError(f"pixels are {self.pixels.dtype} {list(self.pixels.shape)}: uint8 [N, C, H, W] is right")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise InputError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)}: int64 [{len(self.pixels)}] is right"
            )
        if self.labels.device != self.pixels.device:
            raise InputError(f"labels are on {self.labels.device} and pixels on {self.pixels.device}: use one device")

    def __len__(self) -> int:
        """The number of images."""
        return int(self.pixels.shape[0])

    def to(self, device: str | torch.device) -> Images:
        """The same set on ``device``; tensors that are there already are shared, not copied."""
        return Images(self.pixels.to(device), self.labels.to(device), self.normalization)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order: float32 ``[n, C, H, W]``, normalised, and int64 ``[n]``; the last batch may be
        smaller. Raises ``InputError`` if ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: it must be at least 1")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self.normalization(self.pixels[rows]), self.labels[rows]
