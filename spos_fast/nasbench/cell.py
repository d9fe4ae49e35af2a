"""One cell of NAS-Bench-101, as the user writes it: an adjacency matrix and a list of operations."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spos_fast import native
from spos_fast.errors import InputError

INPUT, OUTPUT = "input", "output"
OPERATIONS = ("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3")  # in the order of their labels 0, 1, 2


def hash_cell(matrix: ArrayLike, ops: Sequence[str]) -> str | None:
    """The hash that names a cell in NAS-Bench-101; the same for all cells that compute the same graph.

    The cell is first pruned to the vertices on a path from input to output, then hashed by the official rule
    (graph_util.hash_module and ModelSpec of google-research/nasbench), digit for digit.

    Args:
        matrix: [V, V] of zeros and ones (any numeric or bool type), strictly upper triangular; matrix[v][w] is the edge
            from vertex v to vertex w. Vertex 0 is the input, the last one the output.
        ops: V names: "input", then one of OPERATIONS a vertex, then "output".

    Returns:
        32 hexadecimal digits; None where no path leads from the input to the output.

    Raises:
        InputError: matrix or ops is not of this form.
        ImportError: the native module was not built.
    """
    adjacency = _checked_matrix(matrix)
    labels = _checked_labels(ops, len(adjacency))
    found: str | None = native.cells().hash_cell(adjacency, labels)
    return found


def _checked_matrix(matrix: ArrayLike) -> NDArray[np.uint8]:
    try:
        values = np.asarray(matrix)
    except ValueError:
        raise InputError("matrix must be square, got rows of different lengths") from None
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise InputError(f"matrix must be square, got shape {list(values.shape)}")
    most = native.cells().MAX_VERTICES
    if not 1 <= len(values) <= most:
        raise InputError(f"matrix must have 1 to {most} vertices, got {len(values)}")
    if values.dtype.kind not in "biuf":
        raise InputError(f"matrix must hold numbers, got dtype {values.dtype}")
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise InputError(f"matrix must hold zeros and ones only, got {wrong[0]}")
    below = np.argwhere(np.tril(values))
    if below.size:
        v, w = below[0]
        raise InputError(f"matrix must be upper triangular, got an edge from vertex {v} to vertex {w}")
    return values.astype(np.uint8)


def _checked_labels(ops: Sequence[str], vertices: int) -> list[int]:
    if isinstance(ops, str) or not all(isinstance(op, str) for op in ops):
        raise InputError(f"ops must be a list of names, got {ops!r}")
    if len(ops) != vertices:
        raise InputError(f"length of ops must match matrix dimensions: {vertices} vertices, got {len(ops)} ops")
    if ops[0] != INPUT and vertices > 1:
        raise InputError(f"ops must start with {INPUT!r}, got {ops[0]!r}")
    if ops[-1] != OUTPUT:
        raise InputError(f"ops must end with {OUTPUT!r}, got {ops[-1]!r}")
    for op in ops[1:-1]:
        if op not in OPERATIONS:
            raise InputError(f"ops between input and output must be one of {', '.join(OPERATIONS)}, got {op!r}")
    return [-1, *(OPERATIONS.index(op) for op in ops[1:-1]), -2][-vertices:]
