"""Early stopping errs no more often than it says, and changes nothing for the candidates that it leaves alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from spos_fast import Architecture, EarlyStopping, Evaluator, InputError, Score, data
from spos_fast.early_stopping import fewest_correct


def _with_bar(accuracy, keep=1, confidence=0.99):
    stopping = EarlyStopping(keep, confidence)
    archs = [Architecture("known", (number,)) for number in range(keep)]
    stopping.learn(archs, [Score(accuracy, 1.0, 100)] * keep)
    return stopping


@pytest.mark.parametrize(("right", "seen", "total"), [(60, 20, 100), (3, 50, 90), (97, 50, 100), (0, 5, 9), (9, 5, 9)])
def test_the_bound_is_the_exact_tail(right, seen, total):
    """Against the hypergeometric distribution in whole numbers."""
    ways = [math.comb(right, c) * math.comb(total - right, seen - c) for c in range(seen + 1)]
    for chance in (1e-6, 1e-3, 0.3):
        tails = [sum(ways[: c + 1]) / math.comb(total, seen) for c in range(seen + 1)]
        assert fewest_correct(right, seen, total, chance) == next(c for c in range(seen + 1) if tails[c] >= chance)


@pytest.mark.parametrize("confidence", [0.7, 0.95])
def test_candidates_at_the_bar_are_dropped_no_more_often_than_stated(confidence):
    """The worst case, in 4,000 random orders; and a clearly worse candidate hardly ever sees half of the images."""
    total, batch, draws = 600, 50, 4000
    rng = np.random.default_rng(0)
    stopping = _with_bar(0.7, confidence=confidence)

    def images_seen(right):
        answers = rng.permuted(np.tile(np.arange(total) < right, (draws, 1)), axis=1)
        seen = np.full(draws, total)
        for images in range(total - batch, 0, -batch):
            correct = torch.from_numpy(answers[:, :images].sum(1))
            seen[~stopping.alive(correct, images, total, total // batch - 1).numpy()] = images
        return seen

    wrong = (images_seen(420) < total).mean()
    assert 0 < wrong <= 1 - confidence
    assert (images_seen(330) <= total / 2).mean() > 0.9


def test_nothing_is_dropped_before_enough_are_known():
    """The bar is the keep-th best completed accuracy; stopped scores do not count, nor does one that comes twice."""
    stopping, correct = EarlyStopping(keep=2), torch.tensor([0, 3])
    archs = [Architecture("any", (number,)) for number in range(3)]
    stopping.learn(archs[:2], [Score(0.9, 0.1, 100), Score(0.5, 0.1, 30, stopped=True)])
    stopping.learn(archs[:1], [Score(0.9, 0.1, 100)])
    assert stopping.bar is None and stopping.alive(correct, 50, 100, 1).tolist() == [True, True]
    stopping.learn(archs[2:], [Score(0.04, 0.1, 100)])
    assert stopping.bar == 0.04 and stopping.alive(correct, 99, 100, 1).tolist() == [False, True]
    stopping.forget()
    assert stopping.bar is None


@pytest.fixture(scope="module")
def scoring(tiny_space):
    """A function from options to a new evaluator, and some architectures."""
    digits = data.load("digits")
    calibration, validation = digits.calibration(64, seed=0), digits.validation()
    torch.manual_seed(0)
    net = tiny_space.supernet()
    rng = np.random.default_rng(1)
    archs = list({tiny_space.sample(rng) for _ in range(12)})
    return lambda **options: Evaluator(net, calibration, validation, batch_size=32, **options), archs


def test_completed_candidates_keep_their_accuracy(scoring):
    """Some are dropped, all of them below the bar; the others see all images and score as without early stopping."""
    evaluator, archs = scoring
    plain = evaluator()(archs)
    bar = sorted(score.accuracy for score in plain)[-3]
    early = evaluator(early_stopping=_with_bar(bar, confidence=0.5))(archs)
    stopped = [score for score in early if score.stopped]
    assert 0 < len(stopped) < len(archs)
    for before, after in zip(plain, early, strict=True):
        if after.stopped:
            assert after.images % 32 == 0 and after.images < before.images and after.accuracy < bar
        else:
            assert (after.accuracy, after.images) == (before.accuracy, before.images)
            assert after.loss == pytest.approx(before.loss)


def test_a_score_does_not_depend_on_its_siblings(scoring):
    """Alone or together: the same bits. What ranks and resuming rest on."""
    evaluator, archs = scoring
    together = evaluator(early_stopping=_with_bar(0.15, confidence=0.5))(archs)
    assert len({score.images for score in together}) > 1
    alone = [evaluator(early_stopping=_with_bar(0.15, confidence=0.5))([arch])[0] for arch in archs]
    assert together == alone


def test_hopeless_candidates_cost_no_more_batches(scoring):
    """With a bar that nothing reaches, validation ends after the first batch, and all scores say so."""
    evaluator, archs = scoring
    early = evaluator(early_stopping=_with_bar(1.0))
    walked = []
    images = early.validation
    early.validation = dataclasses.replace(
        images, normalization=lambda pixels: walked.append(len(pixels)) or images.normalization(pixels)
    )
    scores = early(archs)
    assert walked == [32] and {(score.images, score.stopped) for score in scores} == {(32, True)}


def test_broken_candidates_have_failed_and_are_not_stopped(tiny_space, scoring):
    """NaN is reported as such even if the candidate is dropped for it."""
    evaluator, archs = scoring
    early = evaluator(early_stopping=_with_bar(1.0))
    early.net.classifier[0].weight.data[0, 0] = float("nan")
    try:
        (score,) = early(archs[:1])
    finally:
        early.net.classifier[0].weight.data[0, 0] = 0
    assert score.failed and not score.stopped and score.accuracy == 0


def test_wrong_numbers_are_refused(scoring):
    """Named in one line."""
    evaluator, _ = scoring
    for keep, confidence, says in ((0, 0.9, "keep: got 0"), (1, 0.3, "confidence: got 0.3"), (1, 1.0, "confidence")):
        with pytest.raises(InputError, match=says):
            EarlyStopping(keep, confidence)
    with pytest.raises(InputError, match="batch_size: got 5000; early stopping"):
        Evaluator(
            evaluator().net, evaluator().calibration, evaluator().validation,
            batch_size=5000, early_stopping=EarlyStopping(1),
        )  # fmt: skip
