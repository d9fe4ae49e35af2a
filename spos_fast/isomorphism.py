"""Isomorphism-aware sampling: uniform over different networks instead of over their encodings."""

from __future__ import annotations

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.sampling import Constraint, UniformSampler
from spos_fast.spaces import Space

# Classes are found by listing the whole space: some 10 microseconds an architecture.
_MOST_ARCHITECTURES = 1_000_000


class IsomorphismSampler:
    """Draws a class of isomorphic architectures uniformly, and then one of its members uniformly.

    Where many encodings stand for the same network, drawing encodings trains that network more often than others.
    Classes are those of ``space.isomorphism_key``. Members of a class may differ in cost (operations whose output
    nothing reads cost too); with a constraint only members inside the ranges are drawn, and classes that have one.

    Args:
        space: the search space; NAS-Bench-201 and NAS-Bench-Macro have isomorphic architectures.
        constraint: ranges of cost; none by default.

    Attributes:
        classes: ``[members, genes]`` arrays, one a class.
        count: number of classes.

    Raises:
        InputError: more than a million architectures, or none that satisfies the constraint.
    """

    def __init__(self, space: Space, constraint: Constraint | None = None) -> None:
        if space.size > _MOST_ARCHITECTURES:
            raise InputError(
                f"sampling: isomorphism lists all architectures of the space, and {space.name!r} has {space.size:,}; "
                f"expected at most {_MOST_ARCHITECTURES:,}"
            )
        self.space, self.constraint = space, constraint or Constraint()
        UniformSampler(space, self.constraint)  # refuses what nothing satisfies, and says what would be right
        shape = [len(names) for names in space.choices]
        genes = np.stack(np.unravel_index(np.arange(space.size), shape), axis=1)
        for name, bounds in self.constraint.bounds().items():
            table = space.cost_tables[name]
            low, high = table.limits(*bounds)
            totals = table.totals(genes)
            genes = genes[(totals >= low) & (totals <= high)]
        classes: dict[str, list[list[int]]] = {}
        for member in genes.tolist():
            classes.setdefault(space.isomorphism_key(member), []).append(member)
        self.classes = [np.array(members) for members in classes.values()]
        self.count = len(self.classes)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """One architecture."""
        members = self.classes[rng.integers(self.count)]
        return Architecture(self.space.name, tuple(members[rng.integers(len(members))].tolist()))

    def at(self, seed: int, step: int) -> Architecture:
        """The architecture of a training step; depends on nothing but seed and step."""
        return self.sample(np.random.default_rng([seed, step]))
