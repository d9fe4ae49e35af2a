"""Search baselines over a benchmark, with a budget in simulated training seconds and many runs at once.

All runs of a method go through the same array operations, so hundreds of them take seconds. On a complete benchmark,
random cells are drawn and cells are mutated as in the official notebook. On a sample, random cells are drawn evenly
from those that it holds, and a child that it does not hold costs nothing and is drawn anew: the same methods on a space
thinned out at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spos_fast.errors import InputError
from spos_fast.nasbench import graphs
from spos_fast.nasbench.graphs import CHOICES, EDGES, Genes
from spos_fast.nasbench.results import CELLS, CellResults

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

# Regularized evolution as in the official notebook, and as in automl/nas_benchmarks.
_POPULATION, _TOURNAMENT = 100, 10
# SPOS (arXiv 1904.00420, section 3.4), the defaults of spos_fast.evolve.
_SPOS_POPULATION, _SPOS_PARENTS, _SPOS_CROSSOVER, _SPOS_PROBABILITY = 50, 10, 25, 0.1
_TRIES_PER_CHILD = 10
_SEEN_BYTES = 64 << 20
_POOL = 1 << 19  # official draws, most of them in the space


@dataclass(frozen=True, eq=False)
class Runs:
    """What many runs of one method did.

    Attributes:
        method: its name.
        seconds: simulated training time when each training has ended, float64 ``[runs, trainings]``, ascending;
            infinite behind the end of a run.
        incumbents: row of the cell with the best validation accuracy seen so far, int64 ``[runs, trainings]``.
    """

    method: str
    seconds: Floats
    incumbents: Rows

    def trainings(self, budget: float) -> Floats:
        """Trainings that ended within the budget: float64 ``[runs]``."""
        # A place without a training ends when the one before it does.
        before = np.concatenate((np.zeros((len(self.seconds), 1)), self.seconds[:, :-1]), axis=1)
        return ((self.seconds <= budget) & (self.seconds > before)).sum(1).astype(np.float64)

    def curve(self, regret: Floats, grid: Floats) -> Floats:
        """Regret of the incumbent at some times.

        Args:
            regret: of every cell, float64 ``[N]``.
            grid: seconds, ``[G]``, ascending.

        Returns:
            float64 ``[runs, G]``; NaN before a run's first training has ended.
        """
        ended = np.stack([np.searchsorted(run, grid, side="right") for run in self.seconds])
        values = regret[np.take_along_axis(self.incumbents, np.maximum(ended - 1, 0), axis=1)]
        return np.where(ended > 0, values, np.nan)


@dataclass(frozen=True, eq=False)
class Regret:
    """What the incumbents are judged by.

    Attributes:
        quantity: ``"test"`` or, where the source has no test accuracy, ``"validation"``.
        values: highest mean accuracy of any cell minus the cell's, float64 ``[N]``.
    """

    quantity: str
    values: Floats


def regret_of(results: CellResults) -> Regret:
    """Regret of every cell by its mean accuracy over the repeats at the longest budget."""
    quantity = "test" if results.has("test") else "validation"
    mean = results.mean(quantity)
    return Regret(quantity, np.nanmax(mean) - mean)


def search(
    results: CellResults, methods: Sequence[str], budget: float, *, runs: int = 500, seed: int = 0
) -> dict[str, Runs]:
    """Run methods many times.

    Every training gives the validation accuracy and the time of a random repeat; methods see nothing else.

    Args:
        results: the cells.
        methods: names in :data:`METHODS`; what one does depends neither on the others nor on their order.
        budget: simulated seconds of training after which a run ends.
        runs: how many of each.
        seed: of all random choices.

    Raises:
        InputError: an unknown method, numbers below 1, or no cell with accuracy and time.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"method: got {method!r}; expected one of {', '.join(METHODS)}")
    for name, value in (("budget", budget), ("runs", runs)):
        if not 1 <= value < np.inf:
            raise InputError(f"{name}: got {value}; expected 1 or more")
    if runs > _MOST_RUNS:
        raise InputError(f"runs: got {runs}; expected {_MOST_RUNS:,} at most")
    bench = _Bench(results, budget, seed)
    shortest = float(bench.time[bench.usable].min())
    if budget < shortest:
        raise InputError(f"budget: got {budget:g} seconds; the shortest training takes {shortest:g}")
    trainings = budget / float(bench.time[bench.usable].mean()) * runs
    if trainings > _MOST_TRAININGS:
        raise InputError(
            f"budget: {budget:g} seconds make about {trainings:.2g} trainings in {runs} runs; "
            f"expected {_MOST_TRAININGS:.0e} at most"
        )
    out = {}
    for method in methods:
        bench.rng = np.random.default_rng([seed, list(METHODS).index(method)])
        out[method] = Runs(method, *METHODS[method](bench, runs))
    return out


# What fits into memory: every run keeps a few numbers a training.
_MOST_RUNS, _MOST_TRAININGS = 100_000, 5e7


class _Bench:
    """Draws cells that the source holds, and trains them."""

    def __init__(self, results: CellResults, budget: float, seed: int) -> None:
        self.results, self.budget = results, budget
        self.rng = np.random.default_rng([seed, len(METHODS)])
        self.validation = results.each("validation").astype(np.float64)
        self.time = results.each("time").astype(np.float64)
        self.usable: NDArray[np.bool_] = np.all(np.isfinite(self.validation) & (self.time > 0), axis=1)
        cells = int(self.usable.sum())
        if not cells:
            raise InputError(f"{results.name}: no cell has validation accuracy and training time; nothing to search")
        # Draws at a time for one child: about as many as it takes until the source holds one.
        self.draws = int(np.clip(CELLS / cells, 2, 64))
        self.pool = self._pool()

    def find(self, genes: Genes) -> Rows:
        """Rows of usable cells, -1 for others."""
        rows = self.results.find(genes)
        return np.where(self.usable[rows], rows, -1)

    def _pool(self) -> tuple[Genes, Rows]:
        """Genes and rows of random cells, of which all runs draw."""
        results = self.results
        if not results.complete:
            # Official draws meet small cells far more often than others. Whether those few are in a sample would decide
            # everything, so its cells are drawn evenly.
            rows = np.flatnonzero(self.usable)
            return graphs.genes_of(results.adjacency[rows], results.ops[rows], results.vertices[rows]), rows
        drawn = graphs.random_genes(_POOL, self.rng)
        rows = self.find(drawn)
        return drawn[rows >= 0], rows[rows >= 0]

    def random(self, *shape: int) -> tuple[Genes, Rows]:
        """Genes ``[*shape, 26]`` and rows of random cells."""
        genes, rows = self.pool
        drawn = self.rng.integers(0, len(rows), shape)
        return genes[drawn], rows[drawn]

    def train(self, rows: Rows) -> tuple[Floats, Floats]:
        """Validation accuracy and seconds of one training of each, of a random repeat."""
        repeat = self.rng.integers(0, self.validation.shape[1], rows.shape)
        return self.validation[rows, repeat], self.time[rows, repeat]


def _random_search(bench: _Bench, runs: int) -> tuple[Floats, Rows]:
    log = _Log(bench.budget, runs)
    while log.running:
        _, rows = bench.random(runs, 256)
        log.add(rows, *bench.train(rows))
    return log.finish()


def _regularized_evolution(bench: _Bench, runs: int) -> tuple[Floats, Rows]:
    """Real et al. 2018: the best of a random tournament is mutated, the child replaces the oldest."""
    log = _Log(bench.budget, runs)
    genes, rows = bench.random(runs, _POPULATION)
    accuracy, seconds = bench.train(rows)
    log.add(rows, accuracy, seconds)
    everyone = np.arange(runs)
    oldest = 0
    while log.running:
        entrants = _distinct(bench.rng, runs, _POPULATION, _TOURNAMENT)
        best = entrants[everyone, np.take_along_axis(accuracy, entrants, 1).argmax(1)]
        child, row = _mutants(bench, genes[everyone, best])
        value, cost = bench.train(row)
        genes[:, oldest], accuracy[:, oldest] = child, value
        log.add(row[:, None], value[:, None], cost[:, None])
        oldest = (oldest + 1) % _POPULATION
    return log.finish()


def _spos_evolution(bench: _Bench, runs: int) -> tuple[Floats, Rows]:
    """The evolution of SPOS over 26 genes, some runs at a time: which cells a run has met is kept as one bit map."""
    most = max(1, _SEEN_BYTES // len(bench.results))
    parts = [_spos_part(bench, min(most, runs - start)) for start in range(0, runs, most)]
    width = max(part[0].shape[1] for part in parts)
    seconds = [np.pad(s, ((0, 0), (0, width - s.shape[1])), constant_values=np.inf) for s, _ in parts]
    incumbents = [np.pad(i, ((0, 0), (0, width - i.shape[1])), mode="edge") for _, i in parts]
    return np.concatenate(seconds), np.concatenate(incumbents)


def _spos_part(bench: _Bench, runs: int) -> tuple[Floats, Rows]:
    log, parents = _Log(bench.budget, runs), _Parents(bench.rng, runs)
    seen = np.zeros((runs, len(bench.results)), dtype=bool)
    while log.running:
        genes = np.zeros((runs, _SPOS_POPULATION, len(CHOICES)), dtype=np.int8)
        rows = np.full((runs, _SPOS_POPULATION), -1, dtype=np.int64)
        if parents.ready:
            _breed(bench, genes, rows, seen, slice(0, _SPOS_CROSSOVER), parents.cross)
            _breed(bench, genes, rows, seen, slice(_SPOS_CROSSOVER, _SPOS_POPULATION), parents.mutate)
        _fill(bench, genes, rows, seen)
        if not (rows >= 0).any():  # every run has met all cells that it could
            break
        accuracy, seconds = bench.train(rows)
        accuracy[rows < 0], seconds[rows < 0] = -np.inf, 0.0
        log.add(rows, accuracy, seconds)
        parents.add(genes, accuracy)
    return log.finish()


class _Parents:
    """The best cells that each run has trained so far, and their children."""

    def __init__(self, rng: np.random.Generator, runs: int) -> None:
        self.rng = rng
        self.accuracy = np.full((runs, _SPOS_PARENTS), -np.inf)
        self.genes = np.zeros((runs, _SPOS_PARENTS, len(CHOICES)), dtype=np.int8)

    @property
    def ready(self) -> bool:
        """Whether every run has a parent."""
        return bool(np.isfinite(self.accuracy[:, 0]).all())

    def add(self, genes: Genes, accuracy: Floats) -> None:
        """Take the best of what there is and ``genes`` ``[runs, k, 26]``."""
        pooled = np.concatenate((self.accuracy, accuracy), axis=1)
        order = np.argsort(-pooled, axis=1, kind="stable")[:, :_SPOS_PARENTS]
        self.accuracy = np.take_along_axis(pooled, order, 1)
        self.genes = np.take_along_axis(np.concatenate((self.genes, genes), axis=1), order[:, :, None], 1)

    def _pick(self, runs: Rows) -> Genes:
        known = np.isfinite(self.accuracy[runs]).sum(1)
        return self.genes[runs, self.rng.integers(0, known)]

    def cross(self, runs: Rows) -> Genes:
        """Every gene from either of two parents."""
        either = self.rng.random((len(runs), len(CHOICES)), dtype=np.float32) < 0.5
        return np.where(either, self._pick(runs), self._pick(runs))

    def mutate(self, runs: Rows) -> Genes:
        """Every gene of a parent drawn anew with a small probability."""
        drawn = self.rng.integers(0, CHOICES, (len(runs), len(CHOICES)), dtype=np.int8)
        anew = self.rng.random(drawn.shape, dtype=np.float32) < _SPOS_PROBABILITY
        return np.where(anew, drawn, self._pick(runs))


def _breed(
    bench: _Bench, genes: Genes, rows: Rows, seen: NDArray[np.bool_], places: slice, draw: Callable[[Rows], Genes]
) -> None:
    """Fill empty places of the runs' next generations with children that those runs have not met.

    ``draw`` makes one child for each run it is given. Ten tries a child, as published, and as many more as a sample is
    thinner than the space; what is left empty then is filled at random.
    """
    for _ in range(_TRIES_PER_CHILD // 2):
        run, place = np.nonzero(rows[:, places] < 0)
        if not len(run):
            return
        tried = np.repeat(run, bench.draws)
        child = draw(tried)
        row = bench.find(child)
        row[seen[tried, row]] = -1
        chosen, kept = _first_found(row.reshape(len(run), -1))
        _place(genes, rows, seen, run[chosen], place[chosen] + places.start, child[kept], row[kept])


def _fill(bench: _Bench, genes: Genes, rows: Rows, seen: NDArray[np.bool_]) -> None:
    """Fill the places that are empty still with random cells that those runs have not met, in ten tries."""
    for _ in range(_TRIES_PER_CHILD):
        run, place = np.nonzero(rows < 0)
        if not len(run):
            return
        child, row = bench.random(len(run))
        fresh = ~seen[run, row]
        _place(genes, rows, seen, run[fresh], place[fresh], child[fresh], row[fresh])


def _place(genes: Genes, rows: Rows, seen: NDArray[np.bool_], run: Rows, place: Rows, child: Genes, row: Rows) -> None:
    """Put cells into places, of equal ones of a run the first."""
    _, first = np.unique(run * seen.shape[1] + row, return_index=True)
    run, place = run[first], place[first]
    genes[run, place], rows[run, place] = child[first], row[first]
    seen[run, row[first]] = True


def _mutants(bench: _Bench, parents: Genes) -> tuple[Genes, Rows]:
    """A mutant of each parent that the source holds, drawn until there is one; the parent itself after 1,000 draws."""
    genes = parents.copy()
    rows = np.full(len(parents), -1, dtype=np.int64)
    for _ in range(1000 // bench.draws):
        waiting = np.flatnonzero(rows < 0)
        if not len(waiting):
            return genes, rows
        child = _official_mutation(np.repeat(parents[waiting], bench.draws, axis=0), bench.rng)
        row = bench.find(child)
        chosen, kept = _first_found(row.reshape(len(waiting), -1))
        rows[waiting[chosen]], genes[waiting[chosen]] = row[kept], child[kept]
    left = rows < 0
    rows[left] = bench.find(parents[left])
    return genes, rows


def _first_found(rows: Rows) -> tuple[Rows, Rows]:
    """Lines of ``rows`` ``[K, draws]`` with a row that is not -1, and where the first of each stands, flattened."""
    first = (rows >= 0).argmax(1)
    lines = np.flatnonzero(rows[np.arange(len(rows)), first] >= 0)
    return lines, lines * rows.shape[1] + first[lines]


def _official_mutation(genes: Genes, rng: np.random.Generator) -> Genes:
    """Every edge flips with probability 1/7, every operation becomes another one with probability 1/5 (NASBench.ipynb
    with mutation rate 1).
    """
    out = genes.copy()
    draws = rng.random(genes.shape, dtype=np.float32)
    out[:, :EDGES] ^= draws[:, :EDGES] < 1 / graphs.SIZE
    step = rng.integers(1, 3, (len(genes), len(CHOICES) - EDGES), dtype=np.int8)
    out[:, EDGES:] = (out[:, EDGES:] + step * (draws[:, EDGES:] < 1 / step.shape[1])) % 3
    return out


def _distinct(rng: np.random.Generator, runs: int, size: int, count: int) -> Rows:
    """``count`` different numbers below ``size`` for every run: int64 ``[runs, count]`` (Floyd's algorithm)."""
    out = np.full((runs, count), -1, dtype=np.int64)
    for place, top in enumerate(range(size - count, size)):
        drawn = rng.integers(0, top + 1, runs)
        out[:, place] = np.where((out == drawn[:, None]).any(1), top, drawn)
    return out


class _Log:
    """Seconds and incumbents of all runs, training by training."""

    def __init__(self, budget: float, runs: int) -> None:
        self.budget = budget
        self.spent = np.zeros(runs)
        self.best = np.full(runs, -np.inf)
        self.row = np.zeros(runs, dtype=np.int64)
        self.seconds: list[Floats] = []
        self.rows: list[Rows] = []

    @property
    def running(self) -> bool:
        """Whether any run has budget left."""
        return bool((self.spent < self.budget).any())

    def add(self, rows: Rows, accuracy: Floats, seconds: Floats) -> None:
        """Trainings of every run, ``[runs, k]``, in their order; an accuracy of minus infinity is none."""
        everyone = np.arange(len(rows))[:, None]
        values = np.concatenate((self.best[:, None], accuracy), axis=1)
        candidates = np.concatenate((self.row[:, None], rows), axis=1)
        # Place of the best value so far: the last one that rose above all before it.
        highest = np.maximum.accumulate(values, axis=1)
        rises = np.ones(values.shape, dtype=bool)
        rises[:, 1:] = values[:, 1:] > highest[:, :-1]
        place = np.maximum.accumulate(np.where(rises, np.arange(values.shape[1]), 0), axis=1)
        incumbents = candidates[everyone, place]
        ends = self.spent[:, None] + np.cumsum(seconds, axis=1)
        self.seconds.append(np.where(ends <= self.budget, ends, np.inf))
        self.rows.append(incumbents[:, 1:])
        self.best, self.row, self.spent = highest[:, -1], incumbents[:, -1], ends[:, -1]

    def finish(self) -> tuple[Floats, Rows]:
        """``[runs, trainings]`` each."""
        return np.concatenate(self.seconds, axis=1), np.concatenate(self.rows, axis=1)


METHODS: dict[str, Callable[[_Bench, int], tuple[Floats, Rows]]] = {
    "random search": _random_search,
    "regularized evolution": _regularized_evolution,
    "SPOS evolution": _spos_evolution,
}
