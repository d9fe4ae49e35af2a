"""Evolutionary search (arXiv 1904.00420, algorithm 1) and random search under the same budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.sampling import Constraint, UniformSampler
from spos_fast.scores import Score
from spos_fast.spaces import Space

# A child that is known or too expensive is bred again this many times, as in the published code; then the place is
# filled by a random architecture.
TRIES_PER_CHILD = 10
# Where the size of the constrained space is not known: this many known draws in a row for every known architecture, and
# it is taken as exhausted.
_MISSES_PER_KNOWN = 20


@dataclass(frozen=True)
class Candidate:
    """A scored architecture and where it came from.

    Attributes:
        architecture: what was scored.
        score: its score.
        generation: 0 for the first population.
        origin: ``"random"``, ``"mutation"`` or ``"crossover"``; ``"child"`` (either or both) in a Pareto search.
    """

    architecture: Architecture
    score: Score
    generation: int
    origin: str


@dataclass(frozen=True)
class SearchResult:
    """All candidates in the order in which they were scored; none occurs twice."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the highest accuracy; of equals, the one with less loss, then the earlier one."""
        return self.top(1)[0]

    def top(self, k: int) -> list[Candidate]:
        """The k best candidates, best first."""
        return _ranked(self.candidates)[:k]


Evaluate = Callable[[Sequence[Architecture]], Sequence[Score]]


def evolve(
    space: Space,
    evaluate: Evaluate,
    *,
    population: int = 50,
    generations: int = 20,
    top_k: int = 10,
    mutation_probability: float = 0.1,
    crossover: int = 25,
    mutation: int = 25,
    constraint: Constraint | None = None,
    seed: int = 0,
) -> SearchResult:
    """Evolutionary search. The defaults are the paper's and score ``50 + 20 x 50 = 1,050`` architectures.

    The first population is uniformly random. Every further one holds ``crossover`` children of two parents each (every
    gene from either with equal probability), ``mutation`` children of one parent (every gene drawn anew with
    ``mutation_probability``) and random architectures in the places that are left. Parents are the ``top_k`` best of
    all generations so far. No architecture is scored twice and all satisfy the constraint. The search is a function of
    its arguments: the same scores and seed give the same result.

    Args:
        space: the search space.
        evaluate: scores of a sequence of architectures, e.g. an :class:`spos_fast.Evaluator`.
        population: architectures a generation.
        generations: generations after the first population.
        top_k: number of parents.
        mutation_probability: chance of a gene to be drawn anew (the same choice may come out, as published).
        crossover, mutation: children of either kind a generation; together at most ``population``.
        constraint: ranges of cost.
        seed: of all random choices.

    Returns:
        Fewer candidates than the budget if the constrained space has no more.

    Raises:
        InputError: numbers that make no search, or an infeasible constraint.
    """
    _check_positive(population=population, top_k=top_k)
    check_not_negative(generations=generations, crossover=crossover, mutation=mutation, seed=seed)
    if not 0 <= mutation_probability <= 1:
        raise InputError(f"mutation_probability: got {mutation_probability}; expected 0 to 1")
    if crossover + mutation > population:
        raise InputError(
            f"crossover, mutation: {crossover} + {mutation} children do not fit into a population of {population}"
        )
    rng = np.random.default_rng([seed, 0])
    fresh = Fresh(space, constraint, rng)
    candidates: list[Candidate] = []
    batch = [(arch, "random") for arch in fresh.random(population)]
    for generation in range(generations + 1):
        if generation:
            parents = [candidate.architecture.genes for candidate in _ranked(candidates)[:top_k]]
            batch = [(arch, "crossover") for arch in fresh.bred(crossover, partial(_cross, rng, parents))]
            mutate = partial(_mutate, rng, parents, space, mutation_probability)
            batch += [(arch, "mutation") for arch in fresh.bred(mutation, mutate)]
            batch += [(arch, "random") for arch in fresh.random(population - len(batch))]
        if not batch:
            break
        scores = evaluate([arch for arch, _ in batch])
        candidates += [
            Candidate(arch, score, generation, origin) for (arch, origin), score in zip(batch, scores, strict=True)
        ]
    return SearchResult(tuple(candidates))


def random_search(
    space: Space,
    evaluate: Evaluate,
    budget: int,
    *,
    population: int = 50,
    constraint: Constraint | None = None,
    seed: int = 0,
) -> SearchResult:
    """Score ``budget`` different uniformly random architectures, ``population`` at a time.

    Args and errors as :func:`evolve`; give it the number of candidates that evolution scored for a fair comparison.
    """
    _check_positive(budget=budget, population=population)
    check_not_negative(seed=seed)
    fresh = Fresh(space, constraint, np.random.default_rng([seed, 1]))
    candidates: list[Candidate] = []
    for generation in range(-(-budget // population)):
        archs = fresh.random(min(population, budget - len(candidates)))
        if not archs:
            break
        candidates += [
            Candidate(arch, score, generation, "random") for arch, score in zip(archs, evaluate(archs), strict=True)
        ]
    return SearchResult(tuple(candidates))


class Fresh:
    """Hands out architectures that satisfy the constraint, each at most once."""

    def __init__(self, space: Space, constraint: Constraint | None, rng: np.random.Generator) -> None:
        self.space, self.rng = space, rng
        self.constraint = constraint or Constraint()
        self.sampler = UniformSampler(space, constraint)
        self.seen: set[Architecture] = set()
        self.none_left = False

    def random(self, n: int) -> list[Architecture]:
        """Up to n new random architectures; fewer only when no more are left."""
        out: list[Architecture] = []
        count = self.sampler.count
        # Draws may be slow, and every generation asks again: what was found to be the end of the space stays it.
        self.none_left = self.none_left or len(self.seen) == count
        misses = 0
        while len(out) < n and not self.none_left:
            arch = self.sampler.sample(self.rng)
            misses += 1
            if arch not in self.seen:
                misses = 0
                self.seen.add(arch)
                out.append(arch)
            # With an unknown count, a long run of known draws is taken as the end of the space: if one architecture
            # were left, it would be missed with a probability of exp(-_MISSES_PER_KNOWN) at most.
            unlikely = count is None and misses >= _MISSES_PER_KNOWN * (len(self.seen) + 1)
            self.none_left = unlikely or len(self.seen) == count
        return out

    def bred(self, n: int, breed: Callable[[], tuple[int, ...]]) -> Iterator[Architecture]:
        """Up to n new children within the constraint, out of ``10 n`` tries."""
        made = 0
        for _ in range(TRIES_PER_CHILD * n):
            if made == n:
                return
            arch = Architecture(self.space.name, breed())
            if self.admit(arch):
                made += 1
                yield arch

    def admit(self, arch: Architecture) -> bool:
        """Whether an architecture is new and within the constraint; it is not new any more then."""
        if arch in self.seen or not self.constraint.allows(self.space.cost(arch)):
            return False
        self.seen.add(arch)
        return True


def _ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    def order(candidate: Candidate) -> tuple[float, float]:
        loss = candidate.score.loss
        # A NaN loss would make the order depend on the order of comparison.
        return -candidate.score.accuracy, loss if loss == loss else np.inf

    return sorted(candidates, key=order)


def _cross(rng: np.random.Generator, parents: list[tuple[int, ...]]) -> tuple[int, ...]:
    first, second = parents[rng.integers(len(parents))], parents[rng.integers(len(parents))]
    return tuple(a if take else b for a, b, take in zip(first, second, rng.random(len(first)) < 0.5, strict=True))


def _mutate(
    rng: np.random.Generator, parents: list[tuple[int, ...]], space: Space, probability: float
) -> tuple[int, ...]:
    parent = parents[rng.integers(len(parents))]
    return tuple(
        int(rng.integers(len(candidates))) if change else gene
        for gene, candidates, change in zip(parent, space.choices, rng.random(len(parent)) < probability, strict=True)
    )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name}: got {value}; expected a positive number")


def check_not_negative(**values: int) -> None:
    """Refuse negative settings, naming the first."""
    for name, value in values.items():
        if value < 0:
            raise InputError(f"{name}: got {value}; expected 0 or more")
