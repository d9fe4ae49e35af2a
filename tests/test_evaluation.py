"""Scores are repeatable bit for bit, and are the accuracy of the recalibrated path."""

import dataclasses

import numpy as np
import pytest
import torch

from spos_fast import Evaluator, InputError, data, evaluate, recalibrate
from spos_fast.data import Normalization
from spos_fast.nn import fused
from spos_fast.spaces import ShuffleNetV2


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
    assert net.training and not score.failed
    assert evaluate(plain, validation.batches(50)).accuracy == score.accuracy


@pytest.mark.parametrize("stacked", [False, True])
def test_without_recalibration_a_path_runs_on_the_statistics_that_training_left(tiny_space, digits, stacked):
    """Mode "none" is the supernet in evaluation mode, whatever the calibration images are."""
    torch.manual_seed(0)
    net = tiny_space.supernet().train()
    rng = np.random.default_rng(0)
    archs = [tiny_space.sample(rng) for _ in range(5)]
    with torch.no_grad():
        for arch in archs[:3]:
            net(digits.calibration(64, seed=1).pixels.float() / 100, arch)
    scores = Evaluator(net, digits.calibration(2, seed=0), digits.validation(), mode="none", stacked=stacked)(archs)
    net.eval()
    for arch, score in zip(archs, scores, strict=True):
        with torch.no_grad():
            made = [(net(x, arch), labels) for x, labels in digits.validation().batches(256)]
        logits, labels = torch.cat([x for x, _ in made]), torch.cat([labels for _, labels in made])
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1 / len(labels))
    calibrated = Evaluator(net, digits.calibration(128, seed=0), digits.validation())(archs)
    assert all(abs(a.loss - b.loss) > 1e-4 for a, b in zip(scores, calibrated, strict=True))


def test_without_recalibration_statistics_that_are_not_finite_are_a_failure(tiny_space, digits):
    """A path through a layer whose running variance is NaN has failed, the others have not."""
    torch.manual_seed(0)
    net = tiny_space.supernet()
    broken = net.features[3][1]
    next(m for m in broken.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var[0] = float("nan")
    archs = [tiny_space.architecture([0, 1, 2, last]) for last in (0, 1)]
    scores = Evaluator(net, digits.calibration(2, seed=0), digits.validation(), mode="none")(archs)
    assert [score.failed for score in scores] == [False, True]


def test_calibration_batches_are_of_equal_size(evaluator):
    """A short last batch would weigh as much as a full one."""
    assert [len(batch) for batch in evaluator._calibration_batches()] == [50, 50, 50, 50]


def test_scoring_leaves_the_supernet_alone(evaluator, tiny_space):
    """Weights, running statistics and counters are as before, training flags too; no gradients appear."""
    net = evaluator.net.train()
    net.conv_last.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    evaluator([tiny_space.everywhere(1), tiny_space.everywhere(2)])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == flags
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "modules"])
def test_failure_and_interruption_leave_the_supernet_alone(evaluator, tiny_space, monkeypatch, reference):
    """Ctrl-C in the middle of a block, with fused ops and without: buffers, momenta, flags and hooks are restored."""
    if reference:
        monkeypatch.setattr(fused, "has_kernel", lambda op, x: False)
    net = evaluator.net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    last = net.features[3][1].branch_main[6]
    hook = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluator([tiny_space.everywhere(1)])
    hook.remove()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for module in net.modules():
        assert module.training and not module._forward_pre_hooks
        assert getattr(module, "momentum", 0.1) == 0.1
    assert evaluator([tiny_space.everywhere(1)])[0].images == len(evaluator.validation)


def test_nan_weights_fail_and_do_not_spread(evaluator, tiny_space):
    """A broken candidate fails and says so, with all that share its block; the others keep their scores."""
    good = tiny_space.everywhere(1)
    (expected,) = evaluator([good])
    assert not expected.failed
    with torch.no_grad():
        evaluator.net.features[1][0].branch_main[0].weight.fill_(float("nan"))
    genes = ([1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 2, 3], [0, 0, 0, 0])
    archs = [tiny_space.architecture(each) for each in genes]
    broken = evaluator(archs)
    stacked = Evaluator(evaluator.net, evaluator.calibration, evaluator.validation, calibration_batch=64, stacked=True)(
        archs
    )
    assert [score.failed for score in stacked] == [True, False, True, True] and stacked[1] == expected
    assert [score.failed for score in broken] == [True, False, True, True]
    assert broken[1] == expected
    for score in (broken[0], broken[2], broken[3]):
        assert score.accuracy == 0 and np.isnan(score.loss) and score.images == expected.images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_no_numbers_fail_all(tiny_space, digits, value):
    """A normalisation that makes NaN or infinity of every pixel: all candidates fail, none silently."""
    net, validation = tiny_space.supernet(), digits.validation()
    bad = dataclasses.replace(validation, normalization=Normalization((value,), (1.0,)))
    archs = [tiny_space.everywhere(choice) for choice in range(4)]
    assert all(score.failed for score in Evaluator(net, bad, validation)(archs))
    assert all(score.failed for score in Evaluator(net, validation, bad)(archs))


def test_sets_smaller_than_a_batch_and_single_values(tiny_space, digits):
    """A small set is one batch. One value a channel has no variance: refused before any statistic is written."""
    images = digits.validation()
    one = dataclasses.replace(images, pixels=images.pixels[:1], labels=images.labels[:1])
    few = dataclasses.replace(images, pixels=images.pixels[:3], labels=images.labels[:3])
    net, arch = tiny_space.supernet(), tiny_space.everywhere(0)
    assert Evaluator(net, few, few)([arch])[0].images == 3
    assert not Evaluator(net, one, few)([arch])[0].failed  # 4 x 4 maps at the end
    space = ShuffleNetV2(input_size=2, num_classes=10, in_channels=1, stage_channels=(32,), stage_repeats=(2,),
                         stage_strides=(2,))  # fmt: skip
    tiny = [dataclasses.replace(part, pixels=part.pixels[:, :, :2, :2]) for part in (one, few)]
    net = space.supernet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(InputError, match="value a channel"):
        Evaluator(net, *tiny)([space.everywhere(0)])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert Evaluator(net, tiny[1], tiny[1])([space.everywhere(0)])[0].images == 3


def test_labels_without_a_logit_are_refused(tiny_space, digits):
    """Before anything is scored."""
    images = digits.validation()
    for change, says in ((5, "class 14"), (-1, "class -1")):
        wrong = dataclasses.replace(images, labels=images.labels + change)
        with pytest.raises(InputError, match=says):
            Evaluator(tiny_space.supernet(), images, wrong)([tiny_space.everywhere(0)])


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
        ((net, images, images), {"memory": 0}, "memory"),
        ((tiny_space.build(tiny_space.everywhere(0)), images, images), {}, "Supernet"),
    ):
        with pytest.raises(InputError, match=says):
            Evaluator(*arguments, **options)
    with pytest.raises(InputError, match="batches"):
        evaluate(tiny_space.build(tiny_space.everywhere(0)), [])
