"""What a data set gives to training, calibration, search and test, and the names it is loaded by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spos_fast.data.images import Images, Normalization
from spos_fast.data.order import StreamOrder
from spos_fast.errors import InputError

NAMES = ("digits", "cifar10", "cifar100", "imagenet")


class DataSource(ABC):
    """A labelled image set in three parts: training, validation (split off the training part, for the search) and test.

    Every image is uint8 until it is on the device and normalised there to float32 ``[N, in_channels, input_size,
    input_size]``; labels are int64 ``[N]`` in ``0..num_classes-1``, ``classes`` names them.
    """

    name: str
    num_classes: int
    classes: tuple[str, ...]
    in_channels: int
    input_size: int
    train_size: int
    """Images in the training part without the validation split."""
    full_train_size: int
    """Images in the training part with the validation split: what retraining uses."""
    validation_size: int
    test_size: int
    normalization: Normalization

    def train_stream(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        full: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        workers: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless stream of augmented training batches: float32 ``[b, C, H, W]`` and int64 ``[b]`` on ``device``.

        ``batch_size`` is the global batch; this rank gets rows ``rank*b .. (rank+1)*b`` of it, ``b = batch_size /
        world_size``. The batch of a step depends on ``(seed, step, full, batch_size)`` only, so a stream begun at
        ``start_step`` continues an earlier one with the same bits. ``full`` adds the validation split (retraining).
        ``workers`` are decoding processes, for sources that decode (None: the source's number; 0: decode here).

        Raises ``InputError``, at once, for arguments out of range, and while iterating for images that cannot be read.
        """
        order = StreamOrder(seed, self.full_train_size if full else self.train_size, batch_size, rank, world_size)
        if start_step < 0:
            raise InputError(f"start_step is {start_step}: it must be 0 or above")
        check_workers(workers)
        return self._train_batches(order, start_step, full, checked_device(device), workers)

    def test_batches(self, batch_size: int, *, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set in order, normalised: float32 ``[n, C, H, W]``, int64 ``[n]``; the last may be smaller."""
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: it must be at least 1")
        return self._test_batches(batch_size, checked_device(device))

    @abstractmethod
    def calibration(
        self,
        images: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Images:
        """``images`` random images of the training part (never of the validation split) with the test transform.

        Fixed by ``seed``. ``progress(done, total)`` is called while images are decoded. Raises ``InputError`` if there
        are not that many images, or one cannot be read.
        """

    @abstractmethod
    def validation(
        self, *, device: str | torch.device = "cpu", progress: Callable[[int, int], None] | None = None
    ) -> Images:
        """The validation split with the test transform: the same images in the same order for every seed and run."""

    @abstractmethod
    def _train_batches(
        self, order: StreamOrder, start_step: int, full: bool, device: torch.device, workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]: ...

    @abstractmethod
    def _test_batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]: ...


def checked_device(device: str | torch.device) -> torch.device:
    """``device`` as a ``torch.device``; raises ``InputError`` if PyTorch does not know it or cannot reach it."""
    try:
        known = torch.device(device)
    except RuntimeError:
        raise InputError(f"device is {device!r}: give one that PyTorch knows, such as 'cpu' or 'cuda:0'") from None
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {str(device)!r}, and PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    if str(known) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())  # one name a device: sources keep a copy for each
    return known


def check_workers(workers: int | None) -> None:
    """Raises ``InputError`` unless ``workers`` is None or at least 0."""
    if workers is not None and workers < 0:
        raise InputError(f"workers is {workers}: it must be 0 (decode in this process) or above")


def load(name: str, path: str | Path | None = None, *, validation: float | None = None, **options: Any) -> DataSource:
    """The data set ``name`` ("digits", "cifar10", "cifar100" or "imagenet") from ``path``.

    ``path`` is the folder (or, for CIFAR, the archive); "digits" comes with scikit-learn and takes none. ``validation``
    is what is split off the training part: a share of each class (float) or a number of images a class (int); None is
    the source's default: 0.25 for digits, 0.1 for CIFAR, 50 for ImageNet. ``options`` for "imagenet" are
    ``input_size``, ``normalize`` and ``workers``, see ``spos_fast.data.imagenet.load_imagenet``; the others take none.

    Raises ``InputError`` for an unknown name or option and for data that is missing, incomplete or damaged.
    """
    # Imported here so that one data set does not need the packages of the others.
    if name == "digits":
        from spos_fast.data.digits import load_digits

        _check_options(name, options)
        if path is not None:
            raise InputError(f"path is {str(path)!r}: the digits come with scikit-learn, leave path out")
        return load_digits(validation=0.25 if validation is None else validation)
    if name in ("cifar10", "cifar100"):
        from spos_fast.data.cifar import load_cifar

        _check_options(name, options)
        return load_cifar(name, _existing(name, path), validation=0.1 if validation is None else validation)
    if name == "imagenet":
        from spos_fast.data.imagenet import load_imagenet

        _check_options(name, options, "input_size", "normalize", "workers")
        return load_imagenet(_existing(name, path), validation=50 if validation is None else validation, **options)
    raise InputError(f"data set {name!r} is unknown: choose one of {', '.join(NAMES)}")


def _check_options(name: str, options: dict[str, Any], *known: str) -> None:
    for option in options:
        if option not in known:
            raise InputError(f"option {option!r} is unknown for {name}: it takes {', '.join(known) or 'no options'}")


def _existing(name: str, path: str | Path | None) -> Path:
    if path is None:
        raise InputError(f"path is missing: {name} is read from a folder, give its path")
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"{found} does not exist: path must be where the {name} files are")
    return found
