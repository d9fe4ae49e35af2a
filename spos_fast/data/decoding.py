"""Decoding image files in worker processes, in the order asked for, with one clear error for a broken image."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spos_fast.data.folders import FolderIndex
from spos_fast.data.order import uniforms
from spos_fast.data.transforms import DRAWS, augmented, centered
from spos_fast.errors import InputError

# Images a worker decodes in one go. Small beside a batch, so that all workers share the first batch and few images wait
# in shared memory; large enough that handing a chunk over costs little.
CHUNK = 32
# Chunks that wait or are under way for each worker: 16 workers keep 2,048 images of 224 ready in 308 MB.
AHEAD = 4


@dataclass(frozen=True, eq=False)
class Chunk:
    """A piece of work: images of an index, and the stream position of the first (None: the test transform)."""

    images: NDArray[np.int64]
    first_position: int | None = None


@dataclass(frozen=True)
class _Broken:
    """The message of an image that could not be read. Returned, not raised: an exception that crosses the border of a
    process comes back with the worker's whole traceback inside its message.
    """

    message: str


class Decoder(Dataset["tuple[Tensor, Tensor] | _Broken"]):
    """Turns a ``Chunk`` into uint8 ``[n, 3, size, size]`` (RGB) and int64 ``[n]``; what it makes of an image depends on
    the image, ``seed`` and its position only, never on the process.
    """

    def __init__(self, index: FolderIndex, size: int, seed: int = 0) -> None:
        self._index, self._size, self._seed = index, size, seed

    def __getitem__(self, chunk: Chunk) -> tuple[Tensor, Tensor] | _Broken:
        pixels = np.empty((len(chunk.images), 3, self._size, self._size), dtype=np.uint8)
        first = chunk.first_position
        draws = None if first is None else uniforms(self._seed, first, len(chunk.images), DRAWS).tolist()
        for row, image in enumerate(chunk.images):
            try:
                rgb = read_rgb(self._index.path(int(image)))
            except InputError as error:
                return _Broken(str(error))
            ready = centered(rgb, self._size) if draws is None else augmented(rgb, self._size, draws[row])
            pixels[row] = np.asarray(ready).transpose(2, 0, 1)
        return torch.from_numpy(pixels), torch.from_numpy(self._index.labels[chunk.images])


def read_rgb(path: str) -> Image.Image:
    """The image file at ``path``, whole, as RGB: grey, palette, CMYK and transparent images are converted.

    Raises ``InputError`` naming the file if it is missing, broken or truncated.
    """
    try:
        with warnings.catch_warnings():
            # Odd metadata and transparent palettes are common in ImageNet and do not change the pixels used.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path} is gone: it was there when the folder was indexed") from None
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} cannot be decoded, it is broken or truncated ({reason}): replace or remove the file"
        ) from None


def chunks(images: NDArray[np.int64], first_position: int | None = None) -> Iterator[Chunk]:
    """``images`` cut into chunks of at most ``CHUNK``, in order."""
    for start in range(0, len(images), CHUNK):
        position = None if first_position is None else first_position + start
        yield Chunk(images[start : start + CHUNK], position)


def decoded(decoder: Decoder, work: Iterable[Chunk], *, workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk of ``work``, in order: uint8 ``[n, 3, size, size]`` and int64 ``[n]``, on the host.

    ``workers`` processes (0: this one) keep ``AHEAD`` chunks each ready and end with the iterator; ``pin`` puts the
    tensors into pinned memory. Raises ``InputError`` naming a broken image.
    """
    loader: DataLoader[object] = DataLoader(
        decoder,
        sampler=cast("Iterable[int]", work),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin,
        # Its own generator: the loader seeds its workers from it, and would take a number from PyTorch's global one,
        # which a resumed run must find as it was.
        generator=torch.Generator(),
    )
    for result in loader:
        if isinstance(result, _Broken):
            raise InputError(result.message)
        pixels, labels = cast("tuple[Tensor, Tensor]", result)
        yield pixels, labels


def _as_it_is(result: object) -> object:
    return result


def default_workers() -> int:
    """One process a usable CPU, at most 16: decoding scales no further on one host's memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)
