"""Scoring across processes: every rank scores a part of a generation, and all get all scores."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.distributed import Exchange
from spos_fast.errors import RankError
from spos_fast.evaluation import Score
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


def share_out(archs: Sequence[Architecture], parts: int, space: Space | None = None) -> list[list[int]]:
    """Cut a generation into contiguous parts of its order by genes, the most expensive one as cheap as can be.

    An architecture costs the layers that it does not share with the one before it, and the head. The first of a part
    costs all its layers.

    Args:
        archs: the generation.
        parts: how many parts; the last ones are empty if fewer are as good.
        space: gives the MACs of every layer; None: every gene costs the same.

    Returns:
        For every part indices into ``archs``; every index occurs once.
    """
    if not archs:
        return [[] for _ in range(parts)]
    order = sorted(range(len(archs)), key=lambda number: archs[number].genes)
    whole, new = _costs(np.array([archs[number].genes for number in order]), space)

    def cut(limit: int) -> list[list[int]]:
        """Parts that cost no more than ``limit`` each, filled one after the other."""
        out: list[list[int]] = []
        cost = 0
        for number, all_layers, new_layers in zip(order, whole, new, strict=True):
            if out and cost + new_layers <= limit:
                cost += new_layers
                out[-1].append(number)
            else:
                cost = all_layers
                out.append([number])
        return out

    # An architecture never costs more as the first of a part than with one before it, so filling parts up is best, and
    # the least limit that gives few enough parts is found by bisection.
    low, high = max(whole), sum(whole)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= parts else (middle + 1, high)
    best = cut(low)
    return best + [[] for _ in range(parts - len(best))]


def _costs(genes: np.ndarray, space: Space | None) -> tuple[list[int], list[int]]:
    """What every row costs alone, and after the row before it: integers ``[n, genes]`` in sorted order to two lists."""
    if space is None:
        head, layers, costs = 1, np.arange(genes.shape[1]), np.ones_like(genes)
    else:
        table = space.cost_tables["macs"]
        head = table.fixed
        layers = np.repeat(np.arange(len(table.layers)), [layer.ndim for layer in table.layers])
        costs = np.stack(
            [layer[tuple(genes[:, layers == number].T)] for number, layer in enumerate(table.layers)], axis=1
        )
    whole = head + costs.sum(1)
    differs = genes[1:] != genes[:-1]
    # The layer of the first gene that differs; past the last one for a row that is the same once more.
    first = np.where(differs.any(1), layers[differs.argmax(1)], costs.shape[1])
    own = np.where(np.arange(costs.shape[1]) >= first[:, None], costs[1:], 0).sum(1)
    new = [int(whole[0]), *(own + head * differs.any(1)).tolist()]
    return whole.tolist(), new
