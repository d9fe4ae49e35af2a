"""How latency is measured, and on what: the part of a table that tells whether its numbers mean anything here."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

import spos_fast
from spos_fast.errors import InputError

MAX_THREADS = 1024  # more are a slip, and PyTorch would start them
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LatencySettings:
    """How networks run while they are timed. They are in evaluation mode and channels last, without gradients.

    Attributes:
        batch_size: images of one inference.
        dtype: of weights and images: float32, float16 or bfloat16.
        compiled: whether blocks (and whole networks, when predictions are tested) go through torch.compile.
        threads: CPU threads; 0 is PyTorch's choice.
        rounds: timed rounds; in each every choice of every layer runs once.
        warmup: rounds before them that are not timed.
        seed: of images, and of the order in which choices run.

    Raises:
        InputError: a value out of range.
    """

    batch_size: int = 1
    dtype: str = "float32"
    compiled: bool = False
    threads: int = 0
    rounds: int = 50
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("threads", 0), ("rounds", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name}: got {value!r}; expected an integer of at least {least}")
        if self.threads > MAX_THREADS:
            raise InputError(f"threads: got {self.threads}; expected at most {MAX_THREADS:,}")
        if not isinstance(self.compiled, bool):
            raise InputError(f"compiled: got {self.compiled!r}; expected true or false")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: got {self.dtype!r}; expected one of {', '.join(DTYPES)}")


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names of the device and of the machine around it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device_type": device.type,
        "device": name,
        "host": processor(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str]:
    """Versions of what runs the networks."""
    return {
        "spos_fast": spos_fast.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Model name of the CPU and how many of its cores this process may use."""
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{named[1].strip() if named else platform.machine()} ({cores} cores)"
