"""Measuring: every time lands in the entry of the block that took it, and predictions are compared rightly."""

import numpy as np
import pytest
import torch
from torch import nn

from spos_fast import InputError
from spos_fast.latency import LatencySettings, Prediction, compare, measure, timing
from spos_fast.spaces import ShuffleNetV2
from tests.latency.test_table import TINY, invented

HEAD = 1000


def _planned(part) -> float:
    """Seconds that the false clock gives a part: a nanosecond for each of its parameters."""
    if isinstance(part, timing.Network):
        return _planned(part.first_conv) + sum(map(_planned, part.features)) + HEAD * 1e-9
    return sum(p.numel() for p in part.parameters()) * 1e-9 if isinstance(part, nn.Module) else HEAD * 1e-9


@pytest.fixture()
def planned(monkeypatch):
    """Replaces the clock; records what ran."""
    ran = []

    def chain(self, parts, x):
        for part in parts:
            x = part(x)
        ran.append(list(parts))
        assert not torch.is_grad_enabled() and not any(getattr(part, "training", False) for part in parts)
        return list(map(_planned, parts))

    monkeypatch.setattr(timing.Clock, "chain", chain)
    return ran


@pytest.mark.parametrize("widths", [{}, {"channels": (0.5, 1.0, 1.6)}], ids=["blocks", "blocks and widths"])
def test_every_time_is_in_its_entry(planned, widths):
    """A false clock by the size of blocks: a mix-up of layers, choices or widths would show. Every choice of every
    layer runs once a round.
    """
    space = ShuffleNetV2(**TINY, **widths)
    table = measure(space, LatencySettings(rounds=3, warmup=1))
    choices = 4 * len(widths.get("channels", (1,)))
    assert len(planned) == 4 * choices
    for first in range(0, len(planned), choices):
        for layer in zip(*planned[first : first + choices], strict=True):
            assert len(set(map(id, layer))) == choices
    for number, layer in enumerate(table.layers):
        for genes in np.ndindex(layer.median.shape):
            arch = space.everywhere(*map(int, genes))
            block = space.build(arch).features[number]
            assert layer.median[genes] == layer.p20[genes] == round(_planned(block) * 1e9)
    assert table.head.median == HEAD
    prediction = compare(space, table, 12)
    assert prediction.predicted == prediction.measured and len(set(prediction.genes)) == 12
    assert prediction.spearman == pytest.approx(1) and prediction.mean_error == prediction.bias == 0


def test_a_real_measurement():
    """Positive times in order, the number of threads on record, and progress to the end."""
    space, heard = ShuffleNetV2(**TINY), []
    settings = LatencySettings(rounds=3, warmup=1, batch_size=2)
    table = measure(space, settings, progress=lambda *at: heard.append(at))
    assert table.settings.threads == torch.get_num_threads() and heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for spread in (table.stem, *table.layers, table.head):
        assert (spread.p20 > 0).all() and (spread.p20 <= spread.median).all() and (spread.median <= spread.p80).all()
    prediction = compare(space, table, 3)
    table.attach(space)
    for genes, predicted in zip(prediction.genes, prediction.predicted, strict=True):
        assert space.cost(space.architecture(genes)).latency_ms == predicted


def test_threads_are_given_back():
    """Also after an error: the rest of the program computes as before."""
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), timing.quiet(LatencySettings(threads=before + 1)) as threads:
        assert threads == torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before and torch.is_grad_enabled()


def test_equal_structures_share_what_is_compiled(monkeypatch):
    """Weights differ, the compiled code does not; other structures get their own."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: made.append(function) or function)
    compiler, layers = timing.Compiler(), [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)]
    parts = [compiler(layer, (timing.structure(layer), (2, 3))) for layer in layers]
    assert len(made) == 2 and len({function.__code__ for function in made}) == 2
    x = torch.randn(2, 3)
    for part, layer in zip(parts, layers, strict=True):
        assert torch.equal(part(x), layer(x))


def test_correlations_compare_predictions_with_measurements():
    """4 networks of which the two slowest swap places: 5 of 6 pairs agree. Quantiles play no part."""
    quantiles = ((4.0, 3.0, 2.0, 1.0),) * 2
    prediction = Prediction(((0,),) * 4, (1.0, 2.0, 3.0, 4.0), (1.5, 2.5, 9.0, 8.0), *quantiles)
    assert prediction.kendall == pytest.approx(4 / 6) and prediction.spearman == pytest.approx(0.8)


def test_errors_are_relative_to_the_measurement():
    """Half and double: 50 % and 100 %, which as a bias partly cancel."""
    prediction = Prediction(((0,), (1,)), (1.0, 4.0), (2.0, 2.0), (2.0,) * 2, (2.0,) * 2)
    assert prediction.mean_error == 0.75 and prediction.bias == 0.25


def test_comparisons_that_tell_nothing_are_refused():
    """One network, and a table of another space."""
    space = ShuffleNetV2(**TINY)
    with pytest.raises(InputError, match="networks: got 1"):
        compare(space, invented(space), 1)
    with pytest.raises(InputError, match="head_channels"):
        compare(ShuffleNetV2(**{**TINY, "head_channels": 64}), invented(space), 2)
