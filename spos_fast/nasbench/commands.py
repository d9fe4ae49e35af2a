"""``spos-fast nasbench ...``: what each subcommand takes and does. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from spos_fast.checkpoint import check_writable, write_json, write_whole
from spos_fast.errors import InputError
from spos_fast.nasbench.batch import Cells
from spos_fast.nasbench.cell import OPERATIONS


class Command(NamedTuple):
    """One subcommand: its line in the help, its arguments, and what it does (raising InputError for mistakes)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Add every subcommand of COMMANDS; the chosen one is then ``options.run(options)``."""
    commands = parser.add_subparsers(dest="nasbench_command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help[0].upper() + command.help[1:] + ".", allow_abbrev=False
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run)


def _enumerate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write them: .npz arrays, or .json in the form of the official generate_graphs.py",
    )


def _enumerate(options: argparse.Namespace) -> None:
    import hashlib

    from spos_fast.nasbench.batch import enumerate_cells

    if options.out is not None:
        if options.out.suffix not in (".npz", ".json"):
            raise InputError(f"--out: expected a name that ends in .npz or .json, got {str(options.out)!r}")
        check_writable(options.out)
    cells = enumerate_cells()
    digest = hashlib.sha256(b"".join(hash + b"\n" for hash in sorted(cells.hashes.tolist()))).hexdigest()
    if options.out is not None:
        _write_cells(options.out, cells)
    print(f"{len(cells)} cells; sha256 of the sorted hashes, one a line: {digest}")


def _write_cells(path: Path, cells: Cells) -> None:
    """Write all cells, whole or not at all."""
    import io
    import json

    import numpy as np

    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **vars(cells))
        write_whole(path, buffer.getvalue())
        return
    graphs = {}
    for i in np.argsort(cells.hashes).tolist():
        n = int(cells.vertices[i])
        graphs[cells.hashes[i].decode()] = [cells.adjacency[i, :n, :n].tolist(), cells.ops[i, :n].tolist()]
    write_whole(path, json.dumps(graphs).encode())


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tfrecord", type=Path, help="nasbench_only108.tfrecord or nasbench_full.tfrecord")
    parser.add_argument("out", type=Path, help="the table; appears whole or not at all")


def _convert(options: argparse.Namespace) -> None:
    from spos_fast.nasbench.table import Table

    with Table.convert(options.tfrecord, options.out) as table:
        epochs = ", ".join(map(str, table.epochs))
        print(f"{options.out}: {len(table)} cells from {table.records} records; epochs {epochs}")


def _query_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, help="what convert wrote")
    parser.add_argument("--hash", metavar="HASH", help="32 hexadecimal digits that name the cell")
    parser.add_argument(
        "--matrix", metavar="01...", help="or its adjacency matrix, row by row: 0110... of V x V digits"
    )
    parser.add_argument("--ops", metavar="NAMES", help=f"and its operations: input,...,output; {', '.join(OPERATIONS)}")


def _query(options: argparse.Namespace) -> None:
    from spos_fast.nasbench.table import METRICS, Table

    if (options.hash is None) == (options.matrix is None) or (options.matrix is None) != (options.ops is None):
        raise InputError("name the cell by --hash, or by --matrix and --ops")
    with Table.open(options.table) as table:
        if options.hash is not None:
            row = table.find_hash(options.hash)
        else:
            row = table.find(_matrix(options.matrix), options.ops.split(","))
        if row is None:
            raise InputError(f"{options.table} does not hold this cell")
        cell = table.row(row)
        print(f"hash        {table.hash(row)}")
        print(f"matrix      {''.join(str(entry) for line in cell.adjacency for entry in line)}")
        print(f"ops         {','.join(cell.ops)}")
        print(f"parameters  {cell.params}")
        print(f"{'epochs':>6} {'repeat':>6} {'point':>8} " + " ".join(f"{name:>19}" for name in METRICS))
        for epochs in table.epochs:
            for repeat in range(table.repeats_of(row, epochs)):
                for point in ("halfway", "final"):
                    values = table.metrics(row, epochs, repeat, point == "halfway")
                    shown = " ".join(f"{value:19.9g}" for value in values or ())
                    print(f"{epochs:6d} {repeat:6d} {point:>8} {shown}")


def _matrix(digits: str) -> list[list[int]]:
    side = round(len(digits) ** 0.5)
    if side * side != len(digits) or not digits or set(digits) - {"0", "1"}:
        raise InputError(f"--matrix: expected V x V digits 0 and 1, got {digits!r}")
    return [[int(digit) for digit in digits[v * side : (v + 1) * side]] for v in range(side)]


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a table, an official tfrecord, or a CSV file of cells")
    parser.add_argument("--out", type=Path, default=Path("nasbench.html"), help="the report (default nasbench.html)")
    parser.add_argument("--walks", type=int, default=30_000, metavar="N", help="random walks (default 30000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the walks (default 0)")


def _stats(options: argparse.Namespace) -> None:
    from spos_fast.nasbench.results import read_results

    _check_positive("--walks", options.walks)
    _check_seed(options.seed)
    check_writable(options.out)
    results = read_results(options.source)
    from spos_fast.analysis.nasbench_report import write_statistics

    print(f"report: {write_statistics(results, options.out, walks=options.walks, seed=options.seed)}")


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a table, an official tfrecord, or a CSV file of cells")
    parser.add_argument("--out", type=Path, metavar="HTML", help="write a report with the regret curves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of the curves")
    parser.add_argument("--budget", type=float, default=1e6, metavar="SECONDS", help="of training, a run (default 1e6)")
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="of each method (default 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random choice (default 0)")


def _search(options: argparse.Namespace) -> None:
    from spos_fast.nasbench.results import read_results
    from spos_fast.nasbench.search import METHODS, search

    _check_positive("--runs", options.runs)
    _check_positive("--budget", options.budget)
    _check_seed(options.seed)
    for path in (options.json, options.out):
        if path is not None:
            check_writable(path)
    results = read_results(options.source)
    from spos_fast.analysis import nasbench_search_report as report

    runs = search(results, tuple(METHODS), options.budget, runs=options.runs, seed=options.seed)
    summary = report.summarise(results, runs, options.budget, options.seed)
    print(report.text_of(summary))
    if options.json:
        write_json(options.json, summary)
    if options.out:
        write_whole(options.out, report.page(summary).encode())
        print(f"report: {options.out}")


def _check_positive(name: str, value: float) -> None:
    if not 1 <= value < float("inf"):
        raise InputError(f"{name}: got {value}; expected 1 or more")


def _check_seed(value: int) -> None:
    if value < 0:
        raise InputError(f"--seed: got {value}; expected 0 or more")


COMMANDS = {
    "enumerate": Command("list all 423,624 cells", _enumerate_arguments, _enumerate),
    "convert": Command("turn an official tfrecord into a table", _convert_arguments, _convert),
    "query": Command("all that a table holds on one cell", _query_arguments, _query),
    "stats": Command("the analysis of the paper on what a file holds, as one HTML report", _stats_arguments, _stats),
    "search": Command("search baselines over a file, by simulated training time", _search_arguments, _search),
}
