"""Uniform sampling of architectures, with and without ranges of cost.

The constrained sampler is exactly uniform over the architectures inside the ranges. It counts, for every reachable
partial sum of one metric, how many completions end inside the range, and draws the genes of every layer in proportion
to those counts. Where a space has too many partial sums, they are counted in coarser units, in a range that is wider by
the rounding. What is left over, and further metrics, are met by rejection, which keeps a uniform distribution uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.spaces import METRICS, Cost, CostTable, Space
from spos_fast.spaces.base import without_metric

Range = tuple[float | None, float | None]

# Most pairs of a partial sum and a choice of the next layer (some 12 bytes each, and 100 ns to count).
_MAX_PAIRS = 8_000_000
# Rejection draws 16 candidates, then 4 times as many each time, until it has drawn this many.
_FIRST_DRAWS, _MOST_DRAWS_AT_ONCE, _MAX_DRAWS = 16, 65_536, 1_000_000


@dataclass(frozen=True)
class Constraint:
    """Ranges that the cost of an architecture must lie in, ends included; ``None`` leaves an end open.

    Attributes:
        macs: (least, most) multiply-accumulates, e.g. ``(None, 330e6)``.
        params: (least, most) weights.
        bitops: (least, most) bit operations, for quantized spaces. They are plain numbers: the paper's 14.21 G are
            ``14.21 * 2**30``.
        latency_ms: (least, most) milliseconds, for spaces with a latency table.
    """

    macs: Range = (None, None)
    params: Range = (None, None)
    bitops: Range = (None, None)
    latency_ms: Range = (None, None)

    def __post_init__(self) -> None:
        for name in METRICS:
            bounds = getattr(self, name)
            if not isinstance(bounds, tuple) or len(bounds) != 2:
                raise InputError(f"{name}: got {bounds!r}; expected a pair (least, most), None for an open end")
            low, high = bounds
            for end in bounds:
                if end is not None and (not isinstance(end, (int, float)) or end != end):
                    raise InputError(f"{name}: got {end!r} as an end of the range; expected a number or None")
            if low is not None and high is not None and low > high:
                raise InputError(
                    f"{name}: the range {low:g} to {high:g} is empty; the first number must be the smaller"
                )

    def bounds(self) -> dict[str, tuple[float, float]]:
        """The metrics that are constrained at all, with infinities for open ends."""
        out = {}
        for name in METRICS:
            low, high = getattr(self, name)
            if low is not None or high is not None:
                out[name] = (-np.inf if low is None else low, np.inf if high is None else high)
        return out

    def allows(self, cost: Cost) -> bool:
        """Whether the cost lies in every range.

        Raises:
            InputError: a metric is constrained that the cost does not have.
        """
        known = cost.known()
        for name, (low, high) in self.bounds().items():
            if name not in known:
                raise without_metric(name)
            if not low <= known[name] <= high:
                return False
        return True


class UniformSampler:
    """Draws architectures uniformly from a space, or from the part of it that satisfies a constraint.

    The constrained distribution is exactly uniform, up to the resolution of the random numbers that it draws
    (a relative 2**-53 a layer).

    Args:
        space: the search space.
        constraint: ranges of cost; none by default.

    Attributes:
        count: number of architectures that the sampler draws from, or None where it is not known (two metrics
            constrained, or a space whose costs have too many different sums to count one by one).

    Raises:
        InputError: no architecture satisfies the constraint (the message names the feasible range), or a metric is
            constrained that the space has no table of.
    """

    def __init__(self, space: Space, constraint: Constraint | None = None) -> None:
        self.space = space
        self.constraint = constraint or Constraint()
        bounds = {}  # as totals of the tables
        self._tables = {name: space.searched_costs(name) for name in self.constraint.bounds()}
        for name, wanted in self.constraint.bounds().items():
            table = self._tables[name]
            low, high = bounds[name] = table.limits(*wanted)
            if table.largest < low or table.smallest > high:
                raise self._infeasible(name, table.smallest, table.largest)
        # A range that the whole space satisfies constrains nothing.
        bounds = {
            name: (low, high)
            for name, (low, high) in bounds.items()
            if self._tables[name].smallest < low or self._tables[name].largest > high
        }
        lattices = {name: _Lattice(self._tables[name], *bounds[name]) for name in bounds}
        for name, lattice in lattices.items():
            if lattice.count == 0:
                raise self._infeasible(name, *lattice.nearest)
        tightest = min(lattices, key=lambda name: lattices[name].count, default=None)
        self._lattice = lattices[tightest] if tightest else None
        exact = self._lattice is not None and self._lattice.unit == 1
        self._rejected = {name: bounds[name] for name in bounds if name != tightest or not exact}
        self.count: int | None = space.size
        if self._lattice is not None:
            self.count = None if self._rejected else int(self._lattice.count)
        if self._rejected:
            self._check_joint_range(tightest, bounds)
            self.sample(np.random.default_rng(0))  # what nothing satisfies is refused now, not in the middle of a run

    def sample(self, rng: np.random.Generator) -> Architecture:
        """One architecture.

        Raises:
            InputError: several ranges are each feasible but met together by (almost) no architecture.
        """
        if not self._rejected:
            return Architecture(self.space.name, tuple(self._draw(rng, 1)[0].tolist()))
        drawn, draws = 0, _FIRST_DRAWS
        while drawn < _MAX_DRAWS:
            genes = self._draw(rng, draws)
            drawn, draws = drawn + draws, min(4 * draws, _MOST_DRAWS_AT_ONCE)
            inside = np.ones(len(genes), dtype=bool)
            for name, (low, high) in self._rejected.items():
                total = self._tables[name].totals(genes)
                inside &= (total >= low) & (total <= high)
            if inside.any():
                return Architecture(self.space.name, tuple(genes[int(inside.argmax())].tolist()))
        ranges = [f"{name} {_describe(*limits)}" for name, limits in self.constraint.bounds().items()]
        together = " together; widen one of them" if len(ranges) > 1 else "; widen it"
        raise InputError(f"constraint: none of {_MAX_DRAWS:,} draws satisfied {' and '.join(ranges)}{together}")

    def at(self, seed: int, step: int) -> Architecture:
        """The architecture of a training step: depends on nothing but seed and step, so that training can resume
        anywhere and all ranks of a distributed run agree.
        """
        return self.sample(np.random.default_rng([seed, step]))

    def _draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        if self._lattice is not None:
            return self._lattice.draw(rng, n)
        return np.stack([rng.integers(len(names), size=n) for names in self.space.choices], 1)

    def _check_joint_range(self, counted: str | None, bounds: dict[str, tuple[float, float]]) -> None:
        """Fail at once if the other metrics cannot come into their range while the counted one is in its own."""
        assert self._lattice is not None
        for name in (metric for metric in self._rejected if metric != counted):
            low, high = bounds[name]
            least, most = self._lattice.range_of(self._tables[name])
            if least > high or most < low:
                wanted, table = self.constraint.bounds(), self._tables[name]
                within = f"with {counted} {_describe(*wanted[counted or ''])}"
                found = f"{_shown(table.value(least))} to {_shown(table.value(most))}"
                raise InputError(f"{name}: {_describe(*wanted[name])} is infeasible; {within} it is {found}")

    def _infeasible(self, name: str, least: int, most: int) -> InputError:
        """With the range of the space, or the values nearest to the wanted range."""
        table, wanted = self._tables[name], self.constraint.bounds()[name]
        low, high = table.limits(*wanted)
        outside = most < low or least > high
        ends = [_shown(table.value(end)) for end in (least, most)]
        found = f"the space has {ends[0]} to {ends[1]}" if outside else f"the nearest values are {' and '.join(ends)}"
        return InputError(f"{name}: no architecture has {_describe(*wanted)}; {found}")


class _Lattice:
    """All partial sums of one metric, layer by layer, and from each the number of completions inside the range.

    ``states[i]`` are the sorted sums of the first i layers, ``next_state[i][s, c]`` is the index in ``states[i + 1]``
    after the combination c of the next layer's genes, ``ways[i][s]`` the number of completions.

    Sums are counted in a ``unit`` of the metric: 1, or where that makes too many sums a coarser one. Every layer's cost
    is then rounded down, and the range extended by what all layers may lose: it holds all architectures of the true
    range, and a few others.
    """

    def __init__(self, table: CostTable, low: float, high: float) -> None:
        self.shapes = [layer.shape for layer in table.layers]
        self.unit = 1
        states = self._sums(table)
        if states is None:
            # At most this many different sums follow the first layers: their greatest difference, in units.
            spans = np.cumsum([int(np.ptp(layer)) for layer in table.layers])
            pairs = sum(int(span) * layer.size for span, layer in zip(spans, table.layers[1:], strict=False))
            self.unit = 1 + pairs // (_MAX_PAIRS // 2)
            states = self._sums(table)
        assert states is not None
        self.states = states
        self.next_state = [
            np.searchsorted(after, before[:, None] + layer.reshape(-1) // self.unit).astype(np.int32)
            for before, after, layer in zip(states[:-1], states[1:], table.layers, strict=True)
        ]
        last = states[-1]
        if self.unit > 1:
            low, high = np.floor(low / self.unit) - len(table.layers) - 1, np.floor(high / self.unit)
        self.ways = [((last >= low) & (last <= high)).astype(np.float64)]
        for step in reversed(self.next_state):
            self.ways.insert(0, self.ways[0][step].sum(1))
        self.count: float = float(self.ways[0][0])
        below, above = self.unit * last[last < low], self.unit * last[last > high]
        # Where nothing is inside, the values on either side of the range.
        self.nearest = (
            int(below[-1]) if len(below) else self.unit * int(last[0]),
            int(above[0]) if len(above) else self.unit * int(last[-1]),
        )

    def _sums(self, table: CostTable) -> list[np.ndarray] | None:
        """``states``; None if they are too many."""
        states = [np.array([table.fixed // self.unit], dtype=np.int64)]
        pairs = 0
        for layer in table.layers:
            pairs += len(states[-1]) * layer.size
            if pairs > _MAX_PAIRS:
                return None
            states.append(np.unique(states[-1][:, None] + layer.reshape(-1) // self.unit))
        return states

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """``[n, genes]`` indices, uniform over the architectures inside the range."""
        state = np.zeros(n, dtype=np.int64)
        genes: list[np.ndarray] = []
        for step, ways, shape in zip(self.next_state, self.ways[1:], self.shapes, strict=True):
            cumulative = ways[step[state]].cumsum(1)
            # random() < 1, so the product stays below the total and never selects a choice without completions.
            drawn = (cumulative <= rng.random(n)[:, None] * cumulative[:, -1:]).sum(1)
            genes += np.unravel_index(drawn, shape)
            state = step[state, drawn]
        return np.stack(genes, 1)

    def range_of(self, other: CostTable) -> tuple[int, int]:
        """Least and greatest value of another metric over the architectures inside the range."""
        inside = self.ways[-1] > 0
        limit = np.iinfo(np.int64).max // 4
        least, most = np.where(inside, 0, limit), np.where(inside, 0, -limit)
        for step, layer in zip(reversed(self.next_state), reversed(other.layers), strict=True):
            costs = layer.reshape(-1)
            least, most = (least[step] + costs).min(1), (most[step] + costs).max(1)
        return int(least[0]) + other.fixed, int(most[0]) + other.fixed


def _shown(value: float) -> str:
    whole = isinstance(value, int) or value == round(value) or abs(value) >= 1e4
    return f"{value:,.0f}" if whole else f"{value:,.4g}"


def _describe(low: float, high: float) -> str:
    if low == -np.inf:
        return f"at most {_shown(high)}"
    return f"at least {_shown(low)}" if high == np.inf else f"{_shown(low)} to {_shown(high)}"
