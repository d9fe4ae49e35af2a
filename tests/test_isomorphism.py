"""Isomorphism-aware sampling: exactly uniform over classes, then over members."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from spos_fast import Constraint, InputError
from spos_fast.config import SupernetConfig
from spos_fast.isomorphism import IsomorphismSampler
from spos_fast.spaces import NASBench201, NASBenchMacro

SMALL = NASBench201(("none", "skip_connect", "nor_conv_3x3"), channels=4, cells=1, input_size=8)


def test_draws_are_uniform_over_classes_and_their_members():
    """Chi-squared over the 64 cells of two operations, whose classes differ in size."""
    space = NASBench201(("skip_connect", "nor_conv_3x3"), channels=4, cells=1, input_size=8)
    sampler, rng, draws = IsomorphismSampler(space), np.random.default_rng(0), 20_000
    drawn = Counter(sampler.sample(rng).genes for _ in range(draws))
    expected = {
        tuple(member): draws / (sampler.count * len(members))
        for members in sampler.classes
        for member in members.tolist()
    }
    assert len(expected) == space.size and max(map(len, sampler.classes)) > 1
    observed = [drawn[member] for member in expected]
    assert sum(observed) == draws and stats.chisquare(observed, list(expected.values())).pvalue > 1e-3


def test_a_constraint_leaves_members_and_classes_out():
    """Members of a class may cost differently: only those inside the range are drawn."""
    constraint = Constraint(macs=(None, SMALL.cost(SMALL.architecture((2, 2, 0, 0, 0, 0))).macs))
    sampler = IsomorphismSampler(SMALL, constraint)
    genes = np.concatenate(sampler.classes)
    assert all(constraint.allows(SMALL.cost(SMALL.architecture(each))) for each in genes.tolist())
    assert 0 < sampler.count < IsomorphismSampler(SMALL).count
    assert len(genes) == sum(
        constraint.allows(SMALL.cost(SMALL.architecture(each)))
        for each in np.ndindex(*(len(names) for names in SMALL.choices))
    )
    with pytest.raises(InputError, match="no architecture"):
        IsomorphismSampler(SMALL, Constraint(macs=(None, 10)))


def test_the_training_draws_by_seed_and_step(tiny_space):
    """A step's path is the same wherever a training resumes; spaces too large to list are refused."""
    sampler = SupernetConfig(sampling="isomorphism").sampler(SMALL)
    assert isinstance(sampler, IsomorphismSampler)
    assert sampler.at(3, 5) == sampler.at(3, 5) != sampler.at(3, 6)
    assert IsomorphismSampler(NASBenchMacro()).count == 3969
    assert IsomorphismSampler(tiny_space).count == tiny_space.size
    with pytest.raises(InputError, match="sampling"):
        IsomorphismSampler(NASBenchMacro(stage_repeats=(7, 7)))
    with pytest.raises(InputError, match="sampling"):
        SupernetConfig(sampling="other")
    with pytest.raises(InputError, match="sampling"):
        SupernetConfig(sampling="isomorphism", widening_end=0.5)
