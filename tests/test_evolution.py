"""Evolution is the paper's algorithm 1: no candidate twice, all within the constraint, and a function of its seed."""

import itertools

import numpy as np
import pytest

from spos_fast import Constraint, InputError, Score, UniformSampler, evolve, random_search
from spos_fast.spaces import ShuffleNetV2


class Target:
    """Accuracy is the share of genes that agree with a hidden architecture; counts what it is asked."""

    def __init__(self, space, seed=7):
        self.genes = space.sample(np.random.default_rng(seed)).genes
        self.asked = []

    def __call__(self, archs):
        self.asked.append(list(archs))
        return [self.score(arch) for arch in archs]

    def score(self, arch):
        agree = sum(a == b for a, b in zip(arch.genes, self.genes, strict=True)) / len(self.genes)
        return Score(agree, 1 - agree, 100)


@pytest.fixture()
def paper_space():
    return ShuffleNetV2()


def test_the_papers_numbers_by_default(paper_space):
    """1,050 different candidates: 50 random ones, then 25 by crossover and 25 by mutation in each of 20 generations.

    Places for which 250 tries give no new child go to random architectures, as published.
    """
    target = Target(paper_space)
    result = evolve(paper_space, target, constraint=Constraint(macs=(None, 330e6)))
    assert len(result.candidates) == 1050 and [len(batch) for batch in target.asked] == [50] * 21
    assert len({c.architecture for c in result.candidates}) == 1050
    assert all(paper_space.cost(c.architecture).macs <= 330e6 for c in result.candidates)
    for generation in range(21):
        origins = [c.origin for c in result.candidates if c.generation == generation]
        assert len(origins) == 50
        if generation == 0:
            assert set(origins) == {"random"}
        elif generation == 1:
            assert origins == ["crossover"] * 25 + ["mutation"] * 25
        else:
            assert origins.count("crossover") <= 25 and origins.count("mutation") == 25


def test_it_finds_more_than_random_search_under_the_same_budget(paper_space):
    """Best of 1,050, 3 seeds each."""
    for seed in range(3):
        evolved = evolve(paper_space, Target(paper_space), seed=seed)
        random = random_search(paper_space, Target(paper_space), 1050, seed=seed)
        assert len(random.candidates) == len({c.architecture for c in random.candidates}) == 1050
        assert evolved.best.score.accuracy > random.best.score.accuracy + 0.15


def test_children_come_from_the_best_of_all_generations(paper_space):
    """Every gene of a child by crossover is a gene of one of the top 10 before it; mutants differ from one in few."""
    target = Target(paper_space)
    result = evolve(paper_space, target, generations=5)
    for generation in range(1, 6):
        before = [c for c in result.candidates if c.generation < generation]
        parents = sorted(before, key=lambda c: (-c.score.accuracy, c.score.loss))[:10]
        genes = [set(column) for column in zip(*(p.architecture.genes for p in parents), strict=True)]
        distances = []
        for child in (c for c in result.candidates if c.generation == generation):
            if child.origin == "crossover":
                assert all(g in allowed for g, allowed in zip(child.architecture.genes, genes, strict=True))
            else:
                distances.append(
                    min(
                        sum(a != b for a, b in zip(child.architecture.genes, p.architecture.genes, strict=True))
                        for p in parents
                    )
                )
        # 20 genes x 0.1 x 3/4 that differ: 1.5 on average before duplicates are dropped.
        assert 1 <= np.mean(distances) <= 2.5


def test_it_is_a_function_of_its_seed(paper_space):
    """Replaying a search gives the same candidates: what resuming rests on."""
    first, second, other = (evolve(paper_space, Target(paper_space), generations=3, seed=seed) for seed in (1, 1, 2))
    assert first == second != other


def test_a_small_space_is_searched_whole(tiny_space):
    """Fewer candidates than the budget when there are no more; all of them, none twice."""
    target = Target(tiny_space)
    result = evolve(tiny_space, target, population=30, generations=20, crossover=15, mutation=15)
    assert len(result.candidates) == 256 and result.best.score.accuracy == 1
    everything = {tiny_space.architecture(g) for g in itertools.product(range(4), repeat=4)}
    assert {c.architecture for c in result.candidates} == everything
    costs = sorted(tiny_space.cost(arch).macs for arch in everything)
    constraint = Constraint(macs=(None, costs[20]), params=(0, None))
    allowed = {arch for arch in everything if constraint.allows(tiny_space.cost(arch))}
    found = random_search(tiny_space, Target(tiny_space), 1000, constraint=constraint)
    assert {c.architecture for c in found.candidates} == allowed


def test_ties_and_failed_candidates_are_ranked(paper_space):
    """Equal accuracy: less loss first, then the earlier; a NaN loss never wins."""
    scores = itertools.cycle([Score(0.5, float("nan"), 10), Score(0.5, 1.0, 10), Score(0.5, 0.9, 10)])
    result = random_search(paper_space, lambda archs: [next(scores) for _ in archs], 30, population=30)
    assert result.best is result.candidates[2]
    assert np.isnan(result.top(30)[-1].score.loss)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(population=0), "population"),
        (dict(top_k=0), "top_k"),
        (dict(generations=-1), "generations"),
        (dict(mutation_probability=1.5), "mutation_probability"),
        (dict(population=10, crossover=6, mutation=6), "crossover, mutation"),
        (dict(constraint=Constraint(macs=(None, 1.0))), "270,359,360"),
    ],
)
def test_settings_that_make_no_search_are_refused(paper_space, options, says):
    """Before anything is scored."""
    target = Target(paper_space)
    with pytest.raises(InputError, match=says):
        evolve(paper_space, target, **options)
    assert not target.asked


def test_counts_agree_with_the_sampler(tiny_space):
    """The end of a constrained space is known exactly, not guessed from misses."""
    costs = sorted(tiny_space.cost(tiny_space.architecture(g)).macs for g in itertools.product(range(4), repeat=4))
    constraint = Constraint(macs=(None, costs[5]))
    count = UniformSampler(tiny_space, constraint).count
    result = random_search(tiny_space, Target(tiny_space), 500, constraint=constraint)
    assert len(result.candidates) == count


def test_a_single_cost_in_the_joint_space_ends_quickly(monkeypatch):
    """Few of the 4e27 networks have a given cost near the cheapest, and how many is not known: all are found, and after
    a short run of known draws no generation looks for more."""
    space = ShuffleNetV2(channels=(0.6, 0.8, 1.0, 1.2, 1.4, 1.6))
    table = space.cost_tables["macs"]
    layers = [layer.reshape(-1) - int(layer.min()) for layer in table.layers]
    step = min(int(layer[layer > 0].min()) for layer in layers)
    wanted = table.smallest + 2 * step

    def completions(layer, left):
        if layer == len(layers):
            return [()] if left == 0 else []
        shape = table.layers[layer].shape
        return [
            (*map(int, np.unravel_index(choice, shape)), *rest)
            for choice in np.flatnonzero(layers[layer] <= left)
            for rest in completions(layer + 1, left - layers[layer][choice])
        ]

    expected = {space.architecture(genes) for genes in completions(0, 2 * step)}
    draws, sample = [], UniformSampler.sample
    monkeypatch.setattr(UniformSampler, "sample", lambda *given: draws.append(0) or sample(*given))
    result = evolve(space, Target(space), constraint=Constraint(macs=(wanted, wanted)))
    assert {candidate.architecture for candidate in result.candidates} == expected and len(expected) > 3
    assert len(draws) < 100 * len(expected)
