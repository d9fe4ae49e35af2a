"""Recalibration of layers that are not PyTorch's own: subclasses, and modules that normalise by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from spos_fast import InputError, recalibrate


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 9, 9, generator=generator) * 2 + 1 for _ in range(3)]


def _network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))


def _pooled(values):
    values = torch.cat(values).double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


def _check(norm, inputs):
    mean, var = _pooled(inputs)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-6)


class BatchRenorm(nn.BatchNorm2d):
    """Ioffe (2017): corrects the batch by its running statistics, which it reads in training mode."""

    def forward(self, x):
        mean, deviation = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + self.eps).sqrt()
        usual = (self.running_var + self.eps).sqrt()
        scale, shift = (deviation / usual).clamp(1 / 3, 3), ((mean - self.running_mean) / usual).clamp(-5, 5)
        out = (x - mean[:, None, None]) / deviation[:, None, None] * scale[:, None, None] + shift[:, None, None]
        if self.training:
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (deviation.square() - self.running_var)
        return out


class GhostNorm(nn.BatchNorm2d):
    """Splits the batch, each with statistics of its own: more of them than the layer has features."""

    def __init__(self, features, splits):
        super().__init__(features)
        self.splits = splits
        self.register_buffer("running_mean", torch.zeros(features * splits))
        self.register_buffer("running_var", torch.ones(features * splits))

    def forward(self, x):
        parts = x.reshape(-1, x.shape[1] * self.splits, *x.shape[2:])
        return functional.batch_norm(parts, self.running_mean, self.running_var, training=self.training).view_as(x)


@torch.no_grad()
def test_a_layer_that_reads_its_statistics():
    """They stay what they are while it runs: what comes behind it sees what it would see in training."""
    net = _network(BatchRenorm(8))
    net.train()
    for batch in _batches():
        net(batch)
    twin, seen = copy.deepcopy(net), []
    twin[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in _batches():
        twin(batch)
    recalibrate(net, _batches(), "pooled")
    _check(net[1], [net[0](batch) for batch in _batches()])
    _check(net[4], seen)


@torch.no_grad()
def test_a_layer_with_several_statistics_a_feature():
    """Ghost batch normalisation: every split has its own images' statistics."""
    net = _network(GhostNorm(8, 4))
    recalibrate(net, _batches(), "pooled")
    _check(net[1], [net[0](batch).reshape(2, 32, 7, 7) for batch in _batches()])


@torch.no_grad()
def test_a_layer_that_uses_some_of_its_channels():
    """A full input of which a mask is normalised: the other channels keep their statistics."""
    mask = torch.tensor([True, False, True])

    class Masked(nn.BatchNorm2d):
        def forward(self, x):
            mean, var = self.running_mean[mask], self.running_var[mask]
            out = functional.batch_norm(x[:, mask], mean, var, training=self.training)
            self.running_mean[mask], self.running_var[mask] = mean, var
            return out

    norm = Masked(3)
    recalibrate(norm, _batches(), "pooled")
    mean, var = _pooled(_batches())
    torch.testing.assert_close(norm.running_mean[mask].double(), mean[mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var[mask].double(), var[mask], rtol=1e-5, atol=1e-6)
    assert norm.running_mean[1] == 0 and norm.running_var[1] == 1


def test_channels_that_cannot_be_told():
    """A layer that moves other channels than come in is named, instead of getting wrong statistics."""

    class Halves(nn.BatchNorm2d):
        def forward(self, x):
            self.running_var.copy_(x.var((0, 2, 3)).repeat(2))
            return x

    norm = Halves(6)
    with pytest.raises(InputError, match="model: layer Halves, a Halves, gets 3 channels and moves 6 of its 6"):
        recalibrate(norm, _batches())
    assert (norm.running_var == 1).all()


class ByHand(nn.Module):
    """A module that runs another's layer itself, with one of PyTorch's functions and the flag of one of the two."""

    def __init__(self, function, flag):
        super().__init__()
        self.bn, self.function, self.flag = nn.BatchNorm2d(8), function, flag

    def forward(self, x):
        bn = self.bn
        training = {"own": self, "layer": bn}[self.flag].training
        if self.function is torch.batch_norm:
            return torch.batch_norm(
                x, bn.weight, bn.bias, bn.running_mean, bn.running_var, training, 0.1, 1e-5, cudnn_enabled=False
            )
        return functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training)


@pytest.mark.parametrize("flag", ["own", "layer"])
@pytest.mark.parametrize("function", [functional.batch_norm, torch.batch_norm])
def test_layers_that_are_run_by_hand(function, flag):
    """Whichever function and training flag it is, the layers are recalibrated as if they had been called."""
    net, usual = _network(ByHand(function, flag)), _network(nn.BatchNorm2d(8))
    usual.load_state_dict({name.replace("1.bn.", "1."): value for name, value in net.state_dict().items()})
    for model in (net, usual):
        recalibrate(model, _batches(), "pooled")
    assert net[1].bn.num_batches_tracked == 3
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), usual.state_dict().values(), strict=True))


@torch.no_grad()
def test_layers_left_out_that_are_run_by_hand():
    """They normalise by the statistics that they have."""
    net, seen = _network(ByHand(torch.batch_norm, "own")), []
    net[1].bn.running_mean.fill_(7)
    wanted = net.eval()[:2](_batches()[0])
    hook = net[1].register_forward_hook(lambda _, args, out: seen.append(out))
    recalibrate(net, _batches(), modules=[net[4]])
    hook.remove()
    assert torch.equal(seen[0], wanted) and (net[1].bn.running_mean == 7).all()


def test_scripted_layers():
    """Code that cannot be looked into is named, as a whole model and as a part, instead of skipped or denied; where no
    normalisation is scripted, or modules leave it out, nothing is wrong."""
    scripted = torch.jit.script(nn.BatchNorm2d(8))
    for model, name in ((torch.jit.script(_network(nn.BatchNorm2d(8))), "Sequential"), (_network(scripted), "BatchNo")):
        with pytest.raises(InputError, match=f"model: got a scripted or traced {name}"):
            recalibrate(model, _batches())
    net = _network(torch.jit.script(nn.Dropout()))
    recalibrate(net, _batches())
    left_out = _network(scripted)
    recalibrate(left_out, _batches(), modules=[left_out[4]])
    assert net[4].num_batches_tracked == left_out[4].num_batches_tracked == 3
