"""The Pareto search follows the rules of the other searches: its seed, the constraint, no architecture twice."""

import importlib.util
import itertools
import subprocess
import sys

import pytest

from spos_fast import Constraint, InputError, ParetoResult, Score, random_search
from spos_fast.spaces import ShuffleNetV2
from tests.latency.test_table import invented
from tests.test_evolution import Target

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="Optuna is not installed: pip install 'spos-fast[pareto]'"
)
pareto = importlib.import_module("spos_fast.pareto")
search = pareto.pareto_search


@pytest.fixture(scope="module")
def paper_space():
    return ShuffleNetV2()


def _values(space, candidates):
    return tuple((c.score.accuracy, float(space.cost(c.architecture).macs)) for c in candidates)


def _area(space, values):
    """What a front dominates of accuracy 0 to 1 and the space's MACs, as a share."""
    table, total, reached = space.cost_tables["macs"], 0.0, 0.0
    for accuracy, macs in sorted(values, key=lambda value: value[1]):
        if accuracy > reached:
            total += (accuracy - reached) * (table.largest - macs) / (table.largest - table.smallest)
            reached = accuracy
    return total


@needs_optuna
def test_the_rules_of_a_search(paper_space):
    """Whole generations are asked for at once; every architecture is new and within the constraint; the same seed
    gives the same search, another one another.
    """
    limit = Constraint(macs=(None, 320e6))
    target = Target(paper_space)
    options = dict(population=12, generations=4, constraint=limit)
    result = search(paper_space, target, **options, seed=1)
    assert [len(batch) for batch in target.asked] == [12] * 5
    archs = [c.architecture for c in result.candidates]
    assert len(set(archs)) == 60 and all(paper_space.cost(arch).macs <= 320e6 for arch in archs)
    assert [c.origin for c in result.candidates[:12]] == ["random"] * 12
    assert sum(c.origin == "child" for c in result.candidates[12:]) > 36
    assert [c.generation for c in result.candidates] == [n // 12 for n in range(60)]
    assert result == search(paper_space, Target(paper_space), **options, seed=1)
    assert result != search(paper_space, Target(paper_space), **options, seed=2)


@needs_optuna
def test_it_finds_a_better_front_than_random_search(paper_space):
    """Under the same budget its front dominates more; 4 seeds gave 1.5 to 1.6 times as much at 300 candidates."""
    ours = search(paper_space, Target(paper_space), population=20, generations=9)
    random = random_search(paper_space, Target(paper_space), 200).candidates
    assert _area(paper_space, ours.values) > 1.25 * _area(paper_space, _values(paper_space, random))


@needs_optuna
def test_a_small_space_is_searched_whole():
    """It ends where there is nothing left, has scored everything once, and its front is that of the space, for three
    objectives of which one is a latency.
    """
    space = ShuffleNetV2(
        input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
        stage_repeats=(2, 1), stage_strides=(1, 2), head_channels=32,
    )  # fmt: skip
    invented(space).attach(space)
    target = Target(space)
    names = ("accuracy", "latency_ms", "params")
    result = search(space, target, names, population=20, generations=20)
    assert len({c.architecture for c in result.candidates}) == len(result.candidates) == 64

    def losses(arch):
        cost = space.cost(arch)
        return -target.score(arch).accuracy, cost.latency_ms, cost.params

    everything = [space.architecture(genes) for genes in itertools.product(range(4), repeat=3)]
    vectors = {arch: losses(arch) for arch in everything}
    best = {
        own
        for own in vectors.values()
        if not any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in vectors.values())
    }
    front = [losses(c.architecture) for c in result.front]
    assert set(front) == best and len(front) == len(best) and front == sorted(front, key=lambda v: v[1:])


def test_equal_candidates_are_on_the_front_once():
    """The earlier one; a candidate that equals in one objective and loses in the other is not there."""
    space = ShuffleNetV2()
    candidates = random_search(space, lambda archs: [Score(0.5, 1.0, 10) for _ in archs], 4, population=4).candidates
    values = ((0.5, 2.0), (0.5, 2.0), (0.5, 3.0), (0.4, 1.0))
    result = ParetoResult(candidates, ("accuracy", "macs"), values)
    assert result.front == [candidates[3], candidates[0]]


@needs_optuna
def test_a_candidate_without_an_accuracy_loses(paper_space):
    """NaN has no rank in NSGA-II: it counts as no accuracy at all."""
    scores = itertools.cycle([Score(float("nan"), float("nan"), 10), Score(0.5, 1.0, 10)])
    result = search(paper_space, lambda archs: [next(scores) for _ in archs], population=4, generations=2)
    assert len(result.candidates) == 12 and all(c.score.accuracy == 0.5 for c in result.front)
    assert {values[0] for values in result.values} == {0.0, 0.5}


@needs_optuna
def test_a_failed_candidate_is_not_on_the_front(paper_space):
    """However cheap it is; where all have failed there is no front."""
    failed = Score(0.0, float("nan"), 10, failed=True)
    scores = itertools.cycle([failed, Score(0.5, 1.0, 10)])
    result = search(paper_space, lambda archs: [next(scores) for _ in archs], population=4, generations=2)
    assert result.front and not any(c.score.failed for c in result.front)
    assert search(paper_space, lambda archs: [failed for _ in archs], population=4, generations=1).front == []


@needs_optuna
@pytest.mark.parametrize(
    ("objectives", "options", "says"),
    [
        (("accuracy", "speed"), {}, "'speed'; expected some of accuracy, macs, params, bitops"),
        (("accuracy",), {}, "accuracy and one or more"),
        ("accuracy", {}, "accuracy and one or more"),
        ((), {}, "got none"),
        (("macs", "params"), {}, "accuracy and one or more"),
        (("accuracy", "macs", "macs"), {}, "accuracy and one or more"),
        (("accuracy", "latency_ms"), {}, "spos-fast latency"),
        (("accuracy", "macs"), dict(population=1), "population: got 1"),
        (("accuracy", "macs"), dict(generations=-1), "generations: got -1"),
        (("accuracy", "macs"), dict(seed=-1), "seed: got -1"),
        (("accuracy", "macs"), dict(constraint=Constraint(macs=(None, 1.0))), "270,359,360"),
    ],
)
def test_settings_that_make_no_search_are_refused(paper_space, objectives, options, says):
    """Before anything is scored."""
    target = Target(paper_space)
    with pytest.raises(InputError, match=says):
        search(paper_space, target, objectives, **options)
    assert not target.asked


def test_without_optuna_it_says_what_to_install(paper_space, monkeypatch):
    """One line with the name of the extra."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    with pytest.raises(InputError, match=r"pip install 'spos-fast\[pareto\]'"):
        search(paper_space, Target(paper_space))


def test_nothing_else_needs_optuna():
    """Neither the pipeline nor the command line imports it."""
    code = "import sys, spos_fast.pipeline, spos_fast.cli, spos_fast.pareto; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
