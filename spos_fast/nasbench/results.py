"""What is known about the cells of a benchmark file, as arrays: the input of the analysis and of the searches."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spos_fast.errors import InputError
from spos_fast.nasbench.graphs import SIZE, Genes, cells_of

if TYPE_CHECKING:
    from spos_fast.nasbench.table import Table

Floats = NDArray[np.float32]

CELLS = 423_624  # in the whole space
QUANTITIES = ("train", "validation", "test", "time")

# Columns of the CSV form: one line a cell, one repeat, the training time of the longest budget.
_COLUMNS = ("hash", "vertices", "edges", "adjacency_row_major", "interior_ops", "trainable_parameters")
_TIME, _ACCURACY = "train_time_", "val_acc_"


@dataclass(frozen=True, eq=False)
class CellResults:
    """Cells and what their trainings gave.

    Attributes:
        name: where they come from, for titles.
        hashes: 32 hexadecimal digits a cell.
        adjacency: uint8 ``[N, 7, 7]``; a smaller cell fills the first rows.
        ops: int8 ``[N, 7]``: -1 input, 0 conv3x3, 1 conv1x1, 2 maxpool3x3, -2 output.
        vertices: int8 ``[N]``.
        params: trainable parameters, int64 ``[N]``.
        epochs: budgets, ascending.
        train, validation, test: accuracies at the end of training, float32 ``[N, epochs, repeats]``, NaN where unknown.
        time: seconds of training, likewise.
    """

    name: str
    hashes: Sequence[str]
    adjacency: NDArray[np.uint8]
    ops: NDArray[np.int8]
    vertices: NDArray[np.int8]
    params: NDArray[np.int64]
    epochs: tuple[int, ...]
    train: Floats
    validation: Floats
    test: Floats
    time: Floats

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.hashes)

    @property
    def complete(self) -> bool:
        """Whether every cell of the space is there."""
        return len(self) == CELLS

    @property
    def repeats(self) -> int:
        """Trainings of every cell at every budget."""
        return int(self.validation.shape[2])

    def each(self, quantity: str, epochs: int | None = None) -> Floats:
        """``[N, repeats]`` of one of :data:`QUANTITIES` at a budget (the longest by default)."""
        budget = self.epochs.index(self.epochs[-1] if epochs is None else epochs)
        values: Floats = getattr(self, quantity)[:, budget]
        return values

    def mean(self, quantity: str, epochs: int | None = None) -> NDArray[np.float64]:
        """Mean over the known repeats of every cell: float64 ``[N]``, NaN where none is known."""
        values = self.each(quantity, epochs).astype(np.float64)
        known = np.isfinite(values)
        total = np.where(known, values, 0).sum(1)
        count = known.sum(1)
        return np.divide(total, count, out=np.full(len(self), np.nan), where=count > 0)

    def has(self, quantity: str, epochs: int | None = None) -> bool:
        """Whether any cell has that quantity at that budget."""
        return bool(np.isfinite(self.each(quantity, epochs)).any())

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of every hash."""
        return {name: row for row, name in enumerate(self.hashes)}

    def find(self, genes: Genes) -> NDArray[np.int64]:
        """Rows of cells in gene form (see :mod:`spos_fast.nasbench.graphs`): int64 ``[M]``, -1 where the cell is not
        there or outside the space.
        """
        from spos_fast.nasbench import hash_cells

        row_of = self.row_of
        return np.array([row_of.get(name or "", -1) for name in hash_cells(*cells_of(genes))], dtype=np.int64)


def read_results(path: str | Path) -> CellResults:
    """Read a converted table, an official tfrecord, or the CSV form (also gzipped).

    Raises:
        InputError: there is no such file, or it is none of these, or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError as error:
        raise InputError(f"{path}: could not be read ({error.strerror or error})") from None
    if begin[:2] == b"\x1f\x8b" or begin[:4] == b"hash":
        return _read_csv(path)
    from spos_fast.nasbench.opening import open_any

    return results_of(open_any(path), path.name)


def results_of(table: Table, name: str) -> CellResults:
    """The arrays of a table."""
    arrays = table.to_numpy()
    accuracy = {kind: arrays[f"{kind}_accuracy"][..., 1] for kind in ("train", "validation", "test")}
    return CellResults(
        name,
        [entry.decode() for entry in arrays["hashes"].tolist()],
        arrays["adjacency"],
        arrays["ops"],
        arrays["vertices"],
        arrays["params"].astype(np.int64),
        tuple(arrays["epochs"].tolist()),
        accuracy["train"],
        accuracy["validation"],
        accuracy["test"],
        arrays["training_time"][..., 1],
    )


def _read_csv(path: Path) -> CellResults:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: could not be read ({' '.join(str(error).split())})") from None
    rows = csv.reader(io.StringIO(text))
    cells: list[Any] = []
    try:
        header = next(rows, [])
        budgets = _csv_budgets(header)
        for row in rows:
            cells.append(_csv_cell(row, len(header)))
    except (ValueError, OverflowError, csv.Error) as error:
        raise InputError(f"{path}: line {max(rows.line_num, 1)}: {error}") from None
    if not cells:
        raise InputError(f"{path}: holds no cells")
    _check_hashes(path, cells)
    hashes, adjacency, ops, vertices, params, times, accuracies = zip(*cells, strict=True)
    shape = (len(cells), len(budgets), 1)
    unknown = np.full(shape, np.nan, dtype=np.float32)
    time = unknown.copy()
    time[:, -1, 0] = times
    return CellResults(
        path.name,
        hashes,
        np.array(adjacency, dtype=np.uint8),
        np.array(ops, dtype=np.int8),
        np.array(vertices, dtype=np.int8),
        np.array(params, dtype=np.int64),
        tuple(budgets),
        unknown,
        np.array(accuracies, dtype=np.float32).reshape(shape),
        unknown,
        time,
    )


def _csv_budgets(header: list[str]) -> list[int]:
    """Training lengths of the accuracy columns; ValueError if the columns are others, or in another order."""
    expected = f"expected the columns {', '.join(_COLUMNS)}, {_TIME}N_s, {_ACCURACY}N, ... with N ascending"
    known = [name.partition("(")[0] for name in header[: len(_COLUMNS)]]  # interior_ops names its operations
    timed, *accuracies = header[len(_COLUMNS) :] or [""]
    named = [name[len(_ACCURACY) :] for name in accuracies if name.startswith(_ACCURACY)]
    budgets = [int(budget) for budget in named if budget.isdecimal()]
    ascending = bool(budgets) and budgets == sorted(set(budgets)) and len(budgets) == len(accuracies)
    if known != list(_COLUMNS) or not ascending or timed != f"{_TIME}{budgets[-1]}_s":
        raise ValueError(expected)
    return budgets


def _check_hashes(path: Path, cells: list[Any]) -> None:
    """Every hash is that of its graph, and none comes twice."""
    from spos_fast.nasbench import hash_cells

    adjacency, ops, vertices = (np.array([cell[place] for cell in cells]) for place in (1, 2, 3))
    seen: set[str] = set()
    for line, (cell, name) in enumerate(zip(cells, hash_cells(adjacency, ops, vertices), strict=True), 2):
        if name is None or cell[0] != name:
            raise InputError(f"{path}: line {line}: hash {cell[0][:40]!r} is not that of the graph, {name}")
        if name in seen:
            raise InputError(f"{path}: line {line}: the cell {name} comes twice")
        seen.add(name)


def _csv_cell(row: list[str], wanted: int) -> tuple[Any, ...]:
    if len(row) != wanted:
        raise ValueError(f"has {len(row)} fields; expected {wanted}")
    name, vertices, _, edges, inner, params, time, *accuracies = row
    size = int(vertices)
    labels = [int(op) for op in inner.split(",") if op]
    if not 2 <= size <= SIZE or len(edges) != size * size or len(labels) != size - 2:
        raise ValueError(f"{vertices} vertices, {len(edges)} entries and {len(labels)} operations do not make a cell")
    if set(edges) - {"0", "1"} or set(labels) - {0, 1, 2}:
        raise ValueError("expected 0 and 1 in the matrix, and operations 0, 1 and 2")
    adjacency = np.zeros((SIZE, SIZE), dtype=np.uint8)
    adjacency[:size, :size] = np.frombuffer(edges.encode(), dtype=np.uint8).reshape(size, size) - ord("0")
    if np.tril(adjacency).any():
        raise ValueError("the matrix is not upper triangular")
    ops = [-1, *labels, -2] + [0] * (SIZE - size)
    values = [float(value) for value in accuracies]
    if any(value < 0 or value > 1 for value in values):  # NaN is unknown
        raise ValueError("an accuracy is not within 0 and 1")
    if not 0 < int(params) < 2**31 or float(time) < 0:
        raise ValueError(f"{params} parameters and {time} seconds of training are impossible")
    return name, adjacency, ops, size, int(params), float(time), values
