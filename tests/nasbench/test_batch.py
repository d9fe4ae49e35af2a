"""Hashes and parameters of many cells, and the enumeration of all, against what was published."""

import csv
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spos_fast.errors import InputError
from spos_fast.nasbench import Cells, count_parameters, enumerate_cells, hash_cells


@pytest.fixture(scope="module")
def space() -> Cells:
    return enumerate_cells()


def test_all_cells(space: Cells) -> None:
    """The 423,624 hashes are those of the official enumeration, known by their digest; sizes, range and mean too."""
    hashes = space.hashes.tolist()
    assert len(space) == len(set(hashes)) == 423624
    digest = hashlib.sha256(b"".join(hash + b"\n" for hash in sorted(hashes))).hexdigest()
    assert digest == "53e1438d11675d9eb3899166c29ca07fe0c4b81af9d99d5aec3ecd31bd5bca7f"
    assert np.bincount(space.vertices).tolist() == [0, 0, 1, 6, 84, 2441, 62010, 359082]
    assert (space.params.min(), space.params.max()) == (227274, 49979274)
    assert space.params.mean() == pytest.approx(8459761.9, abs=0.05)
    assert space.hashes[0] == b"043721b9c7fe8c5fad811d47d83132ec"  # input -> output comes first
    assert hash_cells(space.adjacency, space.ops, space.vertices) == [hash.decode() for hash in hashes]
    np.testing.assert_array_equal(count_parameters(space.adjacency, space.ops, space.vertices), space.params)


def test_real_cells(space: Cells, shared_data: Path) -> None:
    """30,001 cells of the published benchmark: our graph, operations and parameters are the dataset's."""
    path = shared_data / "nasbench101" / "sample30001.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    index = {hash.decode(): i for i, hash in enumerate(space.hashes.tolist())}
    with gzip.open(path, "rt") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 30001
    for name, vertices, edges, matrix, inner, params, *_ in rows:
        i, n = index[name], int(vertices)
        assert space.vertices[i] == n
        assert "".join(map(str, space.adjacency[i, :n, :n].ravel().tolist())) == matrix
        assert matrix.count("1") == int(edges)
        assert ",".join(map(str, space.ops[i, 1 : n - 1].tolist())) == inner
        assert space.params[i] == int(params)


def batch() -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """input -> conv3x3 -> output; the same with a vertex on no path; and one without a path."""
    adjacency = np.zeros((3, 7, 7), np.uint8)
    adjacency[0, 0, 1] = adjacency[0, 1, 2] = 1
    adjacency[1, 0, 1] = adjacency[1, 1, 3] = adjacency[1, 0, 2] = 1
    adjacency[2, 0, 1] = 1
    ops = np.array([[-1, 0, -2, 0, 0, 0, 0], [-1, 0, 2, -2, 0, 0, 0], [-1, 0, -2, 0, 0, 0, 0]], np.int8)
    return adjacency, ops


def test_pruning_and_invalid_cells() -> None:
    """Cells are pruned first; one without a path has no hash and no parameters; sizes may be given or found."""
    adjacency, ops = batch()
    hashes = hash_cells(adjacency, ops)
    assert hashes[0] == hashes[1] is not None
    assert hashes[2] is None
    assert hash_cells(adjacency, ops, [3, 4, 3]) == hashes
    assert hash_cells(adjacency.astype(np.int64).tolist(), ops.tolist()) == hashes
    assert hash_cells(np.asfortranarray(adjacency), ops[:, ::-1][:, ::-1]) == hashes
    assert hash_cells(adjacency[:0], ops[:0]) == []
    params = count_parameters(adjacency, ops)
    assert params[0] == params[1] > 0 == params[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, o, v: (a[0], o, v), r"adjacency must have shape \[N, 7, 7\], got \[7, 7\]"),
        (lambda a, o, v: (a[:, :6], o, v), r"adjacency must have shape \[N, 7, 7\], got \[3, 6, 7\]"),
        (lambda a, o, v: (a, o[:2], v), r"ops must have shape \[3, 7\], got \[2, 7\]"),
        (lambda a, o, v: (a, o, v[:2]), r"vertices must have shape \[3\], got \[2\]"),
        (lambda a, o, v: (a * 1.0, o, v), "adjacency must hold whole numbers, got dtype float64"),
        (lambda a, o, v: (a * 300, o, v), "adjacency must hold values of uint8, got 300"),
        (lambda a, o, v: ([[1], [1, 2]], o, v), "adjacency must have shape .*, got rows of different lengths"),
        (lambda a, o, v: (a * 2, o, v), "cell 0: adjacency must hold zeros and ones only"),
        (lambda a, o, v: (a.swapaxes(1, 2), o, v), "cell 0: adjacency must be upper triangular"),
        (lambda a, o, v: (a, o, [3, 8, 3]), "cell 1: vertices must be 1 to 7"),
        (lambda a, o, v: (a, o, [3, 4, 0]), "cell 2: vertices must be 1 to 7"),
        (lambda a, o, v: (a, o, [3, 3, 3]), "cell 1: adjacency must be upper triangular, and zero beyond"),
        (lambda a, o, v: (a, o + 1, v), "cell 0: ops must end with -2"),
        (lambda a, o, v: (a, np.where(o == -1, 0, o), v), "cell 0: ops must start with -1"),
        (lambda a, o, v: (a, np.where(o == 0, 3, o), v), "cell 0: ops between input and output must be 0, 1 or 2"),
    ],
)
def test_errors(change, message: str) -> None:
    """A mistake is named in one line, with the cell it is in."""
    arguments = change(*(array.astype(np.int64) for array in batch()), np.array([3, 4, 3]))
    with pytest.raises(InputError, match=message):
        hash_cells(*arguments)
