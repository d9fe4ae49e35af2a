"""The NAS-Bench-101 engine at full size on one core: every row of its speed table, in processes of their own.

    python -m bench.nasbench_full --file only108.tfrecord

A file that is not there is made first (1,270,872 records of real cells and made-up trainings, about 500 MB, minutes).
The official code, in plain Python, is in the cases of python -m bench, at sizes that it can do in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.environment import ROOT, cpu_name

# What each process runs; it prints a number, and its greatest memory is asked afterwards.
HEAD = """
import random, statistics, sys, time
import numpy as np
from spos_fast.nasbench import Table, enumerate_cells, hash_cells
from spos_fast.nasbench.api import ModelSpec, NASBench
def median(run, times):
    def once():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    return statistics.median(once() for _ in range(times))
record, table = sys.argv[1:]
"""
CELLS = """
space = enumerate_cells()
at = np.random.default_rng(0).permutation(len(space))
adjacency, ops, vertices = space.adjacency[at], space.ops[at], space.vertices[at]
"""
HASH = "print(median(lambda: hash_cells(adjacency, ops, vertices), 5) / len(space) * 1e6)"
QUERY = """
bench = NASBench(table)
names = random.Random(0).sample(list(bench.hash_iterator()), 20000)
specs = [ModelSpec(f["module_adjacency"], f["module_operations"]) for f in map(bench.fixed_statistics.get, names)]
print(median(lambda: [bench.query(spec) for spec in specs], 5) / len(specs) * 1e6)
"""
LOOKUP = """
table = Table.open(table)
print(len(space) / median(lambda: table.lookup(adjacency, ops, vertices), 5) / 1e6)
"""
ROWS = (
    ("hash, batch", "1.5 us a cell", "us", CELLS + HASH),
    ("enumerate everything with hashes", "3 s", "s", "print(median(enumerate_cells, 3))"),
    ("convert", "5 s, 300 MB", "s", "print(median(lambda: Table.convert(record, table).close(), 3))"),
    ("open", "20 ms, 80 MB", "ms", "print(median(lambda: Table.open(table), 7) * 1e3)"),
    ("one query of the official API", "8 us", "us", QUERY),
    ("lookup, batch", "1 M cells/s", "M cells/s", CELLS + LOOKUP),
)
# Not getrusage: its maximum counts the process that started this one, too.
MEMORY = """
import re
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def main() -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.nasbench_full", description=__doc__)
    parser.add_argument("--file", type=Path, required=True, help="official tfrecord; made if it is not there")
    record = parser.parse_args().file
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not record.exists():
        maker = [sys.executable, "-m", "tests.nasbench.official_file", str(record.absolute())]
        subprocess.run(maker, cwd=ROOT, env=environment, check=True)
    print(f"{cpu_name()}; {record.stat().st_size / 1e6:,.0f} MB\n")
    print("| | must | measured | greatest memory of the process, Python included |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=record.absolute().parent) as folder:
        arguments = [str(record.absolute()), str(Path(folder) / "table")]
        for name, must, unit, code in ROWS:
            command = [sys.executable, "-c", HEAD + code + MEMORY, *arguments]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            value, memory = map(json.loads, done.stdout.splitlines()[-2:])
            print(f"| {name} | {must} | {value:.3g} {unit} | {memory:,.0f} MB |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
