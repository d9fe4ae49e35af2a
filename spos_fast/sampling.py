"""Uniform sampling of architectures, with and without ranges of cost.

The constrained sampler is exactly uniform over the architectures inside the ranges. It counts, for every reachable
partial sum of one metric, how many completions end inside the range, and draws every gene in proportion to those
counts; further metrics are met by rejection, which keeps a uniform distribution uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.spaces import Cost, CostTable, Space

Range = tuple[float | None, float | None]

# Beyond this many partial sums (some 36 bytes each) counting would take gigabytes; plain rejection is used then.
_MAX_STATES = 20_000_000
# Rejection draws 16 candidates, then 4 times as many each time, until it has drawn this many.
_FIRST_DRAWS, _MOST_DRAWS_AT_ONCE, _MAX_DRAWS = 16, 65_536, 1_000_000


@dataclass(frozen=True)
class Constraint:
    """Ranges that the cost of an architecture must lie in, ends included; ``None`` leaves an end open.

    Attributes:
        macs: (least, most) multiply-accumulates, e.g. ``(None, 330e6)``.
        params: (least, most) weights.
    """

    macs: Range = (None, None)
    params: Range = (None, None)

    def __post_init__(self) -> None:
        for name, bounds in (("macs", self.macs), ("params", self.params)):
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
        for name, (low, high) in (("macs", self.macs), ("params", self.params)):
            if low is not None or high is not None:
                out[name] = (-np.inf if low is None else low, np.inf if high is None else high)
        return out

    def allows(self, cost: Cost) -> bool:
        """Whether the cost lies in every range."""
        return all(low <= getattr(cost, name) <= high for name, (low, high) in self.bounds().items())


class UniformSampler:
    """Draws architectures uniformly from a space, or from the part of it that satisfies a constraint.

    The constrained distribution is exactly uniform, up to the resolution of the random numbers that it draws
    (a relative 2**-53 a gene).

    Args:
        space: the search space.
        constraint: ranges of cost; none by default.

    Attributes:
        count: number of architectures that the sampler draws from, or None where it is not known (two metrics
            constrained, or a space whose costs have too many different sums to count).

    Raises:
        InputError: no architecture satisfies the constraint; the message names the feasible range.
    """

    def __init__(self, space: Space, constraint: Constraint | None = None) -> None:
        self.space = space
        self.constraint = constraint or Constraint()
        bounds = self.constraint.bounds()
        for name, (low, high) in bounds.items():
            table = space.cost_tables[name]
            if table.largest < low or table.smallest > high:
                raise _infeasible(name, low, high, table.smallest, table.largest)
        # A range that the whole space satisfies constrains nothing.
        bounds = {
            name: (low, high)
            for name, (low, high) in bounds.items()
            if space.cost_tables[name].smallest < low or space.cost_tables[name].largest > high
        }
        lattices = {name: _Lattice.make(space.cost_tables[name], *bounds[name]) for name in bounds}
        for name, lattice in lattices.items():
            if lattice is not None and lattice.count == 0:
                raise _infeasible(name, *bounds[name], *lattice.nearest)
        counted = {name: lattice for name, lattice in lattices.items() if lattice is not None}
        tightest = min(counted, key=lambda name: counted[name].count) if counted else None
        self._lattice = counted[tightest] if tightest else None
        self._rejected = {name: bounds[name] for name in bounds if name != tightest}
        self.count: int | None = space.size
        if bounds:
            self.count = int(self._lattice.count) if self._lattice is not None and not self._rejected else None
        if self._rejected and self._lattice is not None:
            self._check_joint_range(tightest, bounds)
        if self._rejected:
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
                table = self.space.cost_tables[name]
                total = table.fixed + sum(layer[genes[:, i]] for i, layer in enumerate(table.layers))
                inside &= (total >= low) & (total <= high)
            if inside.any():
                return Architecture(self.space.name, tuple(genes[int(inside.argmax())].tolist()))
        ranges = " and ".join(f"{name} {_describe(*limits)}" for name, limits in self.constraint.bounds().items())
        raise InputError(f"constraint: none of {_MAX_DRAWS:,} draws satisfied {ranges} together; widen one of them")

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
        for name in self._rejected:
            low, high = bounds[name]
            least, most = self._lattice.range_of(self.space.cost_tables[name])
            if least > high or most < low:
                within = f"with {counted} {_describe(*bounds[counted or ''])}"
                raise InputError(f"{name}: {_describe(low, high)} is infeasible; {within} it is {least:,} to {most:,}")


class _Lattice:
    """All partial sums of one metric, layer by layer, and from each the number of completions inside the range.

    ``states[i]`` are the sorted sums of the first i layers, ``next_state[i][s, c]`` is the index in ``states[i + 1]``
    after choice c, ``ways[i][s]`` the number of completions.
    """

    def __init__(self, table: CostTable, states: list[np.ndarray], low: float, high: float) -> None:
        self.states = states
        self.next_state = [
            np.searchsorted(after, before[:, None] + layer[None]).astype(np.int32)
            for before, after, layer in zip(states[:-1], states[1:], table.layers, strict=True)
        ]
        last = states[-1]
        self.ways = [((last >= low) & (last <= high)).astype(np.float64)]
        for step in reversed(self.next_state):
            self.ways.insert(0, self.ways[0][step].sum(1))
        self.count: float = float(self.ways[0][0])
        below, above = last[last < low], last[last > high]
        # Where nothing is inside, the values on either side of the range.
        self.nearest = (int(below[-1]) if len(below) else int(last[0]), int(above[0]) if len(above) else int(last[-1]))

    @classmethod
    def make(cls, table: CostTable, low: float, high: float) -> _Lattice | None:
        """None if the metric has too many different partial sums."""
        states = [np.array([table.fixed], dtype=np.int64)]
        for layer in table.layers:
            states.append(np.unique(states[-1][:, None] + layer[None]))
            if sum(map(len, states)) > _MAX_STATES:
                return None
        return cls(table, states, low, high)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """``[n, genes]`` indices, uniform over the architectures inside the range."""
        state = np.zeros(n, dtype=np.int64)
        genes = np.empty((n, len(self.next_state)), dtype=np.int64)
        for i, (step, ways) in enumerate(zip(self.next_state, self.ways[1:], strict=True)):
            cumulative = ways[step[state]].cumsum(1)
            # random() < 1, so the product stays below the total and never selects a choice without completions.
            genes[:, i] = (cumulative <= rng.random(n)[:, None] * cumulative[:, -1:]).sum(1)
            state = step[state, genes[:, i]]
        return genes

    def range_of(self, other: CostTable) -> tuple[int, int]:
        """Least and greatest value of another metric over the architectures inside the range."""
        inside = self.ways[-1] > 0
        limit = np.iinfo(np.int64).max // 4
        least, most = np.where(inside, 0, limit), np.where(inside, 0, -limit)
        for step, layer in zip(reversed(self.next_state), reversed(other.layers), strict=True):
            least, most = (least[step] + layer).min(1), (most[step] + layer).max(1)
        return int(least[0]) + other.fixed, int(most[0]) + other.fixed


def _infeasible(name: str, low: float, high: float, least: float, most: float) -> InputError:
    wanted = _describe(low, high)
    if most < low or least > high:
        return InputError(f"{name}: no architecture has {wanted}; the space has {least:,} to {most:,}")
    return InputError(f"{name}: no architecture has {wanted}; the nearest values are {least:,} and {most:,}")


def _describe(low: float, high: float) -> str:
    if low == -np.inf:
        return f"at most {high:,.0f}"
    return f"at least {low:,.0f}" if high == np.inf else f"{low:,.0f} to {high:,.0f}"
