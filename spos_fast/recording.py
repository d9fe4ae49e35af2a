"""What is written and said while the stages of a run are at work: recorded scores, and a listener for progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from spos_fast.architecture import Architecture
from spos_fast.checkpoint import Records
from spos_fast.errors import CheckpointError
from spos_fast.evaluation import Evaluator, Score
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

    def retrained(self, label: str, result: dict[str, Any]) -> None:
        """An architecture is retrained and tested."""


class RecordedScores:
    """Scores candidates one by one and records each at once, so that a killed search loses at most one.

    The search is replayed from the start on resuming; candidates that are on record are not scored again. A candidate
    that two phases meet is scored once.
    """

    def __init__(self, records: Records, evaluator: Evaluator, space: Space, listener: Listener, budget: int) -> None:
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
        self.known = {tuple(row["genes"]): Score(row["accuracy"], row["loss"], row["images"]) for row in records.rows}

    def phase(self, name: str) -> Callable[[Sequence[Architecture]], list[Score]]:
        """The scoring function of one phase; it must be asked for the same candidates as the time before."""
        recorded = [row for row in self.records.rows if row["phase"] == name]
        self.listener.resumed(name, len(recorded), self.budget)
        scored: list[Score] = []

        def score_all(archs: Sequence[Architecture]) -> list[Score]:
            return [one(arch) for arch in archs]

        def one(arch: Architecture) -> Score:
            number = len(scored)
            if number < len(recorded):
                if tuple(recorded[number]["genes"]) != arch.genes:
                    raise CheckpointError(
                        f"{self.records.path}: candidate {number} of {name} is of another search; use another folder"
                    )
                scored.append(self.known[arch.genes])
                return scored[-1]
            score = self.known.get(arch.genes) or self.evaluator([arch])[0]
            self.known[arch.genes] = score
            cost = self.space.cost(arch)
            self.records.append(
                {
                    "phase": name,
                    "number": number,
                    "genes": list(arch.genes),
                    **dataclasses.asdict(score),
                    **cost.known(),
                }
            )
            scored.append(score)
            best = max(scored, key=lambda s: s.accuracy)
            self.listener.candidate(name, number + 1, self.budget, score, best)
            return score

        return score_all
