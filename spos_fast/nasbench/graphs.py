"""Properties of many cells at once, and the cells around a cell, as numpy arrays.

Two forms of a cell are used. The *table's* form: ``adjacency`` uint8 ``[N, 7, 7]``, ``ops`` int8 ``[N, 7]`` and
``vertices`` ``[N]``, where a smaller cell fills the first rows. The *gene* form, int8 ``[N, 26]``, in which searches
and walks change cells: 21 edges (0 or 1) of a matrix of 7 vertices, row by row above the diagonal, then the labels of
the 5 inner vertices; vertices on no path from input to output do not count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.uint8]
Genes = NDArray[np.int8]

SIZE, MAX_EDGES = 7, 9
_ROWS, _COLUMNS = np.triu_indices(SIZE, 1)
EDGES = len(_ROWS)  # 21
CHOICES = np.array([2] * EDGES + [3] * (SIZE - 2), dtype=np.int8)  # values of every gene


def genes_of(adjacency: Cells, ops: NDArray[np.int8], vertices: NDArray[np.int8]) -> Genes:
    """Gene form of cells in the table's form; the unused vertices stand before the output, without edges."""
    count = np.arange(len(adjacency))
    moved, labels = adjacency.copy(), ops.copy()
    last = vertices.astype(np.intp) - 1
    smaller = last < SIZE - 1
    moved[smaller, :, SIZE - 1] = adjacency[count[smaller], :, last[smaller]]
    moved[count[smaller], :, last[smaller]] = 0
    inner = labels[:, 1:-1]
    inner[(inner < 0) | (np.arange(1, SIZE - 1) >= last[:, None])] = 0
    return np.concatenate((moved[:, _ROWS, _COLUMNS].astype(np.int8), inner), axis=1)


def cells_of(genes: Genes) -> tuple[Cells, NDArray[np.int8]]:
    """``adjacency`` uint8 ``[N, 7, 7]`` and ``ops`` int8 ``[N, 7]`` of cells in gene form, not pruned."""
    adjacency = np.zeros((len(genes), SIZE, SIZE), dtype=np.uint8)
    adjacency[:, _ROWS, _COLUMNS] = genes[:, :EDGES]
    ops = np.empty((len(genes), SIZE), dtype=np.int8)
    ops[:, 0], ops[:, 1:-1], ops[:, -1] = -1, genes[:, EDGES:], -2
    return adjacency, ops


def in_space(genes: Genes) -> NDArray[np.bool_]:
    """Whether a path leads from input to output and the pruned cell has at most 9 edges: bool ``[N]``."""
    edges = np.zeros((len(genes), SIZE, SIZE), dtype=bool)
    edges[:, _ROWS, _COLUMNS] = genes[:, :EDGES] != 0
    forward = np.zeros((len(genes), SIZE), dtype=bool)
    backward = forward.copy()
    forward[:, 0] = backward[:, -1] = True
    for vertex in range(1, SIZE):
        forward[:, vertex] = (forward & edges[:, :, vertex]).any(1)
    for vertex in range(SIZE - 2, -1, -1):
        backward[:, vertex] = (backward & edges[:, vertex]).any(1)
    kept = forward & backward
    count = (edges & kept[:, :, None] & kept[:, None, :]).sum((1, 2))
    return (count > 0) & (count <= MAX_EDGES)


def depth(adjacency: Cells, vertices: NDArray[np.int8]) -> NDArray[np.int64]:
    """Edges on the longest path from input to output: int64 ``[N]``."""
    longest = np.zeros((len(adjacency), SIZE), dtype=np.int64)
    for vertex in range(1, SIZE):
        longest[:, vertex] = np.where(adjacency[:, :, vertex] != 0, longest + 1, 0).max(1)
    return longest[np.arange(len(adjacency)), vertices.astype(np.intp) - 1]


def width(adjacency: Cells) -> NDArray[np.int64]:
    """Edges of the largest directed cut, one that no edge crosses backwards: int64 ``[N]``."""
    near = ((np.arange(2**SIZE)[:, None] >> np.arange(SIZE)) & 1).astype(np.float32)
    across = (near[:, :, None] * (1 - near[:, None, :])).reshape(len(near), -1)
    back = ((1 - near)[:, :, None] * near[:, None, :]).reshape(len(near), -1)
    out = np.empty(len(adjacency), dtype=np.int64)
    for start in range(0, len(adjacency), 16384):  # 128 cuts a cell: the products would take gigabytes at once
        flat = adjacency[start : start + 16384].reshape(-1, SIZE * SIZE).astype(np.float32)
        out[start : start + 16384] = np.where(flat @ back.T == 0, flat @ across.T, 0).max(1)
    return out


def op_counts(ops: NDArray[np.int8]) -> NDArray[np.int64]:
    """How often each operation occurs in a cell in the table's form: int64 ``[N, 3]``. Unused places must be 0 and
    beyond ``-2``.
    """
    inner = np.cumsum(ops == -2, axis=1) == 0
    return np.stack([((ops == label) & inner).sum(1) for label in range(3)], axis=1)


def random_genes(count: int, rng: np.random.Generator) -> Genes:
    """Cells as the official notebook draws them: every edge with probability 1/2, every operation uniformly; most are
    outside the space.
    """
    return rng.integers(0, CHOICES, (count, len(CHOICES)), dtype=np.int8)


def one_edit(genes: Genes, rng: np.random.Generator) -> Genes:
    """Cells one random edit away: an edge added or removed (21 edits), or an operation replaced (10 edits)."""
    count = np.arange(len(genes))
    edit = rng.integers(0, EDGES + 2 * (SIZE - 2), len(genes))
    place = np.where(edit < EDGES, edit, EDGES + (edit - EDGES) // 2)
    step = np.where(edit < EDGES, 1, 1 + (edit - EDGES) % 2)
    out = genes.copy()
    out[count, place] = (out[count, place] + step) % CHOICES[place]
    return out
