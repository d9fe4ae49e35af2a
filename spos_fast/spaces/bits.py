"""Pairs of bit-widths as choices of a search: their names, and their places in the layers' lists of bit-widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from spos_fast.errors import InputError

# Bits of the weights and bits of the activations.
Bits = tuple[int, int]
MOST_BITS = 8


def bit_names(pairs: Iterable[Bits]) -> tuple[str, ...]:
    """``(1, 2)`` as ``1W2A``, as in the paper."""
    return tuple(f"{weights}W{activations}A" for weights, activations in pairs)


def named_bits(setting: str, names: Iterable[str]) -> tuple[Bits, ...]:
    """Pairs from their names.

    Args:
        setting: what the names were given for, for the message.
        names: such as ``1W2A``.

    Raises:
        InputError: a text that is no such name.
    """
    pairs = []
    for name in names:
        match = re.fullmatch(r"(\d)W(\d)A", name, re.IGNORECASE)
        if match is None:
            raise InputError(f"{setting}: got {name!r}; expected bits of weights and activations such as 3W4A")
        pairs.append((int(match[1]), int(match[2])))
    return tuple(pairs)


def bit_pairs(setting: str, pairs: Sequence[Any]) -> tuple[Bits, ...]:
    """The pairs as a tuple.

    Raises:
        InputError: no pairs of two integers from 1 to 8, or one of them twice.
    """
    found: list[Bits] = []
    for pair in pairs:
        whole = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(bits) is int for bits in pair)
        if not whole or not all(1 <= bits <= MOST_BITS for bits in pair):
            raise InputError(
                f"{setting}: got {pair!r}; expected pairs (bits of weights, bits of activations), 1 to {MOST_BITS} each"
            )
        if tuple(pair) in found:
            raise InputError(f"{setting}: {bit_names([pair])[0]} is there twice")
        found.append((pair[0], pair[1]))
    if setting == "bits" and not found:
        raise InputError("bits: got none; expected at least one pair")
    return tuple(found)


def candidates_of(pairs: Sequence[Bits]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """What a layer that runs with any of the pairs is made with, and called with.

    Returns:
        The different bits of weights and those of activations, ascending; for every pair its index in either.
    """
    weights = tuple(sorted({pair[0] for pair in pairs}))
    activations = tuple(sorted({pair[1] for pair in pairs}))
    return weights, activations, tuple((weights.index(w), activations.index(a)) for w, a in pairs)
