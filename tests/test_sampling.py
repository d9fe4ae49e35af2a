"""Sampling is uniform over what the constraint allows, exactly, and refuses what nothing satisfies."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from spos_fast import Architecture, Constraint, InputError, UniformSampler
from spos_fast.spaces import ShuffleNetV2

DRAWS = 20_000


def _everything(space):
    return [space.architecture(genes) for genes in itertools.product(*(range(len(c)) for c in space.choices))]


def _chi_square(sampler, allowed):
    """p-value of the hypothesis that all allowed architectures are equally likely."""
    rng = np.random.default_rng(0)
    drawn = Counter(sampler.sample(rng) for _ in range(DRAWS))
    assert set(drawn) <= set(allowed)
    return stats.chisquare([drawn[arch] for arch in allowed]).pvalue


def test_unconstrained_sampling_is_uniform(tiny_space):
    """Chi-square over all 256 architectures, for the sampler and for ``space.sample``."""
    everything = _everything(tiny_space)
    assert _chi_square(UniformSampler(tiny_space), everything) > 1e-3
    rng = np.random.default_rng(1)
    drawn = Counter(tiny_space.sample(rng) for _ in range(DRAWS))
    assert stats.chisquare([drawn[arch] for arch in everything]).pvalue > 1e-3


def _middle(space, name, low, high):
    values = sorted(getattr(space.cost(arch), name) for arch in _everything(space))
    return float(values[int(low * len(values))]), float(values[int(high * len(values))])


@pytest.mark.parametrize("names", [("macs",), ("params",), ("macs", "params")])
def test_constrained_sampling_is_uniform_over_what_is_allowed(tiny_space, names):
    """Chi-square over exactly the architectures that a filter of the whole space keeps."""
    constraint = Constraint(**{name: _middle(tiny_space, name, 0.3, 0.7) for name in names})
    allowed = [arch for arch in _everything(tiny_space) if constraint.allows(tiny_space.cost(arch))]
    assert 10 < len(allowed) < 200
    sampler = UniformSampler(tiny_space, constraint)
    assert sampler.count == (len(allowed) if len(names) == 1 else None)
    assert _chi_square(sampler, allowed) > 1e-3


def test_a_biased_sampler_would_fail_the_test(tiny_space):
    """The chi-square test has the power to see the published sampler's bias (rejection inside uniform bins)."""
    low, high = _middle(tiny_space, "macs", 0.0, 0.99)
    allowed = [a for a in _everything(tiny_space) if low <= tiny_space.cost(a).macs <= high]
    edges = np.linspace(low, high, 4)
    bins = [UniformSampler(tiny_space, Constraint(macs=(edges[i], edges[i + 1]))) for i in range(3)]

    class Binned:
        def sample(self, rng):
            return bins[rng.integers(3)].sample(rng)

    assert _chi_square(Binned(), allowed) < 1e-6


def test_counts_of_the_papers_space():
    """The share of networks in the published bins of 10M MACs (reference measurement: 1.1, 6.4, 19.6, ... percent)."""
    space = ShuffleNetV2()
    shares = [
        UniformSampler(space, Constraint(macs=(low * 1e6, (low + 10) * 1e6))).count / space.size * 100
        for low in range(290, 360, 10)
    ]
    np.testing.assert_allclose(shares, [1.1, 6.4, 19.6, 31.7, 27.1, 11.4, 2.3], atol=0.15)
    assert UniformSampler(space, Constraint(macs=(None, 330e6))).count / space.size == pytest.approx(0.59, abs=0.005)


def test_a_range_of_one_value_is_sampled():
    """Where rejection would need 10**7 draws, counting needs one."""
    space = ShuffleNetV2()
    least = space.cost_tables["macs"].smallest
    sampler = UniformSampler(space, Constraint(macs=(least, least)))
    assert sampler.count == 1
    assert space.cost(sampler.sample(np.random.default_rng(0))).macs == least


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        (dict(macs=(None, 1e6)), "270,359,360 to 398,609,216"),
        (dict(macs=(1e9, None)), "270,359,360 to 398,609,216"),
        (dict(macs=(322918721, 322918722)), "322,918,720 and 322,924,992"),
        (dict(macs=(390e6, None), params=(None, 3.2e6)), "with macs at least 390,000,000 it is 3,589,248 to 3,730,688"),
    ],
)
def test_infeasible_ranges_name_the_feasible_one(ranges, says):
    """An error at once, not a loop."""
    with pytest.raises(InputError, match=says):
        UniformSampler(ShuffleNetV2(), Constraint(**ranges))


def test_a_hole_between_two_feasible_ranges_ends():
    """Each range is feasible but together they hold nothing: an error when the sampler is made."""
    with pytest.raises(InputError, match="together"):
        UniformSampler(ShuffleNetV2(), Constraint(macs=(300e6, 300.01e6), params=(3_300_000, 3_300_001)))


@pytest.mark.parametrize("ends", [(2.0, 1.0), (None, float("nan")), ("a", None), 3.0])
def test_ranges_that_are_none_are_refused(ends):
    """Ends in the wrong order, NaN, or no numbers."""
    with pytest.raises(InputError, match="macs"):
        Constraint(macs=ends)


def test_a_training_step_depends_on_seed_and_step_only(tiny_space):
    """Resumed runs and all ranks draw the same path."""
    sampler = UniformSampler(tiny_space)
    first = [sampler.at(3, step) for step in range(50)]
    assert first == [UniformSampler(tiny_space).at(3, step) for step in range(50)]
    assert first != [sampler.at(4, step) for step in range(50)]
    assert len(set(first)) > 30 and all(isinstance(arch, Architecture) for arch in first)
