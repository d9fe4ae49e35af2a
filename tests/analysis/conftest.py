"""Run folders as the pipeline leaves them, made without training: a real search over an invented accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spos_fast.architecture import Architecture
from spos_fast.config_io import config_from, plain
from spos_fast.evolution import Candidate, evolve, random_search
from spos_fast.scores import Score
from spos_fast.spaces import Space

SMALL = {
    "seed": 3,
    "data": {"name": "digits"},
    "space": {
        "stem_stride": 1,
        "stage_channels": [32, 64, 128],
        "stage_repeats": [2, 3, 2],
        "stage_strides": [1, 2, 2],
        "head_channels": 256,
    },
    "train": {"steps": 3000, "batch_size": 64},
    "search": {"population": 20, "generations": 10, "top_k": 5, "crossover": 10, "mutation": 10},
    "retrain": {"steps": 1000, "batch_size": 64},
}
PAPER = {
    "seed": 0,
    "data": {"name": "imagenet", "path": "/data/imagenet"},
    "train": {"steps": 150000, "batch_size": 1024, "lr": 0.5},
    "search": {"macs_min": 290e6, "macs_max": 330e6},
    "retrain": {"steps": 300000, "batch_size": 1024, "lr": 0.5, "random_architectures": 2},
}
STAGES = ("train", "search", "retrain")


def write_run(
    folder: Path,
    settings: dict[str, Any] = SMALL,
    stages: Sequence[str] = STAGES,
    *,
    images: int = 360,
    input_size: int = 8,
    classes: int = 10,
    level: float = 0.95,
    spread: float = 0.05,
    rows: int = 60,
    custom: Sequence[str] = (),
) -> Path:
    """A run folder whose ``stages`` have finished. Accuracies lie around ``level``, ``spread`` apart."""
    config = config_from(settings, "test")
    space = config.space.make(input_size=input_size, in_channels=3, num_classes=classes)
    rng = np.random.default_rng(7)
    stored = plain(config)
    kept = {"seed", "data", "space", *stages[: STAGES.index(stages[-1]) + 1]} if stages else {"seed"}
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", {name: value for name, value in stored.items() if name in kept})
    if "train" in stages:
        _lines(folder / "supernet/metrics.jsonl", _metrics(rng, config.train.steps, rows, classes, level - 0.15, 0.05))
    taste = rng.normal(size=(len(space.choices), max(map(len, space.choices))))
    taste[:, :4] += [0.0, 0.25, 0.35, 0.0][: taste.shape[1]]

    def accuracy(arch: Architecture) -> float:
        fit = float(np.mean([taste[layer, gene] for layer, gene in enumerate(arch.genes)])) * len(arch.genes) ** 0.5
        noise = float(np.random.default_rng(list(arch.genes)).normal()) * 0.3
        return round(images * min(1.0, max(0.0, level + spread * (fit + noise - 2) / 3))) / images

    def score(archs: Sequence[Architecture]) -> list[Score]:
        return [Score(accuracy(arch), 2.5 * (1.02 - accuracy(arch)), images) for arch in archs]

    chosen: dict[str, Architecture] = {}
    if "search" in stages:
        s = config.search
        found = evolve(
            space, score, population=s.population, generations=s.generations, top_k=s.top_k, crossover=s.crossover,
            mutation=s.mutation, constraint=s.constraint, seed=config.seed,
        )  # fmt: skip
        rivals = random_search(
            space, score, len(found.candidates), population=s.population, constraint=s.constraint, seed=config.seed
        )
        records = []
        for phase, result in (("evolution", found), ("random_search", rivals)):
            documents = [_row(space, candidate) for candidate in result.candidates]
            _json(folder / f"search/{phase}.json", documents)
            for number, row in enumerate(documents):
                plain_row = {key: value for key, value in row.items() if key not in ("generation", "origin")}
                records.append({"phase": phase, "number": number, **plain_row})
            chosen[phase] = result.best.architecture
        _lines(folder / "search/candidates.jsonl", records)
        best = {"evolution": _row(space, found.best), "random_search": _row(space, rivals.best)}
        _json(folder / "search/best.json", best)
    if "retrain" in stages:
        chosen |= space.baselines()
        chosen |= {f"random_{n}": space.sample(rng) for n in range(config.retrain.random_architectures)}
        chosen |= {label: space.sample(rng) for label in custom}
        for label, arch in chosen.items():
            final = min(0.998, accuracy(arch) + 0.2 * (1 - accuracy(arch)))
            curve = _metrics(rng, config.retrain.steps, rows, classes, final - 0.02, 0.01)
            _lines(folder / "retrain" / label / "metrics.jsonl", curve)
            tested = {
                "label": label,
                "architecture": list(arch.genes),
                **dataclasses.asdict(space.cost(arch)),
                "test_accuracy": round(final * images) / images,
                "test_loss": 1.5 * (1.01 - final),
                "test_images": images,
            }
            _json(folder / "retrain" / label / "result.json", tested)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """:func:`write_run` into a folder of the test's own, ``name`` below it."""

    def make(*args: Any, name: str = "demo", **options: Any) -> Path:
        return write_run(tmp_path / name, *args, **options)

    return make


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 7 layers. Tests that change a folder make their own."""
    return write_run(tmp_path_factory.mktemp("runs") / "full", custom=["genes_0-1-2-3-0-1-2"])


@pytest.fixture(scope="session")
def widths_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 7 layers that searched blocks and widths."""
    settings = {**SMALL, "space": {**SMALL["space"], "channels": [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6]}}
    settings["train"] = {**SMALL["train"], "widening_start": 0.3, "widening_end": 0.6}
    return write_run(tmp_path_factory.mktemp("runs") / "widths", settings)


@pytest.fixture(scope="session")
def paper_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the paper's size: 20 layers, 1,050 candidates of evolution and as many random ones."""
    folder = tmp_path_factory.mktemp("runs") / "paper"
    return write_run(folder, PAPER, images=50000, input_size=224, classes=1000, level=0.70, spread=0.03, rows=300)


def _metrics(
    rng: np.random.Generator, steps: int, rows: int, classes: int, final: float, noise: float
) -> list[dict[str, Any]]:
    out = []
    for number in range(1, rows + 1):
        done = number / rows
        rise = 1 - np.exp(-5 * done)
        out.append(
            {
                "step": steps * number // rows,
                "loss": float(np.log(classes) * (1 - rise) + 0.6 + rng.normal() * noise),
                "accuracy": float(np.clip(final * rise + rng.normal() * noise / 2, 0, 1)),
                "lr": 0.1 * (1 - done),
                "images_per_second": float(900 + rng.normal() * 20),
            }
        )
    return out


def _row(space: Space, candidate: Candidate) -> dict[str, Any]:
    return {
        "genes": list(candidate.architecture.genes),
        "generation": candidate.generation,
        "origin": candidate.origin,
        **dataclasses.asdict(candidate.score),
        **dataclasses.asdict(space.cost(candidate.architecture)),
    }


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
