"""Random draws and orders that are functions of a seed and a position, never of what was drawn before.

A training stream is one endless line of positions: row ``j`` of step ``s`` is position ``s * batch_size + j``. Which
image stands there and how it is augmented are computed from ``(seed, position)`` alone, so a stream that is resumed,
split over ranks or decoded by any number of workers has the same bits. Only raw bits of NumPy's bit generators are
used: those are fixed by its compatibility policy, the methods of ``Generator`` are not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spos_fast.errors import InputError

# What a draw is for: the first word of the seed, so that no two uses share bits.
ORDER, AUGMENTATION, CALIBRATION, SPLIT = 1, 2, 3, 4


def uniforms(seed: int, first_position: int, positions: int, draws: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for augmentation: float64 ``[positions, draws]``, row ``i`` for ``first_position + i``.

    A row depends on ``(seed, its position, draws)`` only: Philox (Salmon et al. 2011) is counter based, and every
    position owns its own stretch of the counter.
    """
    blocks = -(-draws // 4)  # Philox4x64 yields four words a counter value
    bits = np.random.Philox(counter=first_position * blocks, key=_philox_key(seed))
    words = bits.random_raw(positions * blocks * 4).reshape(positions, blocks * 4)[:, :draws]
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=16)
def _philox_key(seed: int) -> NDArray[np.uint64]:
    return np.random.SeedSequence([AUGMENTATION, seed]).generate_state(2, np.uint64).astype(np.uint64)


def shuffled(size: int, *words: int) -> NDArray[np.int64]:
    """A permutation of ``0..size-1`` fixed by ``words`` (a purpose, a seed, an epoch, ...): int64 ``[size]``."""
    keys = np.random.PCG64(np.random.SeedSequence(list(words))).random_raw(size)
    return np.argsort(keys, kind="stable").astype(np.int64)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return shuffled(size, ORDER, seed, epoch)


@dataclass(frozen=True)
class StreamOrder:
    """Which rows of which images make the batches of one rank's training stream.

    ``size`` images are gone through in a new order every epoch; ``batch_size`` is the global batch, and a batch may
    span the end of an epoch. Raises ``InputError`` if a number is out of range or ``world_size`` does not divide
    ``batch_size``.
    """

    seed: int
    size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise InputError(f"rank is {self.rank} of world_size {self.world_size}: rank must lie in 0..world_size-1")
        if self.batch_size % self.world_size:
            raise InputError(
                f"batch_size is {self.batch_size}, the global batch: it must be divisible by world_size "
                f"{self.world_size}"
            )

    @property
    def rows(self) -> int:
        """The images a step brings to this rank."""
        return self.batch_size // self.world_size

    def first_position(self, step: int) -> int:
        """The position of this rank's first row in the batch of ``step``."""
        return step * self.batch_size + self.rank * self.rows

    def images(self, step: int) -> NDArray[np.int64]:
        """The image of each of this rank's rows in the batch of ``step``: int64 ``[rows]``, values below ``size``."""
        first = self.first_position(step)
        taken: list[NDArray[np.int64]] = []
        position, left = first, self.rows
        while left:
            epoch, offset = divmod(position, self.size)
            part = _epoch_order(self.seed, epoch, self.size)[offset : offset + left]
            taken.append(part)
            position, left = position + len(part), left - len(part)
        return np.concatenate(taken)


def check_seed(seed: int) -> None:
    """Raises ``InputError`` unless ``seed`` is a whole number of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed is {seed!r}: it must be a whole number, 0 or above")


def draw_subset(size: int, images: int, seed: int) -> NDArray[np.int64]:
    """``images`` different numbers below ``size``, in random order, fixed by ``seed``: the calibration draw.

    A larger draw with the same seed begins with the smaller one. Raises ``InputError`` if ``images`` is not in 1..size.
    """
    check_seed(seed)
    if not 1 <= images <= size:
        raise InputError(f"images is {images}: the calibration set must have 1 to {size} images (the training part)")
    return shuffled(size, CALIBRATION, seed)[:images]


def hold_out(
    labels: NDArray[np.int64], amount: float, classes: tuple[str, ...], *, argument: str = "validation"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A stratified split that depends on nothing but the labels: ``(kept, held)``, ascending indices, int64.

    ``amount`` is a share of each class (a float in 0..1, rounded, at least one image) or a number of images a class (an
    int). It takes no seed on purpose: all runs on a data set must score on the same images.
    Raises ``InputError`` naming ``argument``, or the first classes that have too few images.
    """
    whole = isinstance(amount, (int, np.integer)) and not isinstance(amount, bool)
    if not (whole and amount >= 1) and not (isinstance(amount, float) and 0.0 < amount < 1.0):
        raise InputError(
            f"{argument} is {amount!r}: give a share between 0 and 1 (such as 0.1) or a number of images a class "
            "(such as 50)"
        )
    counts = np.bincount(labels, minlength=len(classes))
    wanted = np.full(len(classes), amount) if whole else np.maximum(np.rint(counts * amount), 1).astype(np.int64)
    small = np.flatnonzero(counts <= wanted)
    if len(small):
        named = ", ".join(f"{classes[c]} ({counts[c]})" for c in small[:5]) + (", ..." if len(small) > 5 else "")
        raise InputError(
            f"{argument} takes {int(wanted[small[0]])} images a class, and {len(small)} of {len(classes)} classes have "
            f"no more than that: {named}; add images or make {argument} smaller"
        )
    # Sorting by (class, random rank) puts each class in one run, of which the first images are held out.
    ranks = shuffled(len(labels), SPLIT)
    order = ranks[np.argsort(labels[ranks], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = place < np.repeat(wanted, counts)
    return np.sort(order[~mask]), np.sort(order[mask])
