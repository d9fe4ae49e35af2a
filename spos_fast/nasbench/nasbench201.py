"""NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326; NATS-Bench's topology space, arXiv 2009.00437) as a table.

Imports no torch.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from spos_fast.architecture import Architecture
from spos_fast.checkpoint import write_whole
from spos_fast.errors import InputError
from spos_fast.nasbench.architecture_table import ArchitectureTable, Reference, shares
from spos_fast.nasbench.nasbench201_cells import EDGES, OPS, cell_genes, cell_string, isomorphism_key

# Our name of a data set: how the file's columns begin, and the official names of the networks that were validated and
# of those that were tested (CIFAR-10's were trained on half of the training part, and on all of it).
_DATASETS = {
    "cifar10": ("c10", "cifar10-valid", "cifar10"),
    "cifar100": ("c100", "cifar100", "cifar100"),
    "imagenet16-120": ("in16", "ImageNet16-120", "ImageNet16-120"),
}
_EPOCHS = (12, 200)
_SPLITS = ("valid", "test")


class NASBench201(ArchitectureTable):
    """All 15,625 cells of NAS-Bench-201, from a compact file; rows have the official indices.

    The file is an ``.npz`` with ``ops`` uint8 [N, 6], ``op_names`` str [5], ``params`` and ``flops`` [N], and float
    [N] columns in percent: ``c10_test_200`` and the like (``c10``, ``c100``, ``in16``; ``valid``, ``test``; epochs 12,
    200). It may have ``iso_id`` [N] and ``hw_DEVICE_latency`` [N]. :meth:`convert` makes one from the official API.

    Attributes:
        OPS: names of the operations; a gene is an index into them.
        EDGES: (from, to) of every gene.
        path: of the file.
        devices: whose latency is known.
    """

    space: ClassVar[str] = "nasbench201"
    choices: ClassVar[tuple[tuple[str, ...], ...]] = (OPS,) * len(EDGES)
    OPS: ClassVar[tuple[str, ...]] = OPS
    EDGES: ClassVar[tuple[tuple[int, int], ...]] = EDGES

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a compact file.

        Raises:
            InputError: it cannot be read, lacks a column, or holds values that cannot be.
        """
        self.path = Path(path)
        columns = _read(self.path)
        try:
            names = [str(name) for name in columns["op_names"]]
            if sorted(names) != sorted(OPS):
                raise InputError(f"op_names are {', '.join(names)}; expected {', '.join(OPS)}")
            ops = columns["ops"].astype(np.int64)
            if ops.size and not 0 <= ops.min() <= ops.max() < len(names):
                raise InputError(f"ops are not all 0 to {len(names) - 1}")
            genes = np.array([OPS.index(name) for name in names])[ops]
            super().__init__(genes, columns["params"].astype(np.int64), columns["flops"].astype(np.int64))
            for name, column in columns.items():
                if name != "op_names" and len(column) != len(self):
                    raise InputError(f"{name} has {len(column)} values for {len(self)} cells")
            self._accuracies = {name: shares(columns[name], name) for name in _accuracy_columns() if name in columns}
        except KeyError as error:
            raise InputError(f"table: {self.path} has no column {error.args[0]!r}") from None
        except InputError as error:
            raise InputError(f"table: {self.path}: {error}") from None
        self.datasets = tuple(name for name, (short, *_) in _DATASETS.items() if f"{short}_test_200" in columns)
        if not self.datasets:
            raise InputError(f"table: {self.path} has no column of test accuracies, such as c10_test_200")
        self._latencies = {
            name[len("hw_") : -len("_latency")]: column.astype(np.float64)
            for name, column in columns.items()
            if name.startswith("hw_") and name.endswith("_latency")
        }
        self.devices = tuple(self._latencies)
        self._classes = columns.get("iso_id")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> NASBench201:
        """The same as the constructor.

        Raises:
            InputError: see there.
        """
        return cls(path)

    @classmethod
    def convert(cls, api: Any, out: str | os.PathLike[str]) -> NASBench201:
        """Make a compact file from the official API, which reads the official files, and open it.

        The official files are pickles, which run code when they are read; so this reads none itself.

        Args:
            api: ``nats_bench.create(FILE, "tss", fast_mode=False, verbose=False)``, or a ``NASBench201API`` of
                nas-bench-201 2.0 or newer.
            out: the file to write; it appears whole or not at all.

        Raises:
            InputError: an API of other cells.
            CheckpointError: ``out`` could not be written.
        """
        strings = [str(api[index]) for index in range(len(api))]
        genes = [cell_genes(text) for text in strings]
        costs = [api.get_cost_info(index, "cifar10", hp="200") for index in range(len(strings))]
        columns: dict[str, NDArray] = {
            "ops": np.array(genes, dtype=np.uint8),
            "op_names": np.array(OPS),
            # The API counts in millions.
            "params": np.array([round(1e6 * cost["params"]) for cost in costs], dtype=np.int64),
            "flops": np.array([round(1e6 * cost["flops"]) for cost in costs], dtype=np.int64),
        }
        for short, validated, tested in _DATASETS.values():
            for epochs in _EPOCHS:
                for split, trained in zip(_SPLITS, (validated, tested), strict=True):
                    values = _official(api, len(strings), trained, epochs, split)
                    if values is not None:
                        columns[f"{short}_{split}_{epochs}"] = values
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]  # its stub takes the names for options
        write_whole(Path(out), buffer.getvalue())
        return cls(out)

    def accuracies(self, dataset: str = "cifar10", split: str = "test", epochs: int = 200) -> NDArray[np.float64]:
        """Accuracy of every cell, float64 [N], means over the official trainings.

        Args:
            dataset: cifar10, cifar100 or imagenet16-120.
            split: ``"test"``, or ``"valid"``; on CIFAR-10 the networks that are validated are trained on half of the
                training part, those that are tested (after 200 epochs) on all of it.
            epochs: 200, or 12: trainings of that length with a learning rate that falls to 0 in it.

        Raises:
            InputError: the table has no such accuracies.
        """
        short = _DATASETS[self._dataset(dataset)][0]
        column = f"{short}_{split}_{epochs}"
        if column not in self._accuracies:
            known = ", ".join(self._accuracies)
            raise InputError(
                f"split, epochs: got {split!r} and {epochs!r} of {dataset}; expected valid or test, and 12 or 200 "
                f"(the table has {known})"
            )
        return self._accuracies[column]

    def accuracy(
        self,
        arch: Architecture | Sequence[int] | str | int,
        dataset: str = "cifar10",
        split: str = "test",
        epochs: int = 200,
    ) -> float:
        """Accuracy of one cell, see :meth:`index` and :meth:`accuracies`.

        Raises:
            InputError: the table does not hold it.
        """
        return float(self.accuracies(dataset, split, epochs)[self.index(arch)])

    def latencies(self, device: str) -> NDArray[np.float64]:
        """Measured latency of every cell's CIFAR-10 network in milliseconds, float64 [N].

        Raises:
            InputError: the table has no such device.
        """
        if device not in self._latencies:
            raise InputError(f"device: got {device!r}; the table has {', '.join(self.devices) or 'none'}")
        return self._latencies[device]

    @property
    def iso_id(self) -> NDArray[np.int64]:
        """Number of every cell's isomorphism class, int64 [N]: the file's, or found from the cells."""
        if self._classes is None:
            keys = [isomorphism_key(genes) for genes in self.genes.tolist()]
            numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
            self._classes = np.array([numbers[key] for key in keys])
        return self._classes.astype(np.int64)

    def truth(self, dataset: str | None = None) -> NDArray[np.float64]:
        """Test accuracy after 200 epochs, float64 [N].

        Raises:
            InputError: the table has no such data set.
        """
        return self.accuracies(self._dataset(dataset))

    def references(self, dataset: str | None = None) -> tuple[Reference, ...]:
        """Parameters (FLOPs rank the same), a training of 12 epochs, and, as the ceiling, a second full training.

        Raises:
            InputError: the table has no such data set.
        """
        dataset = self._dataset(dataset)
        true, short = self.truth(dataset), _DATASETS[dataset][0]
        found = [Reference("parameters", self.params.astype(np.float64), true)]
        for name, column in (
            ("12 epochs of training, validation accuracy", f"{short}_valid_12"),
            ("ceiling: 200 epochs, validation accuracy", f"{short}_valid_200"),
        ):
            if column in self._accuracies:
                found.append(Reference(name, self._accuracies[column], true))
        return tuple(found)

    def parse(self, text: str) -> tuple[int, ...]:
        """The genes of an official string, ``"|avg_pool_3x3~0|+|none~0|skip_connect~1|+|...~0|...~1|...~2|"``.

        Raises:
            InputError: no such string.
        """
        return cell_genes(text)

    def string(self, index: int) -> str:
        """The official string of a row's cell.

        Raises:
            InputError: there is no such row.
        """
        return cell_string(self.genes[self.index(index)].tolist())


def _accuracy_columns() -> list[str]:
    return [f"{short}_{split}_{epochs}" for short, *_ in _DATASETS.values() for split in _SPLITS for epochs in _EPOCHS]


def _read(path: Path) -> dict[str, NDArray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            with file:
                return {name: file[name] for name in file.files}
    except OSError as error:
        raise InputError(f"table: {path} could not be read ({error.strerror or error})") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # another kind of file, or a damaged one
        pass
    raise InputError(
        f"table: {path} is not a compact .npz file, or damaged; NASBench201.convert makes one from the official API"
    )


def _official(api: Any, cells: int, dataset: str, epochs: int, split: str) -> NDArray[np.float32] | None:
    """Accuracies in percent from the official API, float32 [cells]; None where it has none."""
    values = np.empty(cells, dtype=np.float32)
    for index in range(cells):
        try:
            found = api.get_more_info(index, dataset, hp=str(epochs), is_random=False)
            values[index] = found[f"{split}-accuracy"]
        except KeyError:  # not trained on it, or not for so long
            return None
    return values
