"""Search for several objectives at once: NSGA-II (Deb et al. 2002) of Optuna, under the rules of the other searches."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.evolution import TRIES_PER_CHILD, Candidate, Evaluate, Fresh, check_not_negative
from spos_fast.sampling import Constraint
from spos_fast.scores import Score
from spos_fast.spaces import METRICS, Space
from spos_fast.spaces.base import without_metric

OBJECTIVES = ("accuracy", *METRICS)


@dataclass(frozen=True)
class ParetoResult:
    """All candidates of a search for several objectives, in the order in which they were scored; none occurs twice.

    Attributes:
        candidates: what was scored.
        objectives: their names; accuracy is to be high, costs are to be low.
        values: of every candidate one number an objective; the worst there are (accuracy 0, infinite costs) if it
            failed.
    """

    candidates: tuple[Candidate, ...]
    objectives: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def front(self) -> list[Candidate]:
        """The candidates that no other one beats (as good in every objective, better in one), by their first cost,
        cheapest first. Of equal ones only the earliest is there, and none that failed.
        """
        costs = [index for index, name in enumerate(self.objectives) if name != "accuracy"]
        chosen = sorted(self._unbeaten(), key=lambda number: [self.values[number][index] for index in costs])
        return [self.candidates[number] for number in chosen]

    def _unbeaten(self) -> list[int]:
        signs = [-1.0 if name == "accuracy" else 1.0 for name in self.objectives]
        losses = np.array(self.values).reshape(-1, len(signs)) * signs
        kept = []
        for number, own in enumerate(losses):
            not_worse = (losses <= own).all(1)
            beaten = (not_worse & (losses < own).any(1)).any()
            repeated = (losses[:number] == own).all(1).any()
            if not (beaten or repeated or _failed(self.candidates[number].score)):
                kept.append(number)
        return kept


def pareto_search(
    space: Space,
    evaluate: Evaluate,
    objectives: Sequence[str] = ("accuracy", "macs"),
    *,
    population: int = 50,
    generations: int = 20,
    constraint: Constraint | None = None,
    seed: int = 0,
) -> ParetoResult:
    """Search for the best compromises between accuracy and cost, e.g. between accuracy and latency.

    The first population is uniformly random within the constraint. Every further one is bred by Optuna's NSGA-II with
    its defaults (uniform crossover, one gene mutated on average, non-dominated sorting and crowding distance). As in
    :func:`spos_fast.evolve`, a child that is known or outside of the constraint is bred again, 10 times at most; a
    random architecture then takes its place. A whole generation is scored at once. The same scores and seed give the
    same result with the same version of Optuna.

    Args:
        space: the search space.
        evaluate: scores of a sequence of architectures, e.g. an :class:`spos_fast.Evaluator`.
        objectives: ``"accuracy"`` and at least one of ``"macs"``, ``"params"``, ``"bitops"`` (for a quantized space),
            ``"latency_ms"`` (for a space with a latency table).
        population: architectures a generation, at least 2.
        generations: generations after the first population.
        constraint: ranges of cost.
        seed: of all random choices.

    Returns:
        Fewer candidates than ``population * (generations + 1)`` if the constrained space has no more.

    Raises:
        InputError: Optuna is not installed, settings that make no search, or an infeasible constraint.
    """
    objectives = check_objectives(objectives)
    require_optuna()
    for name in objectives:
        if name != "accuracy" and name not in space.cost_tables:
            raise InputError(f"objectives: {without_metric(name)}")
    if population < 2:
        raise InputError(f"population: got {population}; crossover needs at least 2")
    check_not_negative(generations=generations, seed=seed)
    rng = np.random.default_rng([seed, 3])
    fresh = Fresh(space, constraint, rng)
    breeder = _Breeder(space, fresh, objectives, population, int(rng.integers(2**32)))
    candidates: list[Candidate] = []
    values: list[tuple[float, ...]] = []
    for generation in range(generations + 1):
        batch = breeder.generation(first=generation == 0)
        if not batch:
            break
        scores = evaluate([arch for arch, _ in batch])
        scored = [
            Candidate(arch, score, generation, origin) for (arch, origin), score in zip(batch, scores, strict=True)
        ]
        measured = [_values(space, candidate.architecture, candidate.score, objectives) for candidate in scored]
        breeder.learn(measured)
        candidates += scored
        values += measured
    return ParetoResult(tuple(candidates), objectives, tuple(values))


def check_objectives(objectives: Sequence[str]) -> tuple[str, ...]:
    """The objectives as a tuple.

    Raises:
        InputError: they are no two or more different ones with accuracy among them.
    """
    names = (objectives,) if isinstance(objectives, str) else tuple(objectives)
    for name in names:
        if name not in OBJECTIVES:
            raise InputError(f"objectives: got {name!r}; expected some of {', '.join(OBJECTIVES)}")
    if len(names) < 2 or "accuracy" not in names or len(set(names)) < len(names):
        raise InputError(f"objectives: got {', '.join(names) or 'none'}; expected accuracy and one or more other ones")
    return names


def require_optuna() -> None:
    """Say what to install where a Pareto search could not run.

    Raises:
        InputError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("objectives: a search for several needs Optuna; pip install 'spos-fast[pareto]'")


class _Breeder:
    """Optuna's sampler, asked for a generation at a time and told its values."""

    def __init__(self, space: Space, fresh: Fresh, objectives: tuple[str, ...], population: int, seed: int) -> None:
        import optuna  # here, so that it is needed by nothing else

        self.space, self.fresh, self.population = space, fresh, population
        directions: Any = ["maximize" if name == "accuracy" else "minimize" for name in objectives]
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
        try:
            sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
            self._study = optuna.create_study(directions=directions, sampler=sampler)
        finally:
            optuna.logging.set_verbosity(verbosity)
        self._refused = optuna.trial.TrialState.FAIL
        self._genes: dict[str, Any] = {
            f"gene_{number}": optuna.distributions.CategoricalDistribution(range(len(names)))
            for number, names in enumerate(space.choices)
        }
        self._trials: list[Any] = []

    def generation(self, first: bool) -> list[tuple[Architecture, str]]:
        """New architectures and where they come from; fewer than a population only when no more are left."""
        self._trials = []
        children = [] if first else [child for _ in range(self.population) if (child := self._child())]
        strangers = self.fresh.random(self.population - len(children))
        for arch in strangers:
            self._study.enqueue_trial(dict(zip(self._genes, arch.genes, strict=True)))
            self._trials.append(self._study.ask(self._genes))
        return [(arch, "child") for arch in children] + [(arch, "random") for arch in strangers]

    def learn(self, values: Sequence[Sequence[float]]) -> None:
        """Values of the last generation's architectures, in their order."""
        for trial, one in zip(self._trials, values, strict=True):
            self._study.tell(trial, one)

    def _child(self) -> Architecture | None:
        for _ in range(TRIES_PER_CHILD):
            trial = self._study.ask(self._genes)
            child = Architecture(self.space.name, tuple(int(trial.params[name]) for name in self._genes))
            if self.fresh.admit(child):
                self._trials.append(trial)
                return child
            self._study.tell(trial, state=self._refused)
        return None


def _values(space: Space, arch: Architecture, score: Score, objectives: tuple[str, ...]) -> tuple[float, ...]:
    if _failed(score):  # its cost alone would put a cheap one on the front, and NaN would have no rank
        return tuple(0.0 if name == "accuracy" else float("inf") for name in objectives)
    known = {"accuracy": score.accuracy, **space.cost(arch).known()}
    return tuple(float(known[name]) for name in objectives)


def _failed(score: Score) -> bool:
    return score.failed or score.accuracy != score.accuracy
