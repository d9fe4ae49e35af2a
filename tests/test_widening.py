"""The widening schedule: a function of the step, the widest ratio first, all ratios in the end."""

import pytest

from spos_fast import Constraint, InputError, UniformSampler, data
from spos_fast.config_io import config_from
from spos_fast.spaces import ShuffleNetV2
from spos_fast.training import TrainConfig, train
from spos_fast.widening import WideningSampler

SIZES = dict(
    input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
    stage_repeats=(2, 2), stage_strides=(1, 2), head_channels=32,
)  # fmt: skip
RATIOS = (0.4, 0.8, 1.2, 1.6)


@pytest.fixture(scope="module")
def space():
    return ShuffleNetV2(**SIZES, channels=RATIOS)


def _widths_drawn(sampler, steps):
    return {gene for step in steps for gene in sampler.at(0, step).genes[1::2]}


def test_ratios_join_one_by_one_from_the_widest(space):
    """Only the widest at first, each smaller one at equal distances, and all of them drawn once they are in."""
    sampler = WideningSampler(UniformSampler(space), steps=200, start=0.25, end=0.75)
    assert [sampler.widths(step) for step in (0, 49, 50, 99, 100, 149, 150, 199)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert _widths_drawn(sampler, range(50)) == {3}
    assert _widths_drawn(sampler, range(50, 100)) == {2, 3}
    assert _widths_drawn(sampler, range(100, 150)) == {1, 2, 3}
    assert _widths_drawn(sampler, range(150, 200)) == {0, 1, 2, 3}
    blocks = {gene for step in range(50) for gene in sampler.at(0, step).genes[::2]}
    assert blocks == {0, 1, 2, 3}


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.0, 1.0), (0.3, 0.301)])
@pytest.mark.parametrize("ratios", [(1.0,), (0.5, 1.0), RATIOS])
def test_schedules_at_the_edges(start, end, ratios):
    """Widths only grow, from one to all, whatever the shares and however many ratios there are."""
    sampler = WideningSampler(UniformSampler(ShuffleNetV2(**SIZES, channels=ratios)), 100, start, end)
    widths = [sampler.widths(step) for step in range(101)]
    assert widths == sorted(widths) and widths[-1] == len(ratios) and set(widths) <= set(range(1, len(ratios) + 1))
    assert start == 0 or widths[0] == 1
    for step in (0, 50, 99):
        sampler.at(3, step)


def test_ranges_of_cost_hold_in_the_end(space):
    """The widest networks are all too expensive: they are drawn all the same until every ratio is in."""
    limit = space.cost(space.everywhere(0, 1)).macs
    constraint = Constraint(macs=(None, limit))
    sampler = WideningSampler(UniformSampler(space, constraint), 100, 0.2, 0.6)
    within = [constraint.allows(space.cost(sampler.at(0, step))) for step in range(100)]
    assert not any(within[:20]) and all(within[60:])
    assert [sampler.at(0, step) for step in range(60, 100)] == [sampler.sampler.at(0, step) for step in range(60, 100)]


def test_a_step_depends_on_seed_and_step_only(space):
    """Resumed runs and all ranks draw the same path."""
    first, second = (WideningSampler(UniformSampler(space), 100, 0.2, 0.6) for _ in range(2))
    assert [first.at(1, step) for step in range(100)] == [second.at(1, step) for step in reversed(range(100))][::-1]
    assert [first.at(1, step) for step in range(100)] != [first.at(2, step) for step in range(100)]


def test_training_resumes_to_the_same_bits(space, tmp_path):
    """A run that was stopped in the middle of the schedule ends with the weights of one that was not."""
    import torch

    digits, config = data.load("digits"), TrainConfig(steps=12, batch_size=16, log_every=4, checkpoint_seconds=0)

    class Stopped(Exception):
        pass

    def run(path, stop=None):
        def on_metrics(metrics):
            if metrics.step == stop:
                raise Stopped

        torch.manual_seed(0)
        net = space.supernet()
        sampler = WideningSampler(UniformSampler(space), config.steps, 0.25, 0.75)
        train(net, digits, config, sampler=sampler, seed=3, checkpoint=path, on_metrics=on_metrics)
        return net.state_dict()

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        run(tmp_path / "part.pt", stop=8)
    again = run(tmp_path / "part.pt")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.3), (-0.1, 0.5), (0.5, 1.1)])
def test_shares_that_are_none_are_refused(space, start, end):
    """One line with both, from the sampler and from the settings."""
    with pytest.raises(InputError, match="widening"):
        WideningSampler(UniformSampler(space), 100, start, end)
    with pytest.raises(InputError, match=r"train\.widening_start, widening_end: got"):
        config_from({"train": {"widening_start": start, "widening_end": end}}, "test")


def test_a_space_without_widths_is_refused(tiny_space):
    """The setting would do nothing."""
    with pytest.raises(InputError, match="widths"):
        WideningSampler(UniformSampler(tiny_space), 100, 0.2, 0.6)
