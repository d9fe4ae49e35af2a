"""Cells of NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326): their strings, and which of them are isomorphic.

A cell has four nodes. Every node is the sum of what the nodes before it give through one operation an edge: six edges,
and so six genes, each an index into the operations of the space. Imports no torch.

The official index of a cell follows no rule (the official file lists them in a shuffled order), so an index is looked
up in a table.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from spos_fast.errors import InputError

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# (from, to) of every gene, in the order of the official strings.
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
NODES = 4


def cell_string(genes: Sequence[int], ops: Sequence[str] = OPS) -> str:
    """The official string of a cell, ``"|avg_pool_3x3~0|+|none~0|skip_connect~1|+|...~0|...~1|...~2|"``.

    Args:
        genes: an index into ``ops`` for every edge.
        ops: operations of the space.

    Raises:
        InputError: not six genes, or one that is no index into ``ops``.
    """
    names = _names(genes, ops)
    groups = [
        [f"|{name}~{source}" for name, (source, target) in zip(names, EDGES, strict=True) if target == node]
        for node in range(1, NODES)
    ]
    return "+".join("".join(group) + "|" for group in groups)


def cell_genes(text: str, ops: Sequence[str] = OPS) -> tuple[int, ...]:
    """The genes of a cell from its official string.

    Args:
        text: as :func:`cell_string` writes it.
        ops: operations of the space.

    Raises:
        InputError: no such string, or an operation that is not in ``ops``.
    """
    expected = "expected such as '|none~0|+|none~0|none~1|+|none~0|none~1|none~2|'"
    if not isinstance(text, str):
        raise InputError(f"cell: got {text!r}; {expected}")
    found = re.findall(r"\|([^|~+]+)~(\d)", text)
    known = {name: index for index, name in enumerate(ops)}
    for name, _ in found:
        if name not in known:
            raise InputError(f"cell: {name!r} is not an operation of the space; expected one of {', '.join(ops)}")
    if len(found) != len(EDGES):
        raise InputError(f"cell: got {text!r}; {expected}")
    genes = tuple(known[name] for name, _ in found)
    if cell_string(genes, ops) != text:
        raise InputError(f"cell: got {text!r}; {expected}")
    return genes


def isomorphism_key(genes: Sequence[int], ops: Sequence[str] = OPS) -> str:
    """A string that isomorphic cells share: the benchmark's "unique string" (6,466 of them over the full space).

    A node is written as the sorted sum of its inputs, ``skip_connect`` as the input itself, and ``none``, or anything
    of a node that is nothing but one ``none``, as ``#`` (``to_unique_str(consider_zero=True)`` of the official code,
    github.com/D-X-Y/NAS-Bench-201). Cells of one class compute the same function. The converse does not hold: sums of
    sums are not flattened and sums with ``#`` stay apart, else there were 4,930 classes.

    Args:
        genes: an index into ``ops`` for every edge.
        ops: operations of the space.

    Raises:
        InputError: not six genes, or one that is no index into ``ops``.
    """
    terms: list[list[str]] = [[] for _ in range(NODES)]
    written = ["0"] + [""] * (NODES - 1)
    for name, (source, target) in zip(_names(genes, ops), EDGES, strict=True):
        # Edges into a node come after all edges into its inputs.
        written[source] = "+".join(sorted(terms[source])) or "0"
        zero = name == "none" or written[source] == "#"
        plain = written[source] if name == "skip_connect" else f"({written[source]})@{name}"
        terms[target].append("#" if zero else plain)
    return "+".join(sorted(terms[-1]))


def isomorphism_classes(ops: Sequence[str] = OPS) -> list[list[tuple[int, ...]]]:
    """All cells over ``ops`` by class, in ascending order of their genes: members, and classes by their first one.

    Takes about 0.2 s for the full space.
    """
    classes: dict[str, list[tuple[int, ...]]] = {}
    for genes in itertools.product(range(len(ops)), repeat=len(EDGES)):
        classes.setdefault(isomorphism_key(genes, ops), []).append(genes)
    return list(classes.values())


def _names(genes: Sequence[int], ops: Sequence[str]) -> list[str]:
    """The operation of every edge."""
    genes = tuple(genes)
    if len(genes) != len(EDGES) or not all(0 <= gene < len(ops) for gene in genes):
        raise InputError(f"cell: got genes {genes}; expected {len(EDGES)} of 0 to {len(ops) - 1}, one for every edge")
    return [ops[gene] for gene in genes]
