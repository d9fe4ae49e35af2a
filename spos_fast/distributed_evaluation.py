"""Scoring across processes: every rank scores a part of a generation, and all get all scores."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

from spos_fast.architecture import Architecture
from spos_fast.distributed import Exchange
from spos_fast.errors import RankError
from spos_fast.scores import Score
from spos_fast.sharing import share_out
from spos_fast.spaces import Space


class DistributedEvaluator:
    """Shares out architectures to the ranks of a ``torchrun`` job; called like the evaluator that it wraps.

    All ranks call it with the same architectures and get the same scores, in the given order: those that one process
    would get, bit for bit on the CPU. A rank gets neighbours in the order of their genes, so that shared prefixes are
    computed by one rank; the parts are cut so that the most expensive one costs as little as can be. With one process
    it calls the evaluator.

    Args:
        evaluator: scores this rank's part, e.g. a :class:`spos_fast.Evaluator`; every rank has the same weights and
            images. Its ``early_stopping``, if it has one, learns the scores of all ranks.
        space: weighs the parts by the MACs of their layers; without it all layers weigh the same.
        exchange: connection to the other ranks; default one of its own.
    """

    def __init__(
        self,
        evaluator: Callable[[Sequence[Architecture]], Sequence[Score]],
        *,
        space: Space | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.evaluator, self.space = evaluator, space
        self.exchange = exchange or Exchange()

    def __call__(self, archs: Sequence[Architecture]) -> list[Score]:
        """Scores of the architectures, in their order. Collective: all ranks call it.

        Raises:
            RankError: another rank is gone, its evaluator failed, or it was asked for something else; names it.
        """
        parts = share_out(archs, self.exchange.size, self.space)
        mine = [archs[number] for number in parts[self.exchange.rank]]
        try:
            scores = self.evaluator(mine) if mine else []
        except BaseException as error:
            self.exchange.fail(error)
            raise
        asked = zlib.crc32(repr([arch.genes for arch in archs]).encode())
        answers = self.exchange.all_gather({"asked": asked, "scores": [dataclasses.asdict(s) for s in scores]})
        for rank, answer in enumerate(answers):
            if answer["asked"] != asked:
                raise RankError(f"ranks {rank} and {self.exchange.rank} were asked for different architectures")
        by_number = {
            number: Score(**row)
            for part, answer in zip(parts, answers, strict=True)
            for number, row in zip(part, answer["scores"], strict=True)
        }
        result = [by_number[number] for number in range(len(archs))]
        early_stopping = getattr(self.evaluator, "early_stopping", None)
        if early_stopping is not None:
            early_stopping.learn(archs, result)  # the evaluator itself knows this rank's part only
        return result
