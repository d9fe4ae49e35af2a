"""Training of cells: the optimiser against TensorFlow's formula, and a run on the embedded digits."""

import math

import pytest

from spos_fast.errors import InputError
from spos_fast.nasbench import OPERATIONS
from spos_fast.nasbench.model_spec import ModelSpec

torch = pytest.importorskip("torch")
SPEC = ModelSpec([[0, 1, 1], [0, 0, 1], [0, 0, 0]], ["input", OPERATIONS[0], "output"])
TINY = {"stem_channels": 8, "stacks": 2, "cells_per_stack": 1}


def test_rmsprop_is_tensorflows() -> None:
    """Three steps of one weight against the documented update written out in Python floats: mean square from 1, epsilon
    under the root, learning rate inside the momentum, L2 in the gradient."""
    from spos_fast.nasbench.training import Recipe, RMSProp

    weight = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = RMSProp([weight], Recipe())
    value, square, move = 0.7, 1.0, 0.0
    for step, slope in enumerate((0.5, -2.0, 3.0)):
        lr = 0.2 / (step + 1)
        weight.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        gradient = slope + 1e-4 * value
        square = 0.9 * square + 0.1 * gradient**2
        move = 0.9 * move + lr * gradient / math.sqrt(square + 1.0)
        value -= move
        assert weight.item() == pytest.approx(value, rel=1e-12)


def test_digits() -> None:
    """Ten epochs on 8x8 digits: three evaluations at the right steps, accuracy far above chance, time that grows, the
    same numbers for the same seed, and torch's global generator untouched."""
    from spos_fast.data import load
    from spos_fast.nasbench import Recipe, evaluate

    source = load("digits")
    # Statistics that follow in a few steps: there are 168.
    recipe = Recipe(epochs=10, batch_size=64, bn_momentum=0.9)
    before = torch.get_rng_state()
    first = evaluate(SPEC, source, recipe, seed=3, **TINY)
    assert torch.equal(before, torch.get_rng_state())
    steps = int(10 * source.train_size / 64)
    assert [(e.epoch, e.step) for e in first] == [(0.0, 0), (5.0, int(5 * source.train_size / 64)), (10.0, steps)]
    assert first[0].training_time == 0 < first[1].training_time < first[2].training_time
    assert first[0].test_accuracy < 0.4
    assert min(first[2].train_accuracy, first[2].validation_accuracy, first[2].test_accuracy) > 0.85
    again = evaluate(SPEC, source, recipe, seed=3, **TINY)
    assert [e.validation_accuracy for e in again] == [e.validation_accuracy for e in first]


def test_first_step_moves_nothing() -> None:
    """As in the official code, the learning rate of step 0 is 0."""
    from spos_fast.data import load
    from spos_fast.nasbench import Recipe, training

    weights = []
    step = training._step

    def watched(net, *rest):
        before = net.classifier.weight.detach().clone()
        loss = step(net, *rest)
        weights.append(bool(torch.equal(before, net.classifier.weight)))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", watched)
        training.evaluate(SPEC, load("digits"), Recipe(epochs=1, batch_size=256), **TINY)
    assert weights[0] is True
    assert not any(weights[1:])
    assert len(weights) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: got 0; expected a positive number"),
        ({"shards": 3}, "shards: got 3; a batch of 256 images"),
        ({"momentum": 1.0}, "momentum: got 1.0"),
        ({"learning_rate": math.inf}, "learning_rate: got inf"),
    ],
)
def test_recipe_errors(settings, message) -> None:
    """Settings that make no training are refused by name."""
    from spos_fast.nasbench import Recipe

    with pytest.raises(InputError, match=message):
        Recipe(**settings)


def test_batch_larger_than_the_data() -> None:
    """A batch that the data cannot fill is refused before anything runs."""
    from spos_fast.data import load
    from spos_fast.nasbench import Recipe, evaluate

    with pytest.raises(InputError, match="batch_size: got 4096; there are"):
        evaluate(SPEC, load("digits"), Recipe(batch_size=4096))
