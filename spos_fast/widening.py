"""Widening schedule: which widths a supernet is trained with, step by step."""

from __future__ import annotations

import numpy as np

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.sampling import UniformSampler


class WideningSampler:
    """Draws paths at the widest ratio only at first; then the smaller ratios join, the largest of them first.

    A supernet whose widths are all drawn from the first step on does not converge where small ones are among them: the
    first channels of every block then have to serve everything at once. CanyonWind's implementation of SPOS
    (github.com/CanyonWind/Single-Path-One-Shot-NAS-MXNet) therefore trains the widest networks for 60 epochs and then
    lets in one smaller ratio an epoch; this is that schedule, in shares of the training.

    The ranges of cost of ``sampler`` hold once all ratios are in. Before, paths are drawn uniformly from the ratios
    that have joined, whatever they cost: the widest networks may all lie outside of the ranges.

    Args:
        sampler: what is drawn from in the end; its space must search widths.
        steps: steps of the training.
        start: share of the steps in which only the widest ratio is drawn; the next one joins then.
        end: share of the steps after which all ratios are drawn. They join at equal distances.

    Raises:
        InputError: shares that are not ``0 <= start <= end <= 1``, or a space without widths.
    """

    def __init__(self, sampler: UniformSampler, steps: int, start: float, end: float) -> None:
        if not 0 <= start <= end <= 1:
            raise InputError(f"widening: got {start:g} to {end:g}; expected shares, 0 <= start <= end <= 1")
        if "width" not in sampler.space.kinds:
            raise InputError("widening: the space searches no widths; give it channels, or leave the schedule out")
        self.sampler, self.space = sampler, sampler.space
        self.start, self.end = round(start * steps), round(end * steps)
        kinds = sampler.space.kinds
        self.total = len(sampler.space.choices[kinds.index("width")])
        self._is_width = [kinds[gene % len(kinds)] == "width" for gene in range(len(sampler.space.choices))]

    def widths(self, step: int) -> int:
        """How many of the ratios, counted from the widest, are drawn in a step (0 for the first)."""
        if step >= self.end:
            return self.total
        if step < self.start:
            return 1
        return min(self.total, 2 + (step - self.start) * (self.total - 2) // (self.end - self.start))

    def at(self, seed: int, step: int) -> Architecture:
        """The architecture of a training step; depends on nothing but seed and step."""
        widths = self.widths(step)
        if widths == self.total:
            return self.sampler.at(seed, step)
        rng = np.random.default_rng([seed, step])
        genes = []
        for names, is_width in zip(self.space.choices, self._is_width, strict=True):
            genes.append(int(rng.integers(len(names) - widths if is_width else 0, len(names))))
        return self.space.architecture(genes)
