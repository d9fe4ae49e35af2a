"""Parts of a generation: all of it, shared prefixes kept together, the most expensive part as cheap as can be."""

import itertools

import numpy as np
import pytest

from spos_fast import DistributedEvaluator, InputError, Score
from spos_fast.distributed import Exchange
from spos_fast.sharing import share_out
from spos_fast.spaces import ShuffleNetV2


def _price(space, archs):
    """MACs of a part: every distinct prefix once, and a head for every distinct architecture."""
    table = space.cost_tables["macs"]
    per_layer = len(space.kinds)
    nodes = {arch.genes[: per_layer * (i + 1)] for arch in archs for i in range(len(table.layers))}
    heads = len({arch.genes for arch in archs})
    layers = sum(int(table.layers[len(n) // per_layer - 1][n[-per_layer:]]) for n in nodes)
    return heads * table.fixed + layers


@pytest.mark.parametrize("channels", [(), (0.5, 1.0)])
def test_no_other_cut_is_better(channels):
    """Against every cut of the sorted generation, with blocks of different cost, with and without widths."""
    space = ShuffleNetV2(
        input_size=8, in_channels=1, num_classes=10, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
        stage_repeats=(2, 2), stage_strides=(1, 2), head_channels=32, channels=channels,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for parts in (1, 2, 3, 5):
        archs = [space.sample(rng) for _ in range(9)]
        archs.append(archs[4])
        shared = share_out(archs, parts, space)
        assert len(shared) == parts and sorted(itertools.chain(*shared)) == list(range(10))
        ordered = [archs[number] for number in itertools.chain(*shared)]
        assert ordered == sorted(archs, key=lambda arch: arch.genes)
        dearest = max(_price(space, [archs[number] for number in part]) for part in shared)
        cuts = itertools.combinations(range(1, 10), parts - 1)
        assert dearest == min(
            max(_price(space, ordered[a:b]) for a, b in itertools.pairwise((0, *cut, 10))) for cut in cuts
        )


def test_fewer_architectures_than_parts():
    """The last parts are empty; an empty generation has empty parts only."""
    space = ShuffleNetV2()
    archs = [space.everywhere(2), space.everywhere(1)]
    assert share_out(archs, 4, space) == share_out(archs, 4) == [[1], [0], [], []]
    assert share_out([], 2) == [[], []]


def test_one_process_needs_no_torchrun(tiny_space):
    """The same script runs alone: the evaluator is called once, with the order of the genes."""
    asked = []

    def evaluator(archs):
        asked.append(list(archs))
        return [Score(arch.genes[0] / 3, 0.0, 1) for arch in archs]

    archs = [tiny_space.everywhere(3), tiny_space.everywhere(0)]
    scores = DistributedEvaluator(evaluator)(archs)
    assert [score.accuracy for score in scores] == [1, 0] and asked == [archs[::-1]]


def test_a_silly_timeout_is_refused():
    """Named in one line."""
    with pytest.raises(InputError, match="timeout: got 0"):
        Exchange(0)
