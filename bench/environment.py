"""On what a measurement was taken."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads, driver, versions and commit, as plain values."""
    import numpy

    found: dict[str, Any] = {
        "device_type": device.type,
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _version("triton"),
        # A machine that got a copy without git is told by whoever copied.
        "commit": _git("rev-parse", "--short=12", "HEAD") or os.environ.get("SPOS_FAST_COMMIT") or None,
        "uncommitted_changes": _changes(),
    }
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "host": cpu_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """Model name of the processor and how many of its cores this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    vector = next((name for name in ("avx512f", "avx2") if flags and name in flags[1].split()), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = {"avx512f": ", AVX-512", "avx2": ", AVX2", None: ""}[vector]
    return f"{model[1].strip() if model else platform.machine()} ({cores} cores{detail})"


def _git(*arguments: str) -> str:
    return _run("git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments)


def _changes() -> bool | None:
    """Whether files of the project differ from the commit, new ones included; None where git does not say."""
    if not _git("rev-parse", "HEAD"):
        return None
    # What python -m bench itself writes does not count.
    return bool(_git("status", "--porcelain", "--", ".", ":!bench/results"))


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
