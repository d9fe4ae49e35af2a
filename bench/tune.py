"""Which kernel should serve which op on this GPU: times native against Triton on the shapes of every case.

    python -m bench.tune [--out tune.json]

Dispatch takes the native kernel where it was built. Where this says otherwise, that is work: on the kernel, or on
the choice in spos_fast/ops.
"""

from __future__ import annotations

import argparse
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
    """Returns 0 also where no op has two kernels to choose from."""
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing per shape (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the times")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda; torch finds no CUDA device here")
    device = torch.device(options.device)
    rows = [row for case in registry.cases(device.type) if (row := compare(case, device, options.seconds))]
    for row in rows:
        times = ", ".join(f"{name} {duration(spread['median'])}" for name, spread in row["seconds"].items())
        print(f"{row['case']}: {times}; {row['best']}")
    if options.out is not None:
        record = {"environment": environment.describe(device), "rows": rows}
        write_whole(options.out, (json.dumps(record, indent=1) + "\n").encode())
    slower = sum(row["best"] != row["chosen"] for row in rows)
    print(f"{len(rows)} shapes; another kernel than the chosen one is faster on {slower}")
    return 0


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
    runs = {name: (lambda kernel=kernel: kernel(*arguments)) for name, kernel in kernels.items()}
    for run in runs.values():
        run()
    samples = measure.interleaved(runs, device, seconds=seconds)
    spreads = {name: measure.spread(values) for name, values in samples.items()}
    best = min(spreads, key=lambda name: spreads[name]["median"])
    return {"case": case.name, "chosen": op.choices["cuda"].kernel, "best": best, "seconds": spreads}


if __name__ == "__main__":
    sys.exit(main())
