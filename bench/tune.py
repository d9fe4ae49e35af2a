"""Which kernel should serve which op on this GPU: times native against Triton on the shapes of every case.

    python -m bench.tune [--out tune.json]

Dispatch takes the native kernel where it was built. Where this says otherwise, that is work: on the kernel, or on
the choice in spos_fast/ops.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import environment, measure, registry
from bench.table import duration
from spos_fast.checkpoint import write_whole
from spos_fast.ops.dispatch import OPS


def main() -> int:
    """Returns 0, also where no op has two kernels to choose from; 1 if a kernel failed."""
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing per shape (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the times")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda; torch finds no CUDA device here")
    device = torch.device(options.device)
    record: dict[str, Any] = {"environment": environment.describe(device), "rows": []}
    for case in registry.cases(device.type):
        row = compare(case, device, options.seconds)
        if row is None:
            continue
        times = ", ".join(f"{name} {duration(spread['median'])}" for name, spread in row["seconds"].items())
        print(f"{row['case']}: {times}; {row['best'] or row['problem']}", flush=True)
        record["rows"].append(row)
        if options.out is not None:
            write_whole(options.out, (json.dumps(record, indent=1) + "\n").encode())
    rows = record["rows"]
    slower = sum(row["best"] not in (None, row["chosen"]) for row in rows)
    broken = sum(row["best"] is None for row in rows)
    print(f"{len(rows)} shapes; another kernel than the chosen one is faster on {slower}; {broken} failed")
    return 1 if broken else 0


def compare(case: registry.Case, device: torch.device, seconds: float) -> dict[str, Any] | None:
    """Times of all kernels of the op that the case is named after; None if the op has but one here.

    The inputs of such a case are the op's arguments.
    """
    op = OPS.get(case.op)
    if op is None or op.triton is None or device.type != "cuda":
        return None
    arguments = case.inputs(device)
    kernels = {"triton": op.triton, op.choices["cuda"].kernel: op.overload}
    if len(kernels) == 1:
        return None
    row: dict[str, Any] = {"case": case.name, "chosen": op.choices["cuda"].kernel, "best": None, "problem": ""}
    runs = {name: functools.partial(kernel, *arguments) for name, kernel in kernels.items()}
    try:
        first, second = (run() for run in runs.values())
        difference = registry.disagreement(first, second)
        if case.tolerance is not None and difference > case.tolerance:
            return row | {"seconds": {}, "problem": f"the kernels differ by {difference:.1e}"}
        samples = measure.interleaved(runs, device, seconds=seconds)
    except Exception as error:  # the other shapes are still to come
        return row | {"seconds": {}, "problem": f"{type(error).__name__}: {error}"[:300]}
    spreads = {name: measure.spread(values) for name, values in samples.items()}
    return row | {"seconds": spreads, "best": min(spreads, key=lambda name: spreads[name]["median"])}


if __name__ == "__main__":
    sys.exit(main())
