"""NAS-Bench-101 (Ying et al., "NAS-Bench-101: Towards Reproducible Neural Architecture Search", 2019), and the tables
of NAS-Bench-201 and NAS-Bench-Macro.

Imports no torch: what needs it (:func:`network`, :func:`evaluate`) is loaded on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spos_fast.nasbench.architecture_table import ArchitectureTable, Reference
from spos_fast.nasbench.batch import Cells, count_parameters, enumerate_cells, hash_cells
from spos_fast.nasbench.cell import OPERATIONS, hash_cell
from spos_fast.nasbench.nasbench201 import NASBench201
from spos_fast.nasbench.nasbench_macro import NASBenchMacro
from spos_fast.nasbench.table import Table

if TYPE_CHECKING:
    from spos_fast.nasbench.networks import network
    from spos_fast.nasbench.training import Evaluation, Recipe, evaluate

__all__ = [
    "OPERATIONS",
    "TABLES",
    "ArchitectureTable",
    "Cells",
    "Evaluation",
    "NASBench201",
    "NASBenchMacro",
    "Recipe",
    "Reference",
    "Table",
    "count_parameters",
    "enumerate_cells",
    "evaluate",
    "hash_cell",
    "hash_cells",
    "network",
]

# Tables of search spaces that a supernet can be made of, by the name of the space.
TABLES: dict[str, Callable[[str], ArchitectureTable]] = {
    NASBench201.space: NASBench201,
    NASBenchMacro.space: NASBenchMacro,
}

_HOME = {"Evaluation": "training", "Recipe": "training", "evaluate": "training", "network": "networks"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"spos_fast.nasbench.{_HOME[name]}"), name)
    if name == "api":
        return importlib.import_module("spos_fast.nasbench.api")
    raise AttributeError(f"module 'spos_fast.nasbench' has no attribute {name!r}")
