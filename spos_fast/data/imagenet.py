"""ImageNet (ILSVRC 2012), or any data set in the same class folders, decoded in worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spos_fast.data.decoding import Chunk, Decoder, chunks, decoded, default_workers
from spos_fast.data.folders import FolderIndex, check_same_classes, scan
from spos_fast.data.images import Images, Normalization
from spos_fast.data.order import StreamOrder, draw_subset, hold_out
from spos_fast.data.source import DataSource, check_workers, checked_device
from spos_fast.errors import InputError

NORMALIZATIONS = {
    # Mean and standard deviation of RGB on the 0..1 scale, as torchvision's models use them
    # (https://docs.pytorch.org/vision/stable/models.html).
    "imagenet": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    # What the published SPOS checkpoints were trained with: BGR, 0..255, nothing subtracted
    # (github.com/megvii-model/SinglePathOneShot, src/Supernet/train.py, ToBGRTensor).
    "published": Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), bgr=True, scale=1.0),
}


class FolderSource(DataSource):
    """Class folders as a data set: ``train`` and ``test`` are indices with the same classes.

    Augmented and decoded in ``workers`` processes, sent to the device as uint8 and normalised there. See
    ``load_imagenet`` for the arguments.
    """

    def __init__(
        self,
        name: str,
        train: FolderIndex,
        test: FolderIndex,
        normalization: Normalization,
        *,
        validation: float,
        input_size: int,
        workers: int,
    ) -> None:
        self.name = name
        self.classes = train.classes
        self.num_classes = len(train.classes)
        self.in_channels = 3
        self.input_size = input_size
        self.normalization = normalization
        self._train, self._test, self._workers = train, test, workers
        self._kept, self._held = hold_out(train.labels, validation, train.classes)
        self.train_size, self.validation_size = len(self._kept), len(self._held)
        self.full_train_size, self.test_size = len(train), len(test)

    def calibration(
        self,
        images: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Images:
        """See ``DataSource.calibration``. 20,000 images of 224 are 3.0 GB on ``device``."""
        return self._images(self._kept[draw_subset(self.train_size, images, seed)], device, progress)

    def validation(
        self, *, device: str | torch.device = "cpu", progress: Callable[[int, int], None] | None = None
    ) -> Images:
        """See ``DataSource.validation``. 50,000 images of 224 are 7.5 GB on ``device``."""
        return self._images(self._held, device, progress)

    def _images(
        self, rows: NDArray[np.int64], device: str | torch.device, progress: Callable[[int, int], None] | None
    ) -> Images:
        decoder, work = Decoder(self._train, self.input_size), chunks(rows)
        batches = self._batches(decoder, work, [len(rows)], self._workers, checked_device(device), progress)
        pixels, labels = next(batches)
        return Images(pixels, labels, self.normalization)

    def _test_batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        everything = np.arange(len(self._test))
        batches = [everything[start : start + batch_size] for start in range(0, len(everything), batch_size)]
        work = itertools.chain.from_iterable(map(chunks, batches))
        decoder = Decoder(self._test, self.input_size)
        for pixels, labels in self._batches(decoder, work, map(len, batches), self._workers, device):
            yield self.normalization(pixels), labels

    def _train_batches(
        self, order: StreamOrder, start_step: int, full: bool, device: torch.device, workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        def work() -> Iterator[Chunk]:
            for step in itertools.count(start_step):
                images = order.images(step)
                yield from chunks(images if full else self._kept[images], order.first_position(step))

        decoder = Decoder(self._train, self.input_size, order.seed)
        processes = self._workers if workers is None else workers
        for pixels, labels in self._batches(decoder, work(), itertools.repeat(order.rows), processes, device):
            yield self.normalization(pixels), labels

    def _batches(
        self,
        decoder: Decoder,
        work: Iterable[Chunk],
        sizes: Iterable[int],
        workers: int,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``work`` joined to batches of ``sizes``: uint8 ``[n, 3, H, W]`` and int64 ``[n]`` on ``device``. No chunk may
        reach over the end of a batch.
        """
        parts = decoded(decoder, work, workers=workers, pin=device.type == "cuda")
        for size in sizes:
            # Made once and filled part by part: joining the parts afterwards would need the memory twice.
            pixels = torch.empty((size, 3, self.input_size, self.input_size), dtype=torch.uint8, device=device)
            labels = torch.empty(size, dtype=torch.int64, device=device)
            done = 0
            while done < size:
                part, part_labels = next(parts)
                rows = slice(done, done + len(part_labels))
                pixels[rows].copy_(part, non_blocking=True)
                labels[rows].copy_(part_labels, non_blocking=True)
                done = rows.stop
                if progress is not None:
                    progress(done, size)
            yield pixels, labels


def load_imagenet(
    path: Path,
    *,
    validation: float = 50,
    input_size: int = 224,
    normalize: str = "imagenet",
    workers: int | None = None,
) -> FolderSource:
    """Class folders ``path/train/CLASS/*.JPEG`` and ``path/val/CLASS/*.JPEG``; ``val`` is the test set.

    ``validation`` images a class (or a share of each class) are split off ``train``, the same in every run: 50 a class
    are the 50,000 of the paper (Guo et al. 2020, section 4). Augmentation: random resized crop to ``input_size``
    (bilinear, area 0.08..1, ratio 3/4..4/3), colour jitter of 0.4, mirror image; test transform: short side to
    ``input_size * 256 / 224``, central crop. ``normalize`` is "imagenet" or "published" (BGR, 0..255: what the
    published checkpoints need). ``workers`` are decoding processes (None: one a CPU, at most 16; 0: decode
    in this process).

    Raises ``InputError`` for missing or empty folders, classes that are in one part only, classes too small for the
    split, and unknown arguments. Images are opened when they are used; a broken one is named then.
    """
    if normalize not in NORMALIZATIONS:
        raise InputError(f"normalize is {normalize!r}: choose one of {', '.join(NORMALIZATIONS)}")
    if input_size < 1:
        raise InputError(f"input_size is {input_size}: it must be at least 1 pixel")
    check_workers(workers)
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise InputError(f"{path} has no folder {part!r}: it should hold train/CLASS/*.JPEG and val/CLASS/*.JPEG")
    train, test = scan(path / "train"), scan(path / "val")
    check_same_classes(train, test)
    return FolderSource(
        "imagenet",
        train,
        test,
        NORMALIZATIONS[normalize],
        validation=validation,
        input_size=input_size,
        workers=default_workers() if workers is None else workers,
    )
