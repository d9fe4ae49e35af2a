"""The few things that training needs to know about the other processes of a ``torchrun`` job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed


def rank() -> int:
    """Number of this process, 0 without ``torch.distributed``."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without ``torch.distributed``."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started; does nothing in a process started by hand."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        yield
        return
    # Rank 0 alone recalibrates and tests a retrained network while the others wait for the next one.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    try:
        yield
    finally:
        distributed.destroy_process_group()
