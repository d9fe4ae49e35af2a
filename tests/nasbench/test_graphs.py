"""Properties of cells as arrays, against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spos_fast.nasbench import graphs, hash_cells
from spos_fast.nasbench.results import CellResults


def paths(matrix: np.ndarray, vertex: int, last: int) -> list[int]:
    """Lengths of all paths from a vertex to the last."""
    if vertex == last:
        return [0]
    return [1 + rest for target in np.flatnonzero(matrix[vertex]) for rest in paths(matrix, target, last)]


def test_depth_and_width(small_space: CellResults) -> None:
    """Depth is the longest of all paths; width the most edges that leave a set of vertices into which none leads."""
    depth = graphs.depth(small_space.adjacency, small_space.vertices)
    width = graphs.width(small_space.adjacency)
    for row in range(0, len(small_space), 20):
        vertices = int(small_space.vertices[row])
        matrix = small_space.adjacency[row, :vertices, :vertices].astype(int)
        assert depth[row] == max(paths(matrix, 0, vertices - 1))
        cuts = []
        for inside in itertools.product((False, True), repeat=vertices):
            near = np.array(inside)
            if not matrix[~near][:, near].any():
                cuts.append(matrix[near][:, ~near].sum())
        assert width[row] == max(cuts)


def test_genes_keep_the_cell(small_space: CellResults) -> None:
    """A cell in gene form is the same cell, by its hash, and in the space."""
    genes = graphs.genes_of(small_space.adjacency, small_space.ops, small_space.vertices)
    assert hash_cells(*graphs.cells_of(genes)) == list(small_space.hashes)
    assert graphs.in_space(genes).all()


def test_in_space() -> None:
    """Random cells: in the space exactly if they have a hash and at most 9 edges after pruning by ModelSpec."""
    from spos_fast.nasbench.model_spec import ModelSpec

    genes = graphs.random_genes(500, np.random.default_rng(1))
    adjacency, ops = graphs.cells_of(genes)
    wanted = []
    for matrix, labels in zip(adjacency, ops, strict=True):
        spec = ModelSpec(matrix.astype(int), labels.tolist())
        wanted.append(spec.valid_spec and spec.matrix.sum() <= 9)
    assert graphs.in_space(genes).tolist() == wanted
    assert 0 < sum(wanted) < 500


def test_one_edit() -> None:
    """One gene changes, every edit occurs, and about equally often."""
    genes = np.zeros((31_000, 26), dtype=np.int8)
    changed = graphs.one_edit(genes, np.random.default_rng(2))
    assert ((changed != genes).sum(1) == 1).all()
    edges = (changed[:, : graphs.EDGES] == 1).sum(0)
    ops = [(changed[:, graphs.EDGES :] == label).sum(0) for label in (1, 2)]
    counts = np.concatenate([edges, *ops])
    assert len(counts) == 31
    assert counts == pytest.approx(1000, abs=200)
