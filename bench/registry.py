"""What is measured: the cases, and which of them are there.

A case is an op or a whole task on given shapes, with the bytes and operations that it must at least spend and everybody
who can do it. Files in ``bench/cases`` make them; ``cases()`` collects them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "spos_fast"
COMPILED = "compile"  # how the names of torch.compile peers start
Run = Callable[[], Any]
Bind = Callable[[Any], Run]  # a contender: from the case's inputs to what is timed


@dataclass(frozen=True, eq=False)
class Case:
    """One thing to measure.

    Attributes:
        op: what is computed; cases of one op share a table.
        shape: on which sizes, as the reader sees it.
        dtype: as torch names it, ``"float32"``; picks the matrix rate of the roof.
        device: ``"cpu"`` or ``"cuda"``.
        bytes: that any implementation must move through memory at least; 0 where that says nothing.
        flops: that any implementation must do at least (a multiplication and an addition are two).
        inputs: makes the inputs on a device; from fixed seeds.
        contenders: by name; ``"spos_fast"`` is ours, all others are peers. Ops that are still to come have peers only.
        tests: files or node ids of the tests that must be green before a ratio to a peer is shown.
        tolerance: greatest relative difference ``|a - b| / |b|`` (2-norms) between ours and a peer's outputs; None
            where outputs are not comparable (a note says why).
        items: images, cells, ... that one run handles; gives items a second.
        unit: what the items are.
        headline: shown in the README.
        convert: by name of a peer, what turns its outputs into what ours gives; not timed.
        task: a whole task of the method; torch.compile takes minutes on it, so it comes last where time is short.
        graphs: whether contenders can be captured in a CUDA graph (no synchronisation inside).
        slow: one run takes about a second or more; fewer rounds.
        note: what the reader must know about the comparison.
    """

    op: str
    shape: str
    dtype: str
    device: str
    bytes: int
    flops: int
    inputs: Callable[[torch.device], Any]
    contenders: Mapping[str, Bind]
    tests: tuple[str, ...] = ()
    tolerance: float | None = 1e-4
    items: int = 0
    unit: str = ""
    headline: bool = False
    convert: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    task: bool = False
    graphs: bool = True
    slow: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Unique over all cases of a device: ``"bn_moments 64x58x28x28 float32"``."""
        return f"{self.op} {self.shape} {self.dtype}"

    @property
    def has_compile_peers(self) -> bool:
        """Whether torch.compile is among the contenders."""
        return any(name.startswith(COMPILED) for name in self.contenders)

    def all_contenders(self, compiled: bool) -> dict[str, Bind]:
        """Ours first; peers whose name starts with "compile" take minutes to build and come only if asked for."""
        names = sorted(self.contenders, key=lambda name: name != OURS)
        return {name: self.contenders[name] for name in names if compiled or not name.startswith(COMPILED)}


def cases(device: str) -> list[Case]:
    """All cases for ``"cpu"`` or ``"cuda"``, in the order in which they should be measured when time is short.

    Raises:
        ValueError: two cases have one name.
    """
    package = importlib.import_module("bench.cases")
    found: list[Case] = []
    for module in pkgutil.iter_modules(package.__path__):
        found += importlib.import_module(f"bench.cases.{module.name}").cases(device)
    names = [case.name for case in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"cases: {', '.join(sorted(twice))} exist more than once")
    return sorted(found, key=lambda case: not case.headline)


def disagreement(got: Any, wanted: Any) -> float:
    """Relative difference in the 2-norm, the largest over all outputs; NaN counts as infinite.

    Outputs are tensors, or lists of other values, which are the same (0) or not (infinite).
    """
    if isinstance(got, list) and not any(isinstance(value, torch.Tensor) for value in got):
        return 0.0 if got == wanted else float("inf")
    worst = 0.0
    first, second = tensors_of(got), tensors_of(wanted)
    if len(first) != len(second):
        return float("inf")
    for a, b in zip(first, second, strict=True):
        a, b = a.detach().double(), b.detach().to(a.device).double()
        if a.shape != b.shape:
            return float("inf")
        difference = float((a - b).norm() / b.norm().clamp_min(1e-30))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists, in order; None (no gradient) is left out."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if outputs is None:
        return []
    return [tensor for output in outputs for tensor in tensors_of(output)]
