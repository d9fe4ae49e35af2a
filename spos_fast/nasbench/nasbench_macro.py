"""NAS-Bench-Macro (Su et al. 2021, arXiv 2103.11922; github.com/xiusu/NAS-Bench-Macro) as a table. Imports no torch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.nasbench.architecture_table import ArchitectureTable, Reference, shares

BLOCKS = ("identity", "MB3_K3", "MB6_K5")
LAYERS = 8
TRAININGS = 3


class NASBenchMacro(ArchitectureTable):
    """All 6,561 networks of NAS-Bench-Macro on CIFAR-10, each trained three times.

    Opened from the official ``nas-bench-macro_cifar10.json`` (``{"01201201": {"test_acc": [3 values], "mean_acc": ...,
    "std": ..., "params": ..., "flops": ...}}``) or from a CSV file with the columns arch, acc0, acc1, acc2, params,
    flops. Rows have the order of the file. Networks that differ only in where identities stand behind the first layer
    of a stage compute the same, and the official file gives them the same numbers.

    Attributes:
        BLOCKS: names of the blocks; a gene, and a digit of the official string, is an index into them.
        path: of the file.
        trainings: float64 [N, 3], test accuracy of each training.
    """

    layout: ClassVar[dict[str, Any]] = {"stage_repeats": (2, 3, 3)}
    space: ClassVar[str] = "nasbench_macro"
    choices: ClassVar[tuple[tuple[str, ...], ...]] = (BLOCKS,) * LAYERS
    BLOCKS: ClassVar[tuple[str, ...]] = BLOCKS

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file.

        Raises:
            InputError: it cannot be read, or holds something else.
        """
        self.path, self.datasets = Path(path), ("cifar10",)
        try:
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"table: {self.path} could not be read ({error})") from None
        try:
            rows = _json_rows(text) if text.lstrip()[:1] == "{" else _csv_rows(text)
            genes = np.array([self.parse(name) for name, *_ in rows], dtype=np.int64).reshape(-1, LAYERS)
            params, flops = (np.array([row[at] for row in rows], dtype=np.int64) for at in (2, 3))
            super().__init__(genes, params, flops)
            self.trainings = shares([row[1] for row in rows], "test_acc")
        except InputError as error:
            raise InputError(f"table: {self.path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"table: {self.path} is neither the official JSON nor a CSV file with the columns arch, acc0, acc1, "
                f"acc2, params, flops ({type(error).__name__}: {error})"
            ) from None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> NASBenchMacro:
        """The same as the constructor.

        Raises:
            InputError: see there.
        """
        return cls(path)

    def accuracies(self) -> NDArray[np.float64]:
        """Mean test accuracy of every network over its three trainings, float64 [N]."""
        # Summed one by one: the mean over an axis of three depends on how numpy groups the additions.
        mean: NDArray[np.float64] = (self.trainings[:, 0] + self.trainings[:, 1] + self.trainings[:, 2]) / TRAININGS
        return mean

    def accuracy(self, arch: Architecture | Sequence[int] | str | int) -> float:
        """Mean test accuracy of one network, see :meth:`index`.

        Raises:
            InputError: the table does not hold it.
        """
        return float(self.accuracies()[self.index(arch)])

    def truth(self, dataset: str | None = None) -> NDArray[np.float64]:
        """Mean test accuracy over three trainings, float64 [N].

        Raises:
            InputError: the table has no such data set.
        """
        self._dataset(dataset)
        return self.accuracies()

    def references(self, dataset: str | None = None) -> tuple[Reference, ...]:
        """Parameters, FLOPs, and, as the ceiling, one training against the mean of the other two.

        Raises:
            InputError: the table has no such data set.
        """
        true = self.truth(dataset)
        others = (self.trainings[:, 1] + self.trainings[:, 2]) / 2
        return (
            Reference("parameters", self.params.astype(np.float64), true),
            Reference("FLOPs", self.flops.astype(np.float64), true),
            Reference("ceiling: one training, against the other two", self.trainings[:, 0], others),
        )

    def parse(self, text: str) -> tuple[int, ...]:
        """The genes of an official string of eight digits, such as ``"01201201"``.

        Raises:
            InputError: no such string.
        """
        if not isinstance(text, str) or len(text) != LAYERS or set(text) - {"0", "1", "2"}:
            raise InputError(f"architecture: got {text!r}; expected {LAYERS} digits of 0 to {len(BLOCKS) - 1}")
        return tuple(map(int, text))

    def string(self, index: int) -> str:
        """The official string of a row's network.

        Raises:
            InputError: there is no such row.
        """
        return "".join(map(str, self.genes[self.index(index)].tolist()))


# Of one network: its string, test accuracies in percent, parameters, multiply-accumulates.
_Row = tuple[str, list[float], int, int]


def _json_rows(text: str) -> list[_Row]:
    content: dict[str, Any] = json.loads(text)
    return [
        (name, _trainings(entry["test_acc"]), int(entry["params"]), int(entry["flops"]))
        for name, entry in content.items()
    ]


def _csv_rows(text: str) -> list[_Row]:
    return [
        (row["arch"], _trainings([row[f"acc{at}"] for at in range(TRAININGS)]), int(row["params"]), int(row["flops"]))
        for row in csv.DictReader(text.splitlines())
    ]


def _trainings(values: Sequence[Any]) -> list[float]:
    if len(values) != TRAININGS:
        raise InputError(f"a network has {len(values)} test accuracies; expected {TRAININGS}")
    return [float(value) for value in values]
