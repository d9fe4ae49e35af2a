"""hash_cell against the rule written out a second time, and against real hashes."""

import csv
import gzip
import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spos_fast.errors import InputError
from spos_fast.nasbench import OPERATIONS, hash_cell

Matrix = list[list[int]]
C3, C1, POOL = OPERATIONS


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def plain_hash(matrix: Matrix, ops: list[str]) -> str | None:
    """The official rule in plain Python, with hashlib: prune by reachability, then rounds of neighbour hashes."""
    n = len(matrix)
    forwards, backwards = {0}, {n - 1}
    for _ in range(n):
        forwards |= {w for v in forwards for w in range(n) if matrix[v][w]}
        backwards |= {v for v in range(n) for w in backwards if matrix[v][w]}
    kept = sorted(forwards & backwards)
    if len(kept) < 2:
        return None
    edges = [[matrix[v][w] for w in kept] for v in kept]
    labels = [-1, *(OPERATIONS.index(ops[v]) for v in kept[1:-1]), -2]
    n = len(kept)
    hashes = [md5(str((sum(edges[v]), sum(row[v] for row in edges), labels[v]))) for v in range(n)]
    for _ in range(n):
        hashes = [
            md5(
                "".join(sorted(hashes[w] for w in range(n) if edges[w][v]))
                + "|"
                + "".join(sorted(hashes[w] for w in range(n) if edges[v][w]))
                + "|"
                + hashes[v]
            )
            for v in range(n)
        ]
    return md5(str(sorted(hashes)))


@st.composite
def cells(draw: st.DrawFn) -> tuple[Matrix, list[str]]:
    n = draw(st.integers(2, 9))
    matrix = [[draw(st.integers(0, 1)) if w > v else 0 for w in range(n)] for v in range(n)]
    return matrix, ["input", *(draw(st.sampled_from(OPERATIONS)) for _ in range(n - 2)), "output"]


@settings(max_examples=300, deadline=None)
@given(cells())
def test_random_cells(cell: tuple[Matrix, list[str]]) -> None:
    """Any cell, valid or not, hashes as the rule says."""
    assert hash_cell(*cell) == plain_hash(*cell)


@settings(max_examples=50, deadline=None)
@given(cells(), st.randoms())
def test_order_of_vertices_does_not_matter(cell: tuple[Matrix, list[str]], rng: random.Random) -> None:
    """Renaming the vertices between input and output, as long as edges still lead upwards, keeps the hash."""
    matrix, ops = cell
    n = len(ops)
    order: list[int] = [0]
    while len(order) < n - 1:  # a random topological order of the inner vertices
        free = [v for v in range(1, n - 1) if v not in order]
        ready = [v for v in free if not any(matrix[w][v] for w in free)]
        order.append(rng.choice(ready))
    order.append(n - 1)
    renamed = [[matrix[v][w] for w in order] for v in order]
    assert hash_cell(renamed, [ops[v] for v in order]) == hash_cell(matrix, ops)


def test_named_cells() -> None:
    """The smallest cell, and the Inception-like cell of the official README."""
    assert hash_cell([[0, 1], [0, 0]], ["input", "output"]) == "043721b9c7fe8c5fad811d47d83132ec"
    inception = [
        [0, 1, 1, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    ops = ["input", C1, C3, C3, C3, POOL, "output"]
    assert hash_cell(inception, ops) == "28cfc7874f6d200472e1a9dcd8650aa0"


def test_real_cells(shared_data: Path) -> None:
    """30,001 cells of the published benchmark have the hashes they were published under."""
    path = shared_data / "nasbench101" / "sample30001.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt") as file:
        rows = csv.reader(file)
        next(rows)
        count = 0
        for name, vertices, _, edges, inner, *_ in rows:
            n = int(vertices)
            matrix = np.array(list(map(int, edges))).reshape(n, n)
            ops = ["input", *(OPERATIONS[int(op)] for op in inner.split(",") if op), "output"]
            assert hash_cell(matrix, ops) == name
            count += 1
    assert count == 30001


@pytest.mark.parametrize("kind", [bool, np.int8, np.int64, np.uint8, np.float32, float])
def test_any_number_type(kind: type) -> None:
    """The type of the matrix does not change the hash (in the official code a float matrix silently does)."""
    matrix = [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    wanted = plain_hash(matrix, ["input", POOL, "output"])
    assert hash_cell(np.array(matrix).astype(kind), ["input", POOL, "output"]) == wanted
    assert hash_cell(np.asfortranarray(np.array(matrix).astype(kind)), ("input", POOL, "output")) == wanted


def test_no_path() -> None:
    """A cell whose output cannot be reached, and a single vertex, have no hash."""
    assert hash_cell([[0, 1, 0], [0, 0, 0], [0, 0, 0]], ["input", C3, "output"]) is None
    assert hash_cell([[0]], ["output"]) is None


@pytest.mark.parametrize(
    ("matrix", "ops", "message"),
    [
        ([[0, 1]], ["input", "output"], r"matrix must be square, got shape \[1, 2\]"),
        ([[0, 1], [0]], ["input", "output"], "matrix must be square, got rows of different lengths"),
        (5, ["input", "output"], r"matrix must be square, got shape \[\]"),
        ([[0, 2], [0, 0]], ["input", "output"], "matrix must hold zeros and ones only, got 2"),
        ([[0, 0.5], [0, 0]], ["input", "output"], "matrix must hold zeros and ones only, got 0.5"),
        ([[0, float("nan")], [0, 0]], ["input", "output"], "matrix must hold zeros and ones only, got nan"),
        ([["0", "1"], ["0", "0"]], ["input", "output"], "matrix must hold numbers"),
        ([[0, 1], [1, 0]], ["input", "output"], "upper triangular, got an edge from vertex 1 to vertex 0"),
        ([[1, 1], [0, 0]], ["input", "output"], "upper triangular, got an edge from vertex 0 to vertex 0"),
        ([[0, 1], [0, 0]], ["input", C3, "output"], "length of ops must match matrix dimensions: 2 vertices, got 3"),
        ([[0, 1], [0, 0]], [C3, "output"], "ops must start with 'input', got 'conv3x3-bn-relu'"),
        ([[0, 1], [0, 0]], ["input", C3], "ops must end with 'output', got 'conv3x3-bn-relu'"),
        (np.triu(np.ones((3, 3)), 1), ["input", "conv5x5", "output"], "must be one of conv3x3.*, got 'conv5x5'"),
        ([[0, 1], [0, 0]], "io", "ops must be a list of names, got 'io'"),
        ([[0, 1], [0, 0]], [0, 1], r"ops must be a list of names, got \[0, 1\]"),
        (np.zeros((0, 0)), [], "matrix must have 1 to 64 vertices, got 0"),
        (np.zeros((65, 65)), ["input"] * 65, "matrix must have 1 to 64 vertices, got 65"),
    ],
)
def test_errors(matrix: object, ops: object, message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(InputError, match=message) as caught:
        hash_cell(matrix, ops)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
