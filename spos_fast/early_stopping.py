"""Early stopping of candidates that cannot be among the best, by an exact bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.scores import Score


class EarlyStopping:
    """Drops candidates that have hardly a chance to be among the ``keep`` best, before they have seen all images.

    The bar is the ``keep``-th best accuracy of the candidates that were completed in earlier calls; until there are as
    many, nothing is dropped. Images come in a random order that is the same for all candidates. After every batch but
    the last, a candidate is dropped if its number of right answers is less than what a network exactly at the bar has
    in so many images drawn without replacement, save for a chance of ``(1 - confidence) / looks`` (the lower tail of
    the hypergeometric distribution). A better network does worse with a smaller chance still. So, summed over all
    looks, a candidate that reaches the bar is dropped with a probability of at most ``1 - confidence``. Candidates see
    the same images, so their errors are not independent, but of m that reach the bar no more than
    ``m (1 - confidence)`` are dropped on average.

    The share of right answers of a stopped candidate is below the bar, so that ranking by accuracy does not put it
    among the ``keep`` best. A score depends on the bar and so on what was scored in earlier calls, but not on the other
    candidates of its call: it is the same on any number of ranks, and after resuming.

    Args:
        keep: how many of the best matter; for a search its ``top_k``.
        confidence: least probability with which a candidate that reaches the bar is completed; 0.5 or more.

    Raises:
        InputError: numbers out of range.
    """

    def __init__(self, keep: int, confidence: float = 0.99) -> None:
        if keep < 1:
            raise InputError(f"keep: got {keep}; expected a positive number")
        if not 0.5 <= confidence < 1:
            raise InputError(f"confidence: got {confidence:g}; expected 0.5 or more, below 1")
        self.keep, self.confidence = keep, confidence
        self._completed: dict[Architecture, float] = {}

    def learn(self, archs: Sequence[Architecture], scores: Sequence[Score]) -> None:
        """Take in the scores of a call; those of stopped candidates do not count. Known ones may come again."""
        for arch, score in zip(archs, scores, strict=True):
            if not score.stopped:
                self._completed[arch] = score.accuracy

    def forget(self) -> None:
        """Begin another search."""
        self._completed.clear()

    @property
    def bar(self) -> float | None:
        """Accuracy of the ``keep``-th best completed candidate; None until there are as many."""
        if len(self._completed) < self.keep:
            return None
        return sorted(self._completed.values(), reverse=True)[self.keep - 1]

    def alive(self, correct: Tensor, seen: int, total: int, looks: int) -> Tensor:
        """Which candidates go on.

        Args:
            correct: right answers of each so far, ``[n]``, any number type.
            seen: images so far.
            total: images in all.
            looks: how often candidates are looked at in all, this time included; shares out the chance of an error.

        Returns:
            bool ``[n]`` on the same device.
        """
        bar = self.bar
        if bar is None:
            return torch.ones_like(correct, dtype=torch.bool)
        return correct >= fewest_correct(round(bar * total), seen, total, (1 - self.confidence) / looks)


@lru_cache(maxsize=1024)
def fewest_correct(right: int, seen: int, total: int, chance: float) -> int:
    """The least number c such that at most c right answers have at least this chance.

    Args:
        right: images that the network gets right, of all.
        seen: images drawn from them without replacement.
        total: number of all images.
        chance: probability of the lower tail.
    """
    least, most = max(0, seen - (total - right)), min(seen, right)
    counts = torch.arange(least, most + 1, dtype=torch.float64)
    # The hypergeometric distribution: C(right, c) C(total - right, seen - c) / C(total, seen).
    log = _log_choose(right, counts) + _log_choose(total - right, seen - counts)
    log -= _log_choose(total, torch.tensor(seen))
    return least + int((log.exp().cumsum(0) < chance).sum())


def _log_choose(n: int, k: Tensor) -> Tensor:
    k = k.double()
    return torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
