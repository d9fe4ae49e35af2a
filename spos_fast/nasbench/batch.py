"""Many cells at once, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

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


def count_parameters(adjacency: ArrayLike, ops: ArrayLike, vertices: ArrayLike | None = None) -> NDArray[np.int32]:
    """Trainable parameters of the CIFAR-10 networks of many cells, in closed form.

    Cells are pruned first. The number depends on the order of the vertices where output channels do not divide evenly
    among them (the first ones get one more), so an isomorphic cell may have a few parameters more or less.

    Args:
        adjacency: uint8 [N, 7, 7], see :func:`hash_cells`.
        ops: int8 [N, 7].
        vertices: [N], or None.

    Returns:
        int32 [N]; 0 for a cell whose output cannot be reached from its input.

    Raises:
        InputError: see :func:`hash_cells`.
        ImportError: the native module was not built.
    """
    counts: NDArray[np.int32] = native.cells().count_parameters(*checked_batch(adjacency, ops, vertices))
    return counts


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells as arrays.

    Attributes:
        hashes: S32 [N].
        adjacency: uint8 [N, 7, 7]; a smaller cell lies in the first rows and columns, and the rest is zero.
        ops: int8 [N, 7]; -1 input, 0 to 2 the operations, -2 output, and 0 behind the output.
        vertices: int8 [N].
        params: int32 [N], trainable parameters.
    """

    hashes: NDArray[np.bytes_]
    adjacency: NDArray[np.uint8]
    ops: NDArray[np.int8]
    vertices: NDArray[np.int8]
    params: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.hashes)


def enumerate_cells(vertices: int = VERTICES) -> Cells:
    """All 423,624 cells of NAS-Bench-101, each as the graph that the official enumeration meets first.

    The order is that of generate_graphs.py of google-research/nasbench, too: by vertices, then by edges as a number,
    then by operations. These are the graphs and the parameters that the published benchmark holds.

    Args:
        vertices: of the largest cells wanted, 2 to 7.

    Raises:
        InputError: another number of vertices.
        ImportError: the native module was not built.
    """
    if not 2 <= vertices <= VERTICES:
        raise InputError(f"vertices must be 2 to {VERTICES}, got {vertices}")
    return Cells(*native.cells().enumerate(vertices))


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
