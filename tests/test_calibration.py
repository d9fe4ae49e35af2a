"""Recalibrated statistics are what their definition says, and failure leaves the network alone."""

import pytest
import torch
from torch import nn

from spos_fast import InputError, recalibrate


def _network(affine=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4, affine=affine),
    )  # fmt: skip


def _batches(sizes=(8, 8, 5)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 9, 9, generator=generator) * 3 + 1 for n in sizes]


def _inputs_of_norms(network, batches):
    """Inputs of both normalisation layers for every batch, in float64, normalised by batch statistics."""
    double = _network().double()
    double.load_state_dict(network.state_dict())
    first, second = [], []
    for batch in batches:
        x = double[0](batch.double())
        first.append(x)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        second.append(double[4](torch.relu((x - mean) / (var + 1e-5).sqrt())))
    return first, second


def _moments(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)


def _expected(inputs, mode):
    if mode == "pooled":
        flat = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
        return flat.mean(1), flat.var(1, unbiased=True)
    mean, var = torch.zeros_like(inputs[0][0, :, 0, 0]), torch.ones_like(inputs[0][0, :, 0, 0])
    for number, x in enumerate(inputs, 1):
        weight = 0.1 if mode == "ema" else 1 / number
        batch_mean, batch_var = _moments(x)
        mean, var = mean + weight * (batch_mean - mean), var + weight * (batch_var - var)
    return mean, var


@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_equal_the_definition_in_float64(mode, affine):
    """All modes, batches of different sizes, dropout off, against a computation by hand."""
    network = _network(affine)
    batches = _batches()
    with torch.no_grad():
        for layer in (network[1], network[5]):
            layer.running_mean.fill_(100)
    network.eval()
    recalibrate(network, batches, mode)
    reference = _network(True)
    reference.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        for layer, inputs in zip((network[1], network[5]), _inputs_of_norms(reference, batches), strict=True):
            mean, var = _expected(inputs, mode)
            torch.testing.assert_close(layer.running_mean.double(), mean, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(layer.running_var.double(), var, rtol=2e-5, atol=2e-6)


def test_pooled_does_not_depend_on_how_a_first_layer_is_batched():
    """Exact over all images: the first layer's statistics are those of the whole set, whatever the batch sizes."""
    images = torch.cat(_batches())
    results = []
    for sizes in ((21,), (8, 8, 5), (1, 20), (7, 7, 7)):
        network = _network()
        recalibrate(network, images.split(list(sizes)), "pooled")
        results.append((network[1].running_mean.clone(), network[1].running_var.clone()))
    for mean, var in results[1:]:
        torch.testing.assert_close(mean, results[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, results[0][1], rtol=1e-6, atol=1e-6)


def test_everything_but_the_statistics_is_restored():
    """Training flags, momenta, hooks and weights are as before; no gradients appear."""
    network = _network().train()
    network[3].eval()
    network[1].momentum = 0.3
    flags = [module.training for module in network.modules()]
    weights = [p.clone() for p in network.parameters()]
    recalibrate(network, _batches(), "pooled")
    assert [module.training for module in network.modules()] == flags
    assert network[1].momentum == 0.3 and network[5].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())
    assert not network[1]._forward_pre_hooks


@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
def test_failure_leaves_the_old_statistics(mode):
    """No batch, a batch of a wrong shape after a good one, Ctrl-C: the network is as it was."""

    def interrupted():
        yield _batches()[0]
        raise KeyboardInterrupt

    for batches, error in (([], InputError), ([_batches()[0], torch.zeros(2, 5, 9, 9)], RuntimeError),
                           (interrupted(), KeyboardInterrupt)):  # fmt: skip
        network = _network().train()
        network(_batches()[1])
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(error):
            recalibrate(network, batches, mode)
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
        assert network.training and network[1].training


def test_wrong_arguments_are_refused():
    """Unknown mode; a model without batch normalisation, or without running statistics."""
    with pytest.raises(InputError, match="mode"):
        recalibrate(_network(), _batches(), "mean")
    for model in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(InputError, match="normalisation"):
            recalibrate(model, _batches())


def test_other_dimensions():
    """Networks with BatchNorm1d and BatchNorm3d recalibrate too."""
    for layer, shape in (
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 5)),
        (nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    ):
        x = torch.randn(shape) * 2 + 1
        recalibrate(layer, [x], "pooled")
        flat = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.running_mean, flat.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, flat.var(1), rtol=1e-5, atol=1e-6)
