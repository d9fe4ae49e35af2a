"""ModelSpec: a cell as the official NAS-Bench-101 code takes it.

Behaves as ``nasbench.lib.model_spec.ModelSpec`` of google-research/nasbench, with these differences, each of them a
fault there: a float matrix of whole numbers hashes as the integers (there it names no cell); ``ops`` may be any
sequence (there a tuple fails as soon as a vertex is pruned); rows of different lengths are "not square".
"""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spos_fast import native
from spos_fast.nasbench.cell import INPUT, OUTPUT


class ModelSpec:
    """A cell, pruned to the vertices that lie on a path from the first vertex to the last.

    Attributes:
        original_matrix: the matrix as given, ``[V, V]``.
        original_ops: the operations as given.
        matrix: the pruned matrix, in the dtype that was given; None where no path leads from input to output.
        ops: the operations of the pruned vertices, a list; None likewise.
        valid_spec: whether there is such a path.
        data_format: kept for programs that pass it; no meaning here.
    """

    matrix: NDArray[Any]
    ops: list[str]

    def __init__(self, matrix: ArrayLike, ops: Sequence[str], data_format: str = "channels_last") -> None:
        """Prune a cell.

        Args:
            matrix: ``[V, V]``, strictly upper triangular; nonzero is an edge from the row's vertex to the column's.
            ops: V names; the first and the last are not looked at here.
            data_format: no meaning here.

        Raises:
            ValueError: ``matrix must be square``, ``length of ops must match matrix dimensions`` or ``matrix must be
                upper triangular``, in this order.
        """
        if not isinstance(matrix, np.ndarray):
            try:
                matrix = np.array(matrix)
            except ValueError:  # rows of different lengths
                raise ValueError("matrix must be square") from None
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError("matrix must be square")
        if len(matrix) != len(ops):
            raise ValueError("length of ops must match matrix dimensions")
        rows = matrix.tolist()
        if any(any(row[: index + 1]) for index, row in enumerate(rows)):
            raise ValueError("matrix must be upper triangular")
        self.original_matrix = matrix.copy()
        self.original_ops = copy.copy(ops)
        self.data_format = data_format
        kept = _kept_vertices(rows)
        self.valid_spec = len(kept) > 1
        if not self.valid_spec:
            self.matrix, self.ops = None, None  # type: ignore[assignment]  # as in the official code
        elif len(kept) == len(rows):
            self.matrix, self.ops = matrix.copy(), list(ops)
        else:
            self.matrix, self.ops = matrix[np.ix_(kept, kept)], [ops[vertex] for vertex in kept]

    def hash_spec(self, canonical_ops: Sequence[str]) -> str:
        """The hash that names the cell: 32 hexadecimal digits.

        Args:
            canonical_ops: names of the operations; an operation counts by its place among them. The names of the first
                and the last vertex do not count.

        Raises:
            ValueError: an operation is not among them.
            TypeError: no path leads from input to output.
        """
        if not self.valid_spec:
            raise TypeError("an invalid spec has no hash: no path leads from its input to its output")
        order = list(canonical_ops)
        labels = [-1, *(order.index(op) for op in self.ops[1:-1]), -2]
        matrix = whole_numbers(self.matrix)
        if len(labels) <= native.cells().MAX_VERTICES and not (matrix & ~1).any():
            found: str = native.cells().hash_cell(matrix.astype(np.uint8), labels)
            return found
        return _plain_hash(matrix.tolist(), labels)

    def visualize(self) -> Any:
        """The pruned cell as a ``graphviz.Digraph`` (needs the package graphviz).

        Raises:
            ImportError: graphviz is not installed.
            TypeError: no path leads from input to output.
        """
        if not self.valid_spec:
            raise TypeError("an invalid spec cannot be drawn: no path leads from its input to its output")
        drawing = importlib.import_module("graphviz").Digraph()
        for vertex, name in enumerate([INPUT, *self.ops[1:-1], OUTPUT]):
            drawing.node(str(vertex), name)
        for source, target in np.argwhere(self.matrix):
            drawing.edge(str(source), str(target))
        return drawing


def whole_numbers(matrix: NDArray[Any]) -> NDArray[np.int64]:
    """``matrix`` as int64; a ValueError if it holds anything but whole numbers."""
    numbers = matrix.astype(np.int64)
    if not np.array_equal(numbers, matrix):
        raise ValueError("matrix must hold whole numbers")
    return numbers


def _kept_vertices(rows: list[list[Any]]) -> list[int]:
    """Vertices on a path from the first to the last one, ascending; fewer than two if there is no path."""
    last = len(rows) - 1
    forward, backward = {0}, {last}
    for vertex in range(1, last + 1):
        if any(rows[source][vertex] for source in forward):
            forward.add(vertex)
    for vertex in range(last - 1, -1, -1):
        if any(rows[vertex][target] for target in backward):
            backward.add(vertex)
    return sorted(forward & backward)


def _plain_hash(matrix: list[list[int]], labels: list[int]) -> str:
    """The official rule (graph_util.hash_module) for what the engine does not take: more than 64 vertices, and entries
    other than 0 and 1, which count as often as they say in the degrees.
    """

    def md5(text: str) -> str:
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()

    vertices = range(len(labels))
    hashes = [md5(str((sum(matrix[v]), sum(row[v] for row in matrix), labels[v]))) for v in vertices]
    for _ in vertices:
        hashes = [
            md5(
                f"{''.join(sorted(hashes[w] for w in vertices if matrix[w][v]))}|"
                f"{''.join(sorted(hashes[w] for w in vertices if matrix[v][w]))}|{hashes[v]}"
            )
            for v in vertices
        ]
    return md5(str(sorted(hashes)))
