"""The benchmark as one memory-mapped file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spos_fast import native
from spos_fast.errors import InputError
from spos_fast.nasbench.batch import checked_batch
from spos_fast.nasbench.cell import hash_cell

METRICS = ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy")


class Row(NamedTuple):
    """What a table knows of a cell apart from its training: the dataset's own graph, not the caller's."""

    adjacency: NDArray[np.int8]  # [V, V]
    ops: list[str]  # V names
    params: int  # trainable parameters


class Table:
    """NAS-Bench-101, converted once and then opened in milliseconds.

    A row is a cell; rows have the order in which cells first appear in the official file. Iterating gives their hashes.
    The file is mapped read-only, so processes share its memory. Every block is checked against its checksum when it is
    first read: a damaged file raises InputError and never gives a wrong number.

    Attributes:
        path: of the file.
        epochs: training lengths that there are records of, ascending; (108,) or (4, 12, 36, 108).
        repeats: most records of one cell and training length.
        records: how many records the table was made from.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._table = native.cells().Table(os.fspath(self.path))
        self.epochs: tuple[int, ...] = tuple(self._table.epochs)
        self.repeats: int = self._table.repeats
        self.records: int = self._table.records

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Table:
        """Open what :meth:`convert` wrote.

        Raises:
            InputError: there is no such file, it is no table, has another version, or its header is damaged.
        """
        return cls(path)

    @classmethod
    def convert(cls, tfrecord: str | os.PathLike[str], out: str | os.PathLike[str]) -> Table:
        """Make a table from an official tfrecord (nasbench_only108 or nasbench_full) and open it.

        Both checksums of every record are checked, and that each hash is that of its graph. Values are kept as float32,
        which is what the official file holds; a value that is none is refused. ``out`` appears whole or not at all; a
        file of that name is replaced. A file whose cells have unequal numbers of records, as one that was cut short
        between two records has, is converted with a RuntimeWarning.

        Raises:
            InputError: the tfrecord cannot be read or a record is wrong (named by its number from 0, its offset and the
                check), or ``out`` cannot be written.
        """
        native.cells().convert(os.fspath(tfrecord), os.fspath(out))
        table = cls(out)
        whole = len(table) * len(table.epochs) * table.repeats
        if table.records != whole:
            warnings.warn(
                f"{os.fspath(tfrecord)}: {table.records} records, where {table.repeats} of every one of {len(table)} "
                f"cells and {len(table.epochs)} training lengths would be {whole}; the file may be cut short",
                RuntimeWarning,
                stacklevel=2,
            )
        return table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        return (self._table.hash(row) for row in range(len(self)))

    def __contains__(self, hash: object) -> bool:
        return isinstance(hash, str) and self.find_hash(hash) is not None

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Table], tuple[Path]]:
        return type(self), (self.path,)

    def close(self) -> None:
        """Unmap the file. Arrays that were returned stay valid; asking the table again raises InputError."""
        self._table.close()

    def verify(self) -> None:
        """Check every block now.

        Raises:
            InputError: a block is damaged.
        """
        self._table.verify()

    def find(self, matrix: ArrayLike, ops: Sequence[str]) -> int | None:
        """The row of a cell, which is pruned first; None if the table does not hold it, or if it has no path.

        Args:
            matrix: [V, V] of zeros and ones, strictly upper triangular, V up to 64. An integer numpy array is quickest.
            ops: V names; a list is quickest.

        Raises:
            InputError: matrix or ops is not of this form, or the file is damaged.
        """
        row: int = self._table.find(matrix, ops)
        if row >= 0:
            return row
        if row == -1:
            return None
        hash = hash_cell(matrix, ops)  # the careful way: any type, any size, and what is wrong by name
        return None if hash is None else self.find_hash(hash)

    def find_hash(self, hash: str) -> int | None:
        """The row of the cell of that name; None if the table does not hold it."""
        row: int = self._table.find_hash(hash)
        return None if row < 0 else row

    def hash(self, row: int) -> str:
        """The hash of a row's cell."""
        name: str = self._table.hash(row)
        return name

    def row(self, row: int) -> Row:
        """The graph and the parameters of a row's cell.

        Raises:
            IndexError: there is no such row.
        """
        return Row(*self._table.cell(row))

    def repeats_of(self, row: int, epochs: int) -> int:
        """How many records of a row's cell there are for a training length."""
        count: int = self._table.repeats_of(row, epochs)
        return count

    def metrics(
        self, row: int, epochs: int = 108, repeat: int = 0, stop_halfway: bool = False
    ) -> tuple[float, float, float, float] | None:
        """(training seconds, train, validation, test accuracy) of one training; None if there is no such record."""
        found: tuple[float, float, float, float] | None = self._table.metrics(row, epochs, repeat, stop_halfway)
        return found

    def query(
        self, matrix: ArrayLike, ops: Sequence[str], epochs: int = 108, repeat: int = 0, stop_halfway: bool = False
    ) -> dict[str, Any]:
        """All about one training of one cell.

        Args:
            matrix: see :meth:`find`.
            ops: see :meth:`find`.
            epochs: one of ``epochs`` of the table.
            repeat: 0 is the first record of the cell in the file.
            stop_halfway: after half of the epochs.

        Returns:
            module_adjacency (int8 [V, V]), module_operations, trainable_parameters, training_time (seconds),
            train_accuracy, validation_accuracy, test_accuracy.

        Raises:
            InputError: matrix, ops or epochs is wrong, or there is no such repeat.
            KeyError: the table does not hold the cell.
        """
        self._check_epochs(epochs)
        row = self.find(matrix, ops)
        if row is None:
            raise KeyError(hash_cell(matrix, ops))
        return self.record(row, epochs, repeat, stop_halfway)

    def record(self, row: int, epochs: int = 108, repeat: int = 0, stop_halfway: bool = False) -> dict[str, Any]:
        """As :meth:`query`, for a row.

        Raises:
            InputError: there is no such record.
        """
        self._check_epochs(epochs)
        metrics = self.metrics(row, epochs, repeat, stop_halfway)
        if metrics is None:
            most = self.repeats_of(row, epochs)
            raise InputError(f"repeat must be less than the {most} records of this cell, got {repeat}")
        adjacency, ops, params = self._table.cell(row)
        return {
            "module_adjacency": adjacency,
            "module_operations": ops,
            "trainable_parameters": params,
            **dict(zip(METRICS, metrics, strict=True)),
        }

    def lookup(
        self,
        adjacency: ArrayLike,
        ops: ArrayLike,
        vertices: ArrayLike | None = None,
        epochs: int = 108,
        stop_halfway: bool = False,
    ) -> dict[str, NDArray]:
        """Many cells at once.

        Args:
            adjacency: uint8 [N, 7, 7], see :func:`spos_fast.nasbench.hash_cells`.
            ops: int8 [N, 7].
            vertices: [N], or None.
            epochs: one of ``epochs`` of the table.
            stop_halfway: after half of the epochs.

        Returns:
            rows int64 [N] (-1: the table does not hold the cell), params int32 [N] (0 there), and training_time,
            train_accuracy, validation_accuracy, test_accuracy float32 [N, repeats] (NaN where there is no record).

        Raises:
            InputError: an array or a cell is not of this form, there are no records of ``epochs``, or the file is
                damaged.
        """
        self._check_epochs(epochs)
        found: dict[str, NDArray] = self._table.lookup(*checked_batch(adjacency, ops, vertices), epochs, stop_halfway)
        return found

    def to_numpy(self) -> dict[str, NDArray]:
        """Everything, as arrays of their own, in the order of the rows.

        Returns:
            hashes S32 [N], adjacency uint8 [N, 7, 7], ops int8 [N, 7] (zero beyond the vertices), vertices int8 [N],
            params int32 [N], epochs int32 [E], and training_time (seconds), train_accuracy, validation_accuracy,
            test_accuracy float32 [N, E, R, 2]: R repeats in the order of the file, then halfway and final; NaN where a
            repeat is missing.

        Raises:
            InputError: the file is damaged.
        """
        arrays: dict[str, NDArray] = self._table.to_numpy()
        return arrays

    def _check_epochs(self, epochs: int) -> None:
        if epochs not in self.epochs:
            raise InputError(f"epochs must be one of {', '.join(map(str, self.epochs))}, got {epochs}")
