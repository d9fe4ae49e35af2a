"""Reads a run folder into plain values, whatever it holds so far, without changing it.

Another process may be working in the folder: a last line that is still being written is left out, and nothing is
locked, cut or created. Whatever cannot be read is named in :attr:`RunData.problems` instead of stopping the reader.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spos_fast.architecture import integer_genes
from spos_fast.checkpoint import read_json
from spos_fast.config import SECTIONS, Config
from spos_fast.config_io import config_from
from spos_fast.errors import CheckpointError, InputError
from spos_fast.training import Metrics

T = TypeVar("T")

# What a reader of outside rows may meet: a missing key, a value of another type, a value out of range.
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class Scored:
    """One candidate of a search.

    Attributes:
        genes: choice index of every gene.
        accuracy: share of validation images, with the supernet's weights; NaN is possible in damaged runs.
        loss: mean cross-entropy on the same images.
        images: number of validation images.
        macs, params: cost.
        generation: number of the population; counted from the settings while the search has not finished.
        origin: random, crossover, mutation or child; empty while the search has not finished.
        bitops: bit operations, of a quantized space.
        latency_ms: predicted latency, of a search with a latency table.
        failed: whether it gave NaN or infinity.
        stopped: whether early stopping dropped it; its accuracy is then that of the images seen until then.
    """

    genes: tuple[int, ...]
    accuracy: float
    loss: float
    images: int
    macs: int
    params: int
    generation: int
    origin: str = ""
    bitops: int | None = None
    latency_ms: float | None = None
    failed: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class Tested:
    """How a retrained network did on the test part."""

    genes: tuple[int, ...]
    macs: int
    params: int
    accuracy: float
    loss: float
    images: int
    bitops: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Retrained:
    """One architecture that is or was trained on its own.

    Attributes:
        label: name of its folder.
        metrics: rows of its training.
        result: None while its training has not finished.
    """

    label: str
    metrics: tuple[Metrics, ...]
    result: Tested | None


@dataclass(frozen=True)
class RunData:
    """What a run folder holds.

    Attributes:
        path: the folder.
        config: its settings, defaults for stages that have not begun.
        sections: names of the settings that the folder stores.
        choices: for every gene the names of its candidates; those of uniform networks beside the search come last.
        layer_names: for every layer what to call it.
        kinds: what the genes of a layer decide: block, width, bits, op.
        searched: for every kind how many of its names are searched.
        stages: layers of every stage; empty where the space has none.
        baselines: genes of the uniform networks of the comparison, by label.
        supernet: rows of the supernet's training.
        evolution, random_search, pareto: candidates in the order in which they were scored.
        front: what the Pareto search found, in the order of its labels; empty while the search has not finished.
        search_finished: whether the search wrote its result.
        retrained: in the order of the comparison: evolution, random search, the Pareto front, baselines, random ones,
            others.
        problems: what could not be read, one sentence each.
    """

    path: Path
    config: Config
    sections: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    layer_names: tuple[str, ...]
    kinds: tuple[str, ...]
    searched: dict[str, int]
    stages: tuple[int, ...]
    baselines: dict[str, tuple[int, ...]]
    supernet: tuple[Metrics, ...]
    evolution: tuple[Scored, ...]
    random_search: tuple[Scored, ...]
    pareto: tuple[Scored, ...]
    front: tuple[Scored, ...]
    search_finished: bool
    retrained: tuple[Retrained, ...]
    problems: tuple[str, ...]

    @property
    def scored(self) -> tuple[Scored, ...]:
        """The candidates of all searches."""
        return (*self.evolution, *self.random_search, *self.pareto)

    @property
    def budget(self) -> int:
        """Most candidates that one phase of the search scores."""
        return self.config.search.population * (self.config.search.generations + 1)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.choices) // len(self.kinds)

    def names(self, kind: str) -> tuple[str, ...]:
        """Names of the choices of one of :attr:`kinds`."""
        return self.choices[self.kinds.index(kind)]

    def of_kind(self, kind: str, genes: Sequence[int]) -> Sequence[int]:
        """The genes of one of :attr:`kinds`, one a layer."""
        return genes[self.kinds.index(kind) :: len(self.kinds)]


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        InputError: it is no run folder, or its settings are not those of this program.
    """
    path = Path(path)
    try:
        stored = read_json(path / "config.json")
    except CheckpointError as error:
        raise InputError(f"run: {path} is not a run folder ({error}); name one that train or demo made") from None
    if not isinstance(stored, dict):
        raise InputError(f"run: {path / 'config.json'} holds no settings")
    config = config_from(stored, str(path / "config.json"))
    # The names of the choices depend on neither images nor classes, so the data set is not loaded for them.
    space = config.space.make(input_size=config.data.input_size, in_channels=1, num_classes=2)
    baselines = {label: arch.genes for label, arch in space.baselines().items()}
    choices = tuple(space.candidates(gene) for gene in range(len(space.choices)))
    reader = _Reader(path, choices, tuple(baselines))
    phases = {name: reader.phase(name, config.search.population) for name in ("evolution", "random_search", "pareto")}
    return RunData(
        path=path,
        config=config,
        sections=tuple(name for name in SECTIONS if name in stored),
        choices=choices,
        layer_names=space.layer_names,
        kinds=space.kinds,
        searched=dict(zip(space.kinds, map(len, space.choices), strict=False)),
        stages=tuple(space.config().get("stage_repeats", ())),
        baselines=baselines,
        supernet=reader.metrics("supernet", config.train.steps),
        evolution=phases["evolution"],
        random_search=phases["random_search"],
        pareto=phases["pareto"],
        front=reader.rows("search/front.json"),
        search_finished=(path / "search" / "best.json").exists(),
        retrained=reader.retrained(config.retrain.steps),
        problems=tuple(reader.problems),
    )


class _Reader:
    def __init__(self, path: Path, choices: tuple[tuple[str, ...], ...], baselines: tuple[str, ...]) -> None:
        self.path, self.choices, self.baselines = path, choices, baselines
        self.problems: list[str] = []
        self._recorded: list[dict[str, Any]] | None = None

    def metrics(self, stage: str, steps: int) -> tuple[Metrics, ...]:
        name = f"{stage}/metrics.jsonl"
        rows = self._understood(name, self._lines(name), lambda row: _metrics(row, steps))
        return tuple(sorted(rows, key=lambda row: row.step))

    def rows(self, name: str) -> tuple[Scored, ...]:
        """Candidates of a list that a finished search wrote; none if there is none."""
        rows = self._document(name) if (self.path / name).exists() else None
        if not isinstance(rows, list):
            return ()
        return tuple(self._understood(name, rows, lambda row: self._scored(row, row["generation"])))

    def phase(self, name: str, population: int) -> tuple[Scored, ...]:
        """Candidates of one phase: the finished list if there is one, what is on record otherwise."""
        finished = f"search/{name}.json"
        if (self.path / finished).exists() and (whole := self.rows(finished)):
            return whole
        if self._recorded is None:
            self._recorded = self._lines("search/candidates.jsonl")
        rows = [row for row in self._recorded if row.get("phase") == name]
        return tuple(
            self._understood(
                "search/candidates.jsonl", rows, lambda row: self._scored(row, int(row["number"]) // population)
            )
        )

    def retrained(self, steps: int) -> tuple[Retrained, ...]:
        folder = self.path / "retrain"
        labels = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
        return tuple(self._one_retrained(label, steps) for label in sorted(labels, key=self._order))

    def _one_retrained(self, label: str, steps: int) -> Retrained:
        name = f"retrain/{label}/result.json"
        document = self._document(name) if (self.path / name).exists() else None
        results = self._understood(name, [document], self._test_result) if document is not None else []
        return Retrained(label, self.metrics(f"retrain/{label}", steps), results[0] if results else None)

    def _order(self, label: str) -> tuple[int, int, str]:
        numbered = re.fullmatch(r"(pareto|random)_(\d{1,9})", label)
        if label in ("evolution", "random_search"):
            return 0, int(label == "random_search"), label
        if label in self.baselines:
            return 2, self.baselines.index(label), label
        return ({"pareto": 1, "random": 3}[numbered[1]], int(numbered[2]), label) if numbered else (4, 0, label)

    def _scored(self, row: dict[str, Any], generation: Any) -> Scored:
        return Scored(
            genes=self._genes(row["genes"]),
            accuracy=float(row["accuracy"]),
            loss=float(row["loss"]),
            images=int(row["images"]),
            macs=int(row["macs"]),
            params=int(row["params"]),
            generation=int(generation),
            origin=str(row.get("origin", "")),
            bitops=_bitops(row),
            latency_ms=_latency(row),
            failed=bool(row.get("failed", False)),
            stopped=bool(row.get("stopped", False)),
        )

    def _test_result(self, row: dict[str, Any]) -> Tested:
        return Tested(
            genes=self._genes(row["architecture"]),
            macs=int(row["macs"]),
            params=int(row["params"]),
            accuracy=float(row["test_accuracy"]),
            loss=float(row["test_loss"]),
            images=int(row["test_images"]),
            bitops=_bitops(row),
            latency_ms=_latency(row),
        )

    def _genes(self, value: Any) -> tuple[int, ...]:
        genes = integer_genes(value)
        fits = len(genes) == len(self.choices)
        if not fits or not all(0 <= gene < len(names) for gene, names in zip(genes, self.choices, strict=True)):
            raise InputError(f"genes: {genes} is not of the run's space")
        return genes

    def _understood(self, name: str, rows: list[Any], convert: Callable[[Any], T]) -> list[T]:
        """The rows that can be converted; the others are counted as a problem of the file."""
        out: list[T] = []
        for row in rows:
            try:
                out.append(convert(row))
            except _MALFORMED:
                continue
        if len(out) < len(rows):
            self.problems.append(f"{name}: {len(rows) - len(out)} of {len(rows)} entries could not be understood")
        return out

    def _document(self, name: str) -> Any:
        try:
            return read_json(self.path / name)
        except CheckpointError as error:
            self.problems.append(str(error))
            return None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Objects of a JSON-lines file; what follows the last line break is still being written."""
        try:
            content = (self.path / name).read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.problems.append(f"{name}: could not be read ({error.strerror or error})")
            return []
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
        if len(rows) < len(lines):
            self.problems.append(f"{name}: {len(lines) - len(rows)} of {len(lines)} lines are not JSON objects")
        return rows


def _bitops(row: dict[str, Any]) -> int | None:
    value = row.get("bitops")
    return None if value is None else int(value)


def _latency(row: dict[str, Any]) -> float | None:
    value = row.get("latency_ms")
    return None if value is None else float(value)


def _metrics(row: dict[str, Any], steps: int) -> Metrics:
    values = {field.name: float(row[field.name]) for field in dataclasses.fields(Metrics) if field.name != "steps"}
    return Metrics(**{**values, "step": int(row["step"]), "steps": steps})  # type: ignore[arg-type]
