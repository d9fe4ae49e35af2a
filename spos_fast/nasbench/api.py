"""The API of NAS-Bench-101 as programs know it: change ``from nasbench import api`` to
``from spos_fast.nasbench import api``.

Messages, dictionaries, budget counters and the draw of the repeat are those of google-research/nasbench (api.py, last
changed in 2019). What is different:

- It opens the converted table too (:meth:`spos_fast.nasbench.Table.convert`), in milliseconds.
- A pruned cell of more than 7 vertices raises the OutOfDomainError that was meant; there it is a TypeError, out of
  ``is_valid`` too.
- A float matrix of whole numbers finds its cell; there it is valid and then a KeyError.
- ``fixed_statistics`` and ``computed_statistics`` are read-only mappings that make their values when asked.
- Lengths of training are in ascending order, so a set of four of them may print in another order than there.
- A matrix with fractions is a ValueError; there it is valid and then a KeyError.
- ``evaluate`` trains with PyTorch and is told where CIFAR-10 is.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spos_fast.errors import InputError
from spos_fast.nasbench.cell import INPUT, OPERATIONS, OUTPUT
from spos_fast.nasbench.model_spec import ModelSpec
from spos_fast.nasbench.opening import open_any
from spos_fast.nasbench.table import METRICS, Table

if TYPE_CHECKING:
    from spos_fast.data import DataSource

__all__ = ["ModelSpec", "NASBench", "OutOfDomainError"]

_AVAILABLE_OPS = list(OPERATIONS)
_HALFWAY_KEYS = tuple(f"halfway_{name}" for name in METRICS)
_FINAL_KEYS = tuple(f"final_{name}" for name in METRICS)


class OutOfDomainError(Exception):
    """The cell or the number of epochs is outside the benchmark."""


def default_config() -> dict[str, Any]:
    """The settings of the benchmark, under the names of the official flags (config.py)."""
    return {
        "train_data_files": [],
        "valid_data_file": "",
        "test_data_file": "",
        "sample_data_file": "",
        "data_format": "channels_last",
        "num_labels": 10,
        "module_vertices": 7,
        "max_edges": 9,
        "available_ops": list(OPERATIONS),
        "stem_filter_size": 128,
        "num_stacks": 3,
        "num_modules_per_stack": 3,
        "batch_size": 256,
        "train_epochs": 108,
        "train_seconds": 14400.0,
        "learning_rate": 0.1,
        "lr_decay_method": "COSINE_BY_STEP",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "max_attempts": 5,
        "intermediate_evaluations": ["0.5"],
        "num_repeats": 3,
        "use_tpu": True,
        "tpu_iterations_per_loop": 100,
        "tpu_num_shards": 2,
    }


class NASBench:
    """The benchmark, with counters of the training time that queries would have cost.

    Attributes:
        config: the official settings; a copy of its own, which may be changed.
        valid_epochs: training lengths that may be asked for.
        fixed_statistics: hash to the cell's own matrix, operations and parameters.
        computed_statistics: hash to epochs to the metrics of every repeat, in the order of the file.
        training_time_spent, total_epochs_spent: what the queries would have cost so far, in seconds and epochs.
        history: empty, as in the official code.
    """

    def __init__(self, dataset_file: str | os.PathLike[str], seed: Any = None) -> None:
        """Open a benchmark file.

        Args:
            dataset_file: nasbench_only108.tfrecord, nasbench_full.tfrecord, or a converted table. A tfrecord is
                converted anew every time, which takes seconds; nothing is written beside it.
            seed: of Python's global random generator, which draws the repeat of every query.

        Raises:
            InputError: there is no such file, it is none of these, or it is damaged.
        """
        self.config = default_config()
        random.seed(seed)
        print("Loading dataset from file... This may take a few minutes...")
        start = time.time()
        self._path = Path(dataset_file).absolute()
        self._open()
        self.valid_epochs: set[int] = set(self._table.epochs)
        print("Loaded dataset in %d seconds" % (time.time() - start))  # noqa: UP031  # rounds as the official line
        self.history: dict[Any, Any] = {}
        self.training_time_spent = 0.0
        self.total_epochs_spent = 0

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file: a copy, also one in another process, opens it again."""
        state = dict(self.__dict__)
        for name in ("_table", "_engine", "fixed_statistics", "computed_statistics"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._table = open_any(self._path)
        # Straight to the engine, past Table's checks: a query is microseconds.
        self._engine = self._table._table
        self.fixed_statistics: Mapping[str, dict[str, Any]] = _FixedStatistics(self._table)
        self.computed_statistics: Mapping[str, dict[int, list[dict[str, float]]]] = _ComputedStatistics(self._table)

    def query(self, model_spec: ModelSpec, epochs: int = 108, stop_halfway: bool = False) -> dict[str, Any]:
        """One training of a cell, drawn from its repeats; its time and epochs are added to the counters.

        Args:
            model_spec: the cell.
            epochs: one of ``valid_epochs``.
            stop_halfway: metrics after half of the epochs, for half of the cost.

        Returns:
            module_adjacency (int8 ``[V, V]``) and module_operations as the benchmark has them, trainable_parameters,
            training_time (seconds), train_accuracy, validation_accuracy, test_accuracy.

        Raises:
            OutOfDomainError: the epochs or the cell are outside the benchmark.
            KeyError: the file does not hold the cell, or not these epochs of it.
        """
        if epochs not in self.valid_epochs:
            raise OutOfDomainError(f"invalid number of epochs, must be one of {self.valid_epochs}")
        epochs = int(epochs)  # 108.0 is a valid number of epochs, too
        row = self._row(model_spec)
        repeat = random.randint(0, self.config["num_repeats"] - 1)
        metrics = self._engine.metrics(row, epochs, repeat, bool(stop_halfway))
        if metrics is None:
            raise IndexError("list index out of range") if self._table.repeats_of(row, epochs) else KeyError(epochs)
        self.training_time_spent += metrics[0]
        self.total_epochs_spent += epochs // 2 if stop_halfway else epochs
        adjacency, ops, params = self._engine.cell(row)
        return {
            "module_adjacency": adjacency,
            "module_operations": ops,
            "trainable_parameters": params,
            "training_time": metrics[0],
            "train_accuracy": metrics[1],
            "validation_accuracy": metrics[2],
            "test_accuracy": metrics[3],
        }

    def is_valid(self, model_spec: ModelSpec) -> bool:
        """Whether the cell is in the search space; costs nothing."""
        try:
            self._check_spec(model_spec)
        except OutOfDomainError:
            return False
        return True

    def get_budget_counters(self) -> tuple[float, int]:
        """Seconds of training and epochs that the queries so far would have cost."""
        return self.training_time_spent, self.total_epochs_spent

    def reset_budget_counters(self) -> None:
        """Set both counters to zero."""
        self.training_time_spent = 0.0
        self.total_epochs_spent = 0

    def evaluate(
        self,
        model_spec: ModelSpec,
        model_dir: str | os.PathLike[str],
        data: str | os.PathLike[str] | DataSource | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> dict[str, Any]:
        """Train a cell from scratch as the benchmark did, by the settings in ``config``; nothing is looked up.

        The cell may be outside the search space in vertices and edges. ``train_seconds`` and ``max_attempts`` guard the
        TPU jobs of the benchmark and mean nothing here; learning rate decay is by step, evaluation halfway and at the
        end. Costs nothing on the counters.

        Args:
            model_spec: the cell.
            model_dir: gets ``metadata.json`` with all evaluations.
            data: folder of CIFAR-10, or a data source; the official code has it in its flags.
            seed: of weights, order and augmentation.
            device: where to train.

        Returns:
            As :meth:`query`, with the matrix and the operations of ``model_spec``.

        Raises:
            InputError: no data, or settings that make no training.
        """
        from spos_fast.checkpoint import write_json
        from spos_fast.data import DataSource, load
        from spos_fast.nasbench.training import Recipe, evaluate

        if data is None:
            raise InputError("data: give the folder of CIFAR-10, nasbench.evaluate(spec, model_dir, data=...)")
        source = data if isinstance(data, DataSource) else load("cifar10", Path(data), validation=0.2)
        config = self.config
        recipe = Recipe(
            epochs=config["train_epochs"],
            batch_size=config["batch_size"],
            shards=config["tpu_num_shards"],
            learning_rate=config["learning_rate"] * config["tpu_num_shards"],
            momentum=config["momentum"],
            weight_decay=config["weight_decay"],
        )
        sizes = {
            "stem_channels": config["stem_filter_size"],
            "stacks": config["num_stacks"],
            "cells_per_stack": config["num_modules_per_stack"],
        }
        from spos_fast.nasbench.networks import network

        net = network(model_spec, num_classes=source.num_classes, in_channels=source.in_channels, **sizes)
        params = sum(weight.numel() for weight in net.parameters())
        results = [asdict(entry) for entry in evaluate(model_spec, source, recipe, seed=seed, device=device, **sizes)]
        write_json(Path(model_dir) / "metadata.json", {"trainable_params": params, "evaluation_results": results})
        return {
            "module_adjacency": model_spec.matrix,
            "module_operations": model_spec.ops,
            "trainable_parameters": params,
            **{name: results[-1][name] for name in METRICS},
        }

    def hash_iterator(self) -> KeysView[str]:
        """The hashes of all cells, in the order of the file."""
        return self.fixed_statistics.keys()

    def get_metrics_from_hash(self, module_hash: str) -> tuple[dict[str, Any], dict[int, list[dict[str, float]]]]:
        """Fixed and computed statistics of a cell; costs nothing and is not for benchmarking.

        Raises:
            KeyError: the file does not hold the cell.
        """
        return self.fixed_statistics[module_hash], self.computed_statistics[module_hash]

    def get_metrics_from_spec(self, model_spec: ModelSpec) -> tuple[dict[str, Any], dict[int, list[dict[str, float]]]]:
        """As :meth:`get_metrics_from_hash`, by the cell.

        Raises:
            OutOfDomainError: the cell is outside the search space.
            KeyError: the file does not hold the cell.
        """
        row = self._row(model_spec)
        return _fixed(self._table, row), _computed(self._table, row)

    def _row(self, model_spec: ModelSpec) -> int:
        """Row of a cell that was checked."""
        config, ops = self.config, model_spec.ops
        if (
            model_spec.valid_spec
            and ops[0] == INPUT
            and ops[-1] == OUTPUT
            and config["module_vertices"] == 7
            and config["max_edges"] == 9
            and config["available_ops"] == _AVAILABLE_OPS
        ):
            # A cell that the table holds is in the space: nothing else has to be checked.
            row: int = self._engine.find(model_spec.matrix, ops)
            if row >= 0:
                return row
        self._check_spec(model_spec)
        return _row_of(self._table, self._hash_spec(model_spec))

    def _check_spec(self, model_spec: ModelSpec) -> None:
        if not model_spec.valid_spec:
            raise OutOfDomainError("invalid spec, provided graph is disconnected.")
        config, ops = self.config, model_spec.ops
        edges = int(np.sum(model_spec.matrix))
        if len(ops) > config["module_vertices"]:
            most = config["module_vertices"]
            raise OutOfDomainError(f"too many vertices, got {len(ops)} (max vertices = {most})")
        if edges > config["max_edges"]:
            raise OutOfDomainError(f"too many edges, got {edges} (max edges = {config['max_edges']})")
        if ops[0] != INPUT:
            raise OutOfDomainError("first operation should be 'input'")
        if ops[-1] != OUTPUT:
            raise OutOfDomainError("last operation should be 'output'")
        for op in ops[1:-1]:
            if op not in config["available_ops"]:
                raise OutOfDomainError(f"unsupported op {op} (available ops = {config['available_ops']})")

    def _hash_spec(self, model_spec: ModelSpec) -> str:
        return model_spec.hash_spec(self.config["available_ops"])


class _Statistics(Mapping[str, Any]):
    """Something of every cell, by hash, made when it is asked for."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, module_hash: object) -> bool:
        return module_hash in self._table


class _FixedStatistics(_Statistics):
    def __getitem__(self, module_hash: str) -> dict[str, Any]:
        return _fixed(self._table, _row_of(self._table, module_hash))


class _ComputedStatistics(_Statistics):
    def __getitem__(self, module_hash: str) -> dict[int, list[dict[str, float]]]:
        return _computed(self._table, _row_of(self._table, module_hash))


def _row_of(table: Table, module_hash: str) -> int:
    row = table.find_hash(module_hash) if isinstance(module_hash, str) else None
    if row is None:
        raise KeyError(module_hash)
    return row


def _fixed(table: Table, row: int) -> dict[str, Any]:
    adjacency, ops, params = table.row(row)
    return {"module_adjacency": adjacency, "module_operations": ops, "trainable_parameters": params}


def _computed(table: Table, row: int) -> dict[int, list[dict[str, float]]]:
    found: dict[int, list[dict[str, float]]] = {}
    for epochs in table.epochs:
        for repeat in range(table.repeats_of(row, epochs)):
            halfway = table.metrics(row, epochs, repeat, True) or ()
            final = table.metrics(row, epochs, repeat, False) or ()
            entry = dict(zip(_HALFWAY_KEYS, halfway, strict=True)) | dict(zip(_FINAL_KEYS, final, strict=True))
            found.setdefault(epochs, []).append(entry)
    return found
