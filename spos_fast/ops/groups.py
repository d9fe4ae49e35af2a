"""Groups: runs of equally many images, one behind the other in a batch. An op treats each as a call of its own.

What every group has of its own beside its images has a leading dimension of groups; there is none for a single group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError


def check_groups(groups: int, x: Tensor) -> None:
    """Refuse what is no number of groups, or does not divide the images of x."""
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or x.shape[0] % groups:
        raise InputError(f"groups must divide the {x.shape[0]} images of x into equal runs, got {groups}")


def each(groups: int, size: int) -> list[int]:
    """The shape of what every group has ``size`` values of."""
    return [size] if groups == 1 else [groups, size]


def runs(groups: int, images: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | Any, ...]]:
    """For every group its images, and its row of each vector; None of a vector that was not given."""
    rows = [[None] * groups if vector is None else vector.unbind() for vector in vectors]
    return zip(*(image.chunk(groups) for image in images), *rows, strict=True)


def joined(made: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The results of all groups from those of each: images one behind the other, vectors stacked."""
    images, *vectors = zip(*made, strict=True)
    return torch.cat(images).contiguous(memory_format=torch.channels_last), *map(torch.stack, vectors)


def joined_gradients(found: Sequence[Sequence[Tensor | None]], own: int) -> list[Tensor | None]:
    """Gradients for all groups from those of each.

    Those of x come one behind the other; those of what groups share as sums, in the groups' order and in float32
    (float64); those of the last ``own`` tensors, of which every group has a row, stacked.
    """
    dx, *others = zip(*found, strict=True)
    sums: list[Tensor | None] = []
    for parts in others[: len(others) - own]:
        total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
        for part in parts[1:]:
            total = total + part
        sums.append(total)
    rows = [None if parts[0] is None else torch.stack(parts) for parts in others[len(others) - own :]]
    return [torch.cat(dx).contiguous(memory_format=torch.channels_last), *sums, *rows]
