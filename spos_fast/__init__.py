"""Fast single-path one-shot architecture search (SPOS, arXiv 1904.00420) and NAS-Bench-101 for PyTorch.

Names are loaded on first use, so that ``import spos_fast.nasbench`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spos_fast.architecture import Architecture
    from spos_fast.calibration import recalibrate
    from spos_fast.distributed_evaluation import DistributedEvaluator
    from spos_fast.early_stopping import EarlyStopping
    from spos_fast.errors import CheckpointError, InputError, RankError
    from spos_fast.evaluation import Evaluator, evaluate
    from spos_fast.evolution import Candidate, SearchResult, evolve, random_search
    from spos_fast.isomorphism import IsomorphismSampler
    from spos_fast.latency import LatencySettings, LatencyTable
    from spos_fast.ops import explain
    from spos_fast.pareto import ParetoResult, pareto_search
    from spos_fast.sampling import Constraint, UniformSampler
    from spos_fast.scores import Score
    from spos_fast.spaces import Cost
    from spos_fast.training import Metrics, TrainConfig, train
    from spos_fast.widening import WideningSampler

__version__ = "0.1.0"

_HOME = {
    "Architecture": "architecture",
    "Candidate": "evolution",
    "CheckpointError": "errors",
    "Constraint": "sampling",
    "Cost": "spaces",
    "DistributedEvaluator": "distributed_evaluation",
    "EarlyStopping": "early_stopping",
    "Evaluator": "evaluation",
    "InputError": "errors",
    "IsomorphismSampler": "isomorphism",
    "LatencySettings": "latency",
    "LatencyTable": "latency",
    "Metrics": "training",
    "ParetoResult": "pareto",
    "RankError": "errors",
    "Score": "scores",
    "SearchResult": "evolution",
    "TrainConfig": "training",
    "UniformSampler": "sampling",
    "WideningSampler": "widening",
    "evaluate": "evaluation",
    "evolve": "evolution",
    "explain": "ops",
    "pareto_search": "pareto",
    "random_search": "evolution",
    "recalibrate": "calibration",
    "train": "training",
}
_MODULES = ("analysis", "data", "export", "latency", "nasbench", "nn", "ops", "spaces")

__all__ = [
    "Architecture",
    "Candidate",
    "CheckpointError",
    "Constraint",
    "Cost",
    "DistributedEvaluator",
    "EarlyStopping",
    "Evaluator",
    "InputError",
    "IsomorphismSampler",
    "LatencySettings",
    "LatencyTable",
    "Metrics",
    "ParetoResult",
    "RankError",
    "Score",
    "SearchResult",
    "TrainConfig",
    "UniformSampler",
    "WideningSampler",
    "evaluate",
    "evolve",
    "explain",
    "pareto_search",
    "random_search",
    "recalibrate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"spos_fast.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"spos_fast.{name}")
    raise AttributeError(f"module 'spos_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
