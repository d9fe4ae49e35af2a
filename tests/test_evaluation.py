"""Scores are repeatable bit for bit, and are the accuracy of the recalibrated path."""

import dataclasses

import numpy as np
import pytest
import torch

from spos_fast import Evaluator, InputError, data, evaluate, recalibrate


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture()
def evaluator(tiny_space, digits):
    torch.manual_seed(0)
    net = tiny_space.supernet()
    return Evaluator(net, digits.calibration(200, seed=0), digits.validation(), calibration_batch=64)


def test_the_same_candidate_scores_the_same_bits(evaluator, tiny_space):
    """Whatever was scored before, in whatever order."""
    rng = np.random.default_rng(0)
    archs = list({tiny_space.sample(rng) for _ in range(6)})
    first = evaluator(archs)
    again = evaluator(list(reversed(archs)))
    assert first == list(reversed(again))
    assert evaluator([archs[2]]) == [first[2]]
    assert len({score.loss for score in first}) == len(archs)


@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
def test_a_score_is_the_accuracy_of_the_recalibrated_extracted_network(tiny_space, digits, mode):
    """The same as by hand: extract, recalibrate on the same batches, count right answers."""
    torch.manual_seed(0)
    net = tiny_space.supernet().train()
    calibration, validation = digits.calibration(128, seed=0), digits.validation()
    arch = tiny_space.architecture([3, 1, 2, 0])
    (score,) = Evaluator(net, calibration, validation, mode=mode, calibration_batch=64, batch_size=50)([arch])
    plain = net.extract(arch)
    recalibrate(plain, list(calibration.batches(64)), mode)
    plain.eval()
    with torch.no_grad():
        logits = torch.cat([plain(x) for x, _ in validation.batches(50)])
    labels = validation.labels
    assert score.images == len(labels)
    assert score.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert net.training
    assert evaluate(plain, validation.batches(50)).accuracy == score.accuracy


def test_calibration_batches_are_of_equal_size(evaluator):
    """A short last batch would weigh as much as a full one."""
    assert [len(batch) for batch in evaluator._calibration_batches()] == [50, 50, 50, 50]


def test_weights_and_other_paths_are_untouched(evaluator, tiny_space):
    """Scoring writes to the statistics of its path only."""
    net = evaluator.net
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluator([tiny_space.everywhere(1)])
    for name, value in net.state_dict().items():
        off_path = name.startswith("features.") and name.split(".")[2] != "1"
        if off_path or ("running" not in name and "tracked" not in name):
            assert torch.equal(before[name], value), name


def test_nan_weights_score_zero_and_do_not_spread(evaluator, tiny_space):
    """A broken candidate fails; its siblings keep their scores."""
    good = tiny_space.everywhere(1)
    (expected,) = evaluator([good])
    with torch.no_grad():
        evaluator.net.features[1][0].branch_main[0].weight.fill_(float("nan"))
    broken, same = evaluator([tiny_space.everywhere(0), good])
    assert broken.accuracy == 0 and np.isnan(broken.loss)
    assert same == expected


def test_empty_sets_and_silly_batches_are_refused(tiny_space, digits):
    """Named in one line."""
    net, images = tiny_space.supernet(), digits.validation()
    empty = dataclasses.replace(images, pixels=images.pixels[:0], labels=images.labels[:0])
    for arguments, options, says in (
        ((net, empty, images), {}, "calibration"),
        ((net, images, empty), {}, "validation"),
        ((net, images, images), {"calibration_batch": 1}, "calibration_batch"),
        ((net, images, images), {"batch_size": 0}, "batch_size"),
        ((net, images, images), {"mode": "mean"}, "mode"),
        ((tiny_space.build(tiny_space.everywhere(0)), images, images), {}, "Supernet"),
    ):
        with pytest.raises(InputError, match=says):
            Evaluator(*arguments, **options)
    with pytest.raises(InputError, match="batches"):
        evaluate(tiny_space.build(tiny_space.everywhere(0)), [])
