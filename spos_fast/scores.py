"""How well networks do on a set of images: their scores, and the sums over batches that these come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.errors import InputError


@dataclass(frozen=True)
class Score:
    """How well a network does on a set of images.

    Attributes:
        accuracy: share of images whose greatest logit is their class; 0 if the network failed.
        loss: mean cross-entropy, without label smoothing; NaN if the network failed.
        images: number of images.
        failed: whether a logit, or a statistic of its normalisation layers, was NaN or infinite.
        stopped: whether it was dropped by early stopping; accuracy and loss are those of the images seen until then.
    """

    accuracy: float
    loss: float
    images: int
    failed: bool = False
    stopped: bool = False


class Tally:
    """Sums over validation images for some networks. They stay on the device: one synchronisation at the end."""

    def __init__(self, networks: int, device: torch.device) -> None:
        self.correct = torch.zeros(networks, dtype=torch.float64, device=device)
        self._loss, self._finite = torch.zeros_like(self.correct), torch.ones_like(self.correct)
        self._images = [0] * networks

    def add(self, network: int, logits: Tensor, labels: Tensor) -> None:
        """Logits ``[N, classes]`` of one network and labels ``[N]``."""
        logits = logits.float()
        self.correct[network] += (logits.argmax(1) == labels).sum()
        self._loss[network] += functional.cross_entropy(logits, labels, reduction="sum")
        self._finite[network] *= logits.isfinite().all()
        self._images[network] += len(labels)

    def scores(self, total: int, sound: Sequence[bool]) -> list[Score]:
        """Scores, of that many images if a network was not stopped; whether all but its logits is finite."""
        correct, loss, finite = torch.stack((self.correct, self._loss, self._finite)).tolist()
        return [
            Score(right / images, sum_ / images, images, stopped=images < total)
            if ok and clean
            else Score(0.0, math.nan, images, failed=True)
            for right, sum_, ok, clean, images in zip(correct, loss, finite, sound, self._images, strict=True)
        ]


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels ``[N]`` that logits ``[N, classes]`` have no column for.

    Raises:
        InputError: naming the class.
    """
    lowest, highest = (int(label) for label in labels.aminmax())
    for label in (lowest, highest):
        if not 0 <= label < logits.shape[1]:
            raise InputError(f"labels: there is a class {label}; the network gives {logits.shape[1]} logits")
