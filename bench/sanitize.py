"""Every CUDA and Triton kernel once on small arguments: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.sanitize
    python -m bench.sanitize --device cpu     (a rehearsal without a GPU)

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: then every tensor is an allocation of its own, and one element too far shows.
"""

from __future__ import annotations

import argparse
import sys

import torch

from spos_fast import ops  # noqa: F401  defines the ops
from spos_fast.ops.dispatch import OPS
from tests.ops.samples import SAMPLES, on


def main() -> int:
    """Returns 0 if every kernel ran."""
    parser = argparse.ArgumentParser("python -m bench.sanitize", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda; torch finds no CUDA device here")
    calls = 0
    for name, op in sorted(OPS.items()):
        if op.choices[device].kernel == "reference":
            print(f"{name} has no kernel on {device}: {op.choices[device].reason}")
            continue
        kernels = [op.overload, *([op.triton] if op.triton is not None and device == "cuda" else [])]
        for arguments in SAMPLES[name]():
            for kernel in kernels:
                kernel(*on(arguments, device))
                calls += 1
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{calls} calls of {len(OPS)} ops on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
