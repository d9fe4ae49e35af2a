"""Many cells at once, as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spos_fast import native
from spos_fast.errors import InputError

VERTICES = 7  # of the largest cell


def hash_cells(adjacency: ArrayLike, ops: ArrayLike, vertices: ArrayLike | None = None) -> list[str | None]:
    """The hashes that name many cells in NAS-Bench-101; see :func:`hash_cell` for the rule.

    Args:
        adjacency: uint8 [N, 7, 7] of zeros and ones, strictly upper triangular; a smaller cell lies in the first rows
            and columns, and the rest is zero.
        ops: int8 [N, 7]; -1 input, 0 conv3x3-bn-relu, 1 conv1x1-bn-relu, 2 maxpool3x3, -2 output. What stands behind a
            smaller cell is not read.
        vertices: [N], how many vertices each cell has; by default up to the first output in ``ops``.

    Returns:
        N hashes of 32 hexadecimal digits; None for a cell whose output cannot be reached from its input.

    Raises:
        InputError: an array has another shape or type, or a cell is not of this form (the message names it).
        ImportError: the native module was not built.
    """
    hashes: list[str | None] = native.cells().hash_cells(*checked_batch(adjacency, ops, vertices))
    return hashes


def checked_batch(
    adjacency: ArrayLike, ops: ArrayLike, vertices: ArrayLike | None
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.int32] | None]:
    """Arrays of the right shapes and types; what they hold is checked cell by cell in C++.

    Raises:
        InputError: an array has another shape, or its values do not fit the type.
    """
    matrices = _array("adjacency", adjacency, np.uint8, (-1, VERTICES, VERTICES))
    labels = _array("ops", ops, np.int8, (len(matrices), VERTICES))
    if vertices is None:
        return matrices, labels, None
    return matrices, labels, _array("vertices", vertices, np.int32, (len(matrices),))


def _array(name: str, values: ArrayLike, dtype: type, shape: tuple[int, ...]) -> NDArray:
    wanted = f"[{', '.join('N' if size < 0 else str(size) for size in shape)}]"
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{name} must have shape {wanted}, got rows of different lengths") from None
    if array.ndim != len(shape) or any(size not in (-1, got) for size, got in zip(shape, array.shape, strict=True)):
        raise InputError(f"{name} must have shape {wanted}, got {list(array.shape)}")
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "biu":
        raise InputError(f"{name} must hold whole numbers, got dtype {array.dtype}")
    limits = np.iinfo(dtype)
    wrong = array[(array < limits.min) | (array > limits.max)]
    if wrong.size:
        raise InputError(f"{name} must hold values of {limits.dtype}, got {wrong.flat[0]}")
    return np.ascontiguousarray(array, dtype=dtype)
