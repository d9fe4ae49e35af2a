"""A generation cut into parts that are scored side by side, by threads or by processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.spaces import Space


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
