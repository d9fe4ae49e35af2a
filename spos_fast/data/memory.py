"""A data set that fits in memory: it is moved to the device once, and batches are made there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spos_fast.data.augment import crop_and_flip, pad_images
from spos_fast.data.images import Images, Normalization
from spos_fast.data.order import StreamOrder, draw_subset, hold_out, uniforms
from spos_fast.data.source import DataSource, checked_device


@dataclass(frozen=True, eq=False)
class Part:
    """Images as they lie in a data set's files: ``pixels`` uint8 ``[N, C, H, W]``, ``labels`` int64 ``[N]``."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.int64]) -> Part:
        """The images at ``rows`` (int64), copied."""
        return Part(self.pixels[rows], self.labels[rows])


class MemorySource(DataSource):
    """A data set held in memory whose augmentation is a random crop after zero padding and, perhaps, a mirror image.

    ``validation`` is split off ``train`` per class (see ``hold_out``). ``padding`` is in pixels on each side; ``flip``
    mirrors half of the images. Raises ``InputError`` if a class has too few images for the split.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        train: Part,
        test: Part,
        normalization: Normalization,
        *,
        validation: float,
        padding: int,
        flip: bool,
    ) -> None:
        self.name = name
        self.classes = classes
        self.num_classes = len(classes)
        self.in_channels = int(train.pixels.shape[1])
        self.input_size = int(train.pixels.shape[2])
        self.normalization = normalization
        self._train, self._test = train, test
        self._padding, self._flip = padding, flip
        self._kept, self._held = hold_out(train.labels, validation, classes)
        self.train_size, self.validation_size = len(self._kept), len(self._held)
        self.full_train_size, self.test_size = len(train.labels), len(test.labels)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def calibration(
        self,
        images: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Images:
        """See ``DataSource.calibration``."""
        return self._images(self._train[self._kept[draw_subset(self.train_size, images, seed)]], device)

    def validation(
        self, *, device: str | torch.device = "cpu", progress: Callable[[int, int], None] | None = None
    ) -> Images:
        """See ``DataSource.validation``."""
        return self._images(self._train[self._held], device)

    def _images(self, part: Part, device: str | torch.device) -> Images:
        images = Images(torch.from_numpy(part.pixels), torch.from_numpy(part.labels), self.normalization)
        return images.to(checked_device(device))

    def _test_batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        return self._images(self._test, device).batches(batch_size)

    def _training_part(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Padded pixels and labels of the full training part on ``device``, moved there once."""
        if device not in self._on_device:
            pixels = pad_images(torch.from_numpy(self._train.pixels).to(device), self._padding)
            self._on_device[device] = (pixels, torch.from_numpy(self._train.labels).to(device))
        return self._on_device[device]

    def _train_batches(
        self, order: StreamOrder, start_step: int, full: bool, device: torch.device, workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        padded, labels = self._training_part(device)
        step = start_step
        while True:
            # One small int64 table a step, so that a GPU gets one copy and no more.
            table = torch.from_numpy(self._plan(order, step, full))
            if device.type == "cuda":
                table = table.pin_memory()
            images, top, left, flip = table.to(device, non_blocking=True)
            pixels = crop_and_flip(
                padded,
                images,
                top,
                left,
                flip.bool() if self._flip else None,
                height=self.input_size,
                width=self.input_size,
            )
            yield self.normalization(pixels), labels[images]
            step += 1

    def _plan(self, order: StreamOrder, step: int, full: bool) -> NDArray[np.int64]:
        """int64 ``[4, rows]``: the image, the top and left corner of its crop, and 1 where it is mirrored."""
        images = order.images(step)
        draws = uniforms(order.seed, order.first_position(step), order.rows, 3).T
        corners = 2 * self._padding + 1
        plan = np.empty((4, order.rows), dtype=np.int64)
        plan[0] = images if full else self._kept[images]
        plan[1:3] = draws[:2] * corners
        plan[3] = draws[2] < 0.5
        return plan
