"""NAS-Bench-101 on the CPU, one core, beside the official algorithm in plain Python."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.peers import nasbench101 as peers
from bench.registry import OURS, Bind, Case
from spos_fast.nasbench import Cells, Table, enumerate_cells, hash_cell, hash_cells
from spos_fast.nasbench.api import ModelSpec, NASBench
from tests.nasbench.official_file import write_file

BATCH, RECORDED = 2_000, 1_000  # cells of a batch; cells of the made-up file, three records each


def cases(device: str) -> list[Case]:
    """Hash, enumeration, loading, one query and many."""
    if device != "cpu":
        return []
    engine = "tests/nasbench/test_cell.py", "tests/nasbench/test_batch.py"
    table = "tests/nasbench/test_table.py", "tests/nasbench/test_api.py"
    count = f"{RECORDED:,} cells"
    return [
        _case("hash", f"{BATCH:,} cells at once", BATCH, "cells", _cells, _hash, _hash_plain, engine),
        _case("hash", "200 cells, one by one", 200, "cells", _few_cells, _hash_one_by_one, _hash_plain, engine),
        _case("enumerate", "up to 5 vertices", 2_532, "cells", lambda where: 5, _enumerate, _enumerate_plain, engine),
        _case("enumerate", "up to 7 vertices", 423_624, "cells", lambda where: 7, _enumerate, None, engine),
        _case("convert", f"{3 * RECORDED:,} records", 3 * RECORDED, "records", _recorded, _convert, _load_plain, table),
        _case("open", count, 1, "files", _recorded, _open, _open_plain, table),
        _case("query", "100 cells, one by one", 100, "queries", _recorded, _query, _query_plain, table),
        _case("lookup", f"{count} at once", RECORDED, "cells", _recorded, _lookup, _lookup_plain, table),
    ]


def _case(
    what: str,
    shape: str,
    items: int,
    unit: str,
    inputs: Callable[[torch.device], Any],
    ours: Bind,
    plain: Bind | None,
    tests: tuple[str, ...],
) -> Case:
    return Case(
        op=f"NAS-Bench-101 {what}",
        shape=shape,
        dtype="uint8",
        device="cpu",
        bytes=0,
        flops=0,
        inputs=inputs,
        contenders={OURS: ours} | ({"plain Python": plain} if plain else {}),
        tests=tests,
        tolerance=0.0,
        items=items,
        unit=unit,
        headline=plain is not None,
        note="" if plain else "the official enumeration takes minutes; see the smaller one beside it",
    )


def _cells(where: torch.device, count: int = BATCH) -> Cells:
    space = enumerate_cells()
    at = np.random.default_rng(0).choice(len(space), count, replace=False)
    return Cells(space.hashes[at], space.adjacency[at], space.ops[at], space.vertices[at], space.params[at])


def _few_cells(where: torch.device) -> Cells:
    return _cells(where, 200)


def _small(cells: Cells) -> list[tuple[NDArray[np.uint8], list[int]]]:
    """Matrices and labels without what lies behind smaller cells."""
    sizes = [int(count) for count in cells.vertices]
    return [(cells.adjacency[i, :n, :n], cells.ops[i, :n].tolist()) for i, n in enumerate(sizes)]


def _named(labels: list[int]) -> list[str]:
    return ["input", *(peers.OPERATIONS[label] for label in labels[1:-1]), "output"]


def _hash(cells: Cells) -> Any:
    return lambda: hash_cells(cells.adjacency, cells.ops, cells.vertices)


def _hash_one_by_one(cells: Cells) -> Any:
    named = [(matrix, _named(labels)) for matrix, labels in _small(cells)]
    return lambda: [hash_cell(matrix, ops) for matrix, ops in named]


def _hash_plain(cells: Cells) -> Any:
    small = _small(cells)
    return lambda: [peers.hash_cell(*cell) for cell in small]


def _enumerate(vertices: int) -> Any:
    return lambda: [name.decode() for name in enumerate_cells(vertices).hashes.tolist()]


def _enumerate_plain(vertices: int) -> Any:
    return lambda: peers.enumerate_hashes(vertices)


@dataclass
class _File:
    """A made-up official file of random cells and what was asked of it; the folder goes when this does."""

    folder: tempfile.TemporaryDirectory[str]
    cells: list[tuple[NDArray[np.int64], list[str]]]

    @property
    def path(self) -> Path:
        return Path(self.folder.name) / "only108.tfrecord"

    @property
    def table(self) -> Path:
        return Path(self.folder.name) / "table"


def _recorded(where: torch.device) -> _File:
    given = _File(tempfile.TemporaryDirectory(prefix="spos_fast_"), [])
    write_file(given.path, RECORDED, (108,), 3, seed=0)
    with Table.convert(given.path, given.table) as table:
        for row in range(len(table)):
            adjacency, ops, _ = table.row(row)
            given.cells.append((adjacency.astype(np.int64), ops))
    return given


def _convert(given: _File) -> Any:
    out = given.table.with_name("again")

    def run() -> list[Any]:
        with Table.convert(given.path, out) as table:
            return [len(table), table.hash(0), list(table.metrics(0) or ())]

    return run


def _read_plain(loaded: tuple[dict[str, Any], dict[str, Any]]) -> list[Any]:
    fixed, computed = loaded
    first = next(iter(fixed))
    point = computed[first][108][0]
    metrics = ("training_time", "train_accuracy", "validation_accuracy", "test_accuracy")
    return [len(fixed), first, [point[f"final_{metric}"] for metric in metrics]]


def _load_plain(given: _File) -> Any:
    return lambda: _read_plain(peers.load(given.path))


def _open_plain(given: _File) -> Any:
    return lambda: [len(peers.load(given.path)[0])]


def _open(given: _File) -> Any:
    def run() -> list[int]:
        with Table.open(given.table) as table:
            return [len(table)]

    return run


def _query(given: _File) -> Any:
    bench = NASBench(given.table)

    def run() -> list[Any]:
        random.seed(0)
        return [_answer(bench.query(ModelSpec(matrix, ops))) for matrix, ops in given.cells[:100]]

    return run


def _query_plain(given: _File) -> Any:
    loaded = peers.load(given.path)

    def run() -> list[Any]:
        random.seed(0)
        return [_answer(peers.query(*loaded, matrix, ops)) for matrix, ops in given.cells[:100]]

    return run


def _answer(data: dict[str, Any]) -> tuple[Any, ...]:
    return data["trainable_parameters"], data["training_time"], data["test_accuracy"]


def _lookup(given: _File) -> Any:
    table = Table.open(given.table)
    everything = table.to_numpy()

    def run() -> list[Any]:
        found = table.lookup(everything["adjacency"], everything["ops"], everything["vertices"])
        return found["test_accuracy"].tolist()

    return run


def _lookup_plain(given: _File) -> Any:
    _, computed = peers.load(given.path)
    cells = [(matrix, [-1, *(peers.OPERATIONS.index(op) for op in ops[1:-1]), -2]) for matrix, ops in given.cells]

    def run() -> list[Any]:
        names = [peers.hash_cell(*cell) for cell in cells]
        return [[point["final_test_accuracy"] for point in computed[name][108]] for name in names if name]

    return run
