"""How much memory is free, and how much of it a walk over a prefix tree takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spos_fast.nn.parts import HeadPart, Part
from spos_fast.prefix_tree import Parts

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on a device.

    On a CPU what the system calls available, or less where a control group (a container) allows less, shared out to the
    processes that ``torchrun`` started on this machine. On a GPU what is free plus what torch holds without using it.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min(_available(), _left_in_group()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_in_group() -> int:
    """Of a control group's limit (version 2, else version 1) what is not in use; file caches can be taken back."""
    for folder, limit, used, cache in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            details = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(most - now + int(details.get(cache, 0)), 0)
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
    return sys.maxsize


class Needs(NamedTuple):
    """Bytes an image.

    Attributes:
        held: what the stem and every block make, in order; a block's output may wait for several that read it.
        working: what the greediest part needs while it runs: input, output, and what all of its convolutions make.
    """

    held: list[int]
    working: int

    def of(self, images: int) -> Needs:
        """The same for a batch."""
        return Needs([images * size for size in self.held], images * self.working)


class Probe:
    """Measures parts on a few images, each module and setting once."""

    def __init__(self) -> None:
        self._known: dict[tuple[nn.Module, Any], tuple[int, int]] = {}

    def needs(self, parts: Parts, images: Tensor) -> Needs:
        """What any path of these parts needs.

        Args:
            parts: at every depth.
            images: what goes into the stem, a few of them.
        """
        if any(part.key not in self._known for level in parts.levels for part in level):
            x = images
            for level in parts.levels:
                outputs = [self._measure(part, x) for part in level]
                x = outputs[0]
        known = [[self._known[part.key] for part in level] for level in parts.levels]
        made = [max(out for out, _ in level) for level in known]
        return Needs(made[:-1], max(need for level in known for _, need in level))

    def _measure(self, part: Part, x: Tensor) -> Tensor:
        with _outputs(part.module) as inner:
            ((out, moments),) = part.calibrate([x])
        made = 0 if out is None else out.numel() * out.element_size()
        values = sum(len(mean) * count for mean, count in zip(moments.mean, moments.counts, strict=True))
        convolved = values * x.element_size()
        if isinstance(part, HeadPart):  # in validation, what its normalisation makes, too
            convolved *= 2
        # Modules that run one by one may make more; their input is copied.
        total = x.numel() * x.element_size() * (2 if inner else 1) + max(convolved, sum(inner.values())) + made
        self._known[part.key] = -(-made // len(x)), -(-total // len(x))
        return x if out is None else out


@contextmanager
def _outputs(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of what the innermost modules put out meanwhile, by address. Fused ops run none of them."""
    found: dict[int, int] = {}

    def see(_module: nn.Module, _inputs: object, out: object) -> None:
        if isinstance(out, Tensor):
            at = out.data_ptr()
            found[at] = max(found.get(at, 0), out.numel() * out.element_size())

    hooks = [inner.register_forward_hook(see) for inner in module.modules() if not list(inner.children())]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
