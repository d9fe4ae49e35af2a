"""What is written and said while the stages of a run are at work: recorded scores, and a listener for progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spos_fast.architecture import Architecture
from spos_fast.checkpoint import Records
from spos_fast.distributed import Exchange
from spos_fast.early_stopping import EarlyStopping
from spos_fast.errors import CheckpointError
from spos_fast.scores import Score
from spos_fast.spaces import Space
from spos_fast.training import Metrics


class Listener:
    """Hears what a stage does; the command line draws progress from it. Every method may be overridden."""

    def resumed(self, stage: str, done: int, total: int) -> None:
        """A stage begins with ``done`` of ``total`` steps or candidates behind it."""

    def decoded(self, part: str, done: int, total: int) -> None:
        """Images of the calibration or validation set are read."""

    def metrics(self, stage: str, metrics: Metrics) -> None:
        """Training goes on."""

    def candidate(self, phase: str, number: int, total: int, score: Score, best: Score) -> None:
        """Candidate ``number`` of at most ``total`` is scored."""

    def generation(self, phase: str, done: int, total: int) -> None:
        """All candidates that were scored together are told of: ``done`` of at most ``total``."""

    def retrained(self, label: str, result: dict[str, Any]) -> None:
        """An architecture is retrained and tested."""


class RecordsOfRankZero:
    """The records of rank 0 on another rank: the same rows, and no file.

    Attributes:
        rows: what the file held when the search began, and what came since.
    """

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.path, self.rows = path, rows

    def append(self, row: dict[str, Any]) -> None:
        """Add a row that rank 0 writes."""
        self.rows.append(row)


def shared_records(path: Path, exchange: Exchange) -> Records | RecordsOfRankZero:
    """A file of records that rank 0 reads and writes, so that all ranks replay the same.

    Raises:
        CheckpointError: on rank 0, the file is damaged.
    """
    records = Records(path) if exchange.rank == 0 else None
    rows = exchange.broadcast(records and records.rows)
    return records or RecordsOfRankZero(path, rows)


class RecordedScores:
    """Scores a generation at a time and records it at once, so that a killed search loses at most one.

    The search is replayed from the start on resuming; candidates that are on record are not scored again. A candidate
    that two phases meet is scored once, unless it was stopped early: every phase has a bar of its own.
    """

    def __init__(
        self,
        records: Records | RecordsOfRankZero,
        evaluator: Callable[[Sequence[Architecture]], Sequence[Score]],
        space: Space,
        listener: Listener,
        budget: int,
        early_stopping: EarlyStopping | None = None,
    ) -> None:
        self.records, self.evaluator, self.space, self.listener, self.budget = (
            records,
            evaluator,
            space,
            listener,
            budget,
        )
        for number, row in enumerate(records.rows, 1):
            if not isinstance(row, dict) or not {"phase", "genes", "accuracy", "loss", "images"} <= set(row):
                raise CheckpointError(f"{records.path}: line {number} is no scored candidate; the file is damaged")
        self.early_stopping = early_stopping
        # Of all phases; without candidates that were stopped early.
        self.completed: dict[tuple[int, ...], Score] = {}
        for row in records.rows:
            self._keep(tuple(row["genes"]), _score(row))

    def phase(self, name: str) -> Callable[[Sequence[Architecture]], list[Score]]:
        """The scoring function of one phase; it must be asked for the same candidates as the time before."""
        recorded = [row for row in self.records.rows if row["phase"] == name]
        self.listener.resumed(name, len(recorded), self.budget)
        known = {tuple(row["genes"]): _score(row) for row in recorded}
        scored: list[Score] = []
        if self.early_stopping is not None:
            self.early_stopping.forget()

        def score_all(archs: Sequence[Architecture]) -> list[Score]:
            first = len(scored)
            for number, (arch, row) in enumerate(zip(archs, recorded[first:], strict=False), first):
                if tuple(row["genes"]) != arch.genes:
                    raise CheckpointError(
                        f"{self.records.path}: candidate {number} of {name} is of another search; use another folder"
                    )
            unknown = [arch for arch in archs if arch.genes not in known and arch.genes not in self.completed]
            if unknown:
                for arch, score in zip(unknown, self.evaluator(unknown), strict=True):
                    known[arch.genes] = score
                    self._keep(arch.genes, score)
            for arch in archs:
                scored.append(known.get(arch.genes) or self.completed[arch.genes])
                if len(scored) > len(recorded):
                    record(arch)
            if len(scored) > len(recorded):
                self.listener.generation(name, len(scored), self.budget)
            if self.early_stopping is not None:
                self.early_stopping.learn(archs, scored[first:])
            return scored[first:]

        def record(arch: Architecture) -> None:
            self.records.append(
                {
                    "phase": name,
                    "number": len(scored) - 1,
                    "genes": list(arch.genes),
                    **dataclasses.asdict(scored[-1]),
                    **self.space.cost(arch).known(),
                }
            )
            best = max(scored, key=lambda s: s.accuracy)
            self.listener.candidate(name, len(scored), self.budget, scored[-1], best)

        return score_all

    def _keep(self, genes: tuple[int, ...], score: Score) -> None:
        if not score.stopped:
            self.completed[genes] = score


def _score(row: dict[str, Any]) -> Score:
    return Score(**{field.name: row[field.name] for field in dataclasses.fields(Score) if field.name in row})
