"""ModelSpec: pruning, hashing and messages as in the official code."""

import hashlib

import numpy as np
import pytest

from spos_fast.nasbench import OPERATIONS, hash_cell
from spos_fast.nasbench.model_spec import ModelSpec

C3, C1, POOL = OPERATIONS


@pytest.mark.parametrize(
    ("matrix", "ops", "message"),
    [
        ([[0, 1]], ["input", "output", C3], "matrix must be square"),
        ([0, 1], ["input", "output"], "matrix must be square"),
        ([[0, 1], [0]], ["input", "output"], "matrix must be square"),
        ([[0, 0], [1, 0]], ["input"], "length of ops must match matrix dimensions"),
        ([[0, 0], [1, 0]], ["input", "output"], "matrix must be upper triangular"),
        ([[1, 1], [0, 0]], ["input", "output"], "matrix must be upper triangular"),
    ],
)
def test_messages_and_their_order(matrix, ops, message) -> None:
    """The three official messages, checked in the official order."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        ModelSpec(matrix, ops)


def test_pruning() -> None:
    """Vertices that hang loose at either end go, with their operations; the originals stay, and nothing is shared with
    the caller."""
    matrix = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    ops = ["input", C1, C3, POOL, "output"]  # vertex 2 leads nowhere, vertex 3 is fed by nothing
    spec = ModelSpec(matrix, ops)
    assert spec.valid_spec
    assert spec.matrix.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert spec.ops == ["input", C1, "output"]
    assert spec.original_ops == ops
    assert spec.matrix.dtype == matrix.dtype
    matrix[0, 1] = 0
    ops[1] = C3
    assert spec.original_matrix[0, 1] == 1
    assert spec.original_ops[1] == C1
    assert ModelSpec(tuple(map(tuple, spec.original_matrix)), tuple(spec.original_ops)).ops == ["input", C1, "output"]


@pytest.mark.parametrize("matrix", [[[0]], [[0, 0], [0, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0]]])
def test_invalid(matrix) -> None:
    """Without a path there is no matrix, no ops and no hash."""
    spec = ModelSpec(matrix, ["input", C3, "output"][-len(matrix) :])
    assert not spec.valid_spec
    assert spec.matrix is None
    assert spec.ops is None
    with pytest.raises(TypeError):
        spec.hash_spec(OPERATIONS)


def test_hash() -> None:
    """The hash is that of the pruned cell; names of the ends do not count; a float matrix of whole numbers hashes as
    integers; an unknown operation is a ValueError; another order of the operations gives another hash."""
    matrix = [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    ops = ["input", POOL, "output"]
    wanted = hash_cell(matrix, ops)
    for kind in (int, bool, np.int8, np.uint8, float):
        assert ModelSpec(np.array(matrix, dtype=kind), ops).hash_spec(list(OPERATIONS)) == wanted
    assert ModelSpec(matrix, ["a", POOL, "b"]).hash_spec(OPERATIONS) == wanted
    assert ModelSpec(matrix, ops).hash_spec([POOL, C1, C3]) != wanted
    with pytest.raises(ValueError, match="conv9x9"):
        ModelSpec(matrix, ["input", "conv9x9", "output"]).hash_spec(OPERATIONS)
    with pytest.raises(ValueError, match="whole numbers"):
        ModelSpec([[0, 0.5], [0, 0]], ["input", "output"]).hash_spec(OPERATIONS)


def test_hash_of_what_the_engine_does_not_take() -> None:
    """An entry 2 counts twice in the degrees, as in the official code, and more than 64 vertices hash by the same
    rule."""

    def md5(text):
        return hashlib.md5(text.encode()).hexdigest()

    first, last = md5("(2, 0, -1)"), md5("(0, 2, -2)")
    for _ in range(2):
        first, last = md5(f"|{last}|{first}"), md5(f"{first}||{last}")
    wanted = md5(str(sorted([first, last])))
    assert ModelSpec([[0, 2], [0, 0]], ["input", "output"]).hash_spec(OPERATIONS) == wanted

    from spos_fast.nasbench.model_spec import _plain_hash

    chain = np.eye(64, k=1, dtype=int)
    labels = [-1, *[0] * 62, -2]
    assert _plain_hash(chain.tolist(), labels) == hash_cell(chain, ["input", *[C3] * 62, "output"])
    assert len(ModelSpec(np.eye(65, k=1, dtype=int), ["input", *[C3] * 63, "output"]).hash_spec(OPERATIONS)) == 32
