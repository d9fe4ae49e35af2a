"""Recalibration as a drop-in for other supernets: slimmable, once-for-all, mmrazor."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from spos_fast import recalibrate
from spos_fast.calibration import MODES
from spos_fast.nn import SlicedBatchNorm2d
from tests.supernet_styles import MaskedNorm, PrefixNorm, Slim, SwitchableNorm, UniversalNorm, set_mask, set_width

MASK = torch.tensor([True, False, True, True, False, False, False, True])
STYLES = {
    "switchable": (SwitchableNorm, lambda net: set_width(net, 0.5), lambda norm: (norm.bn[0], slice(0, 4))),
    "universal": (UniversalNorm, lambda net: set_width(net, 0.5), lambda norm: (norm.bn[0], slice(0, 4))),
    "once_for_all": (PrefixNorm, lambda net: set_width(net, 0.5), lambda norm: (norm.bn, slice(0, 4))),
    "sliced": (SlicedBatchNorm2d, lambda net: set_width(net, 0.5), lambda norm: (norm, slice(0, 4))),
    "mmrazor": (MaskedNorm, lambda net: set_mask(net, MASK), lambda norm: (norm, MASK)),
    "mmrazor, all": (MaskedNorm, lambda net: set_mask(net, MASK | True), lambda norm: (norm, slice(0, 8))),
    "once_for_all, all": (PrefixNorm, lambda net: set_width(net, 1.0), lambda norm: (norm.bn, slice(0, 8))),
}


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 9, 9, generator=generator) * 2 + 1 for n in (8, 8, 5)]


def _expected(net, mode):
    """Statistics of both layers in float64, from the definition of the mode."""
    inputs = [[], []]
    for batch in _batches():
        x = functional.conv2d(batch.double(), net.conv1.weight.double()[net.used])
        inputs[0].append(x)
        x = functional.batch_norm(x, None, None, training=True).relu()
        inputs[1].append(functional.conv2d(x, net.conv2.weight.double()[net.used][:, net.used]))
    return [_merged(seen, mode) for seen in inputs]


def _merged(seen, mode):
    if mode == "pooled":
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1)
        return values.mean(1), values.var(1)
    mean, var = torch.zeros(seen[0].shape[1]).double(), torch.ones(seen[0].shape[1]).double()
    for number, x in enumerate(seen, 1):
        weight = 0.1 if mode == "ema" else 1 / number
        mean = torch.lerp(mean, x.mean((0, 2, 3)), weight)
        var = torch.lerp(var, x.var((0, 2, 3)), weight)
    return mean, var


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_every_style(style, mode):
    """The path's statistics are those of the definition in float64; whatever the path does not run keeps its own."""
    norm, set_path, layer_of = STYLES[style]
    torch.manual_seed(0)
    net = Slim(norm)
    layers = [module for module in net.modules() if getattr(module, "running_mean", None) is not None]
    for layer in layers:
        layer.running_mean.fill_(7)
        layer.running_var.fill_(9)
    buffers = dict(net.named_buffers())
    recalibrate(net, _batches(), mode, set_path=set_path)

    expected = _expected(net, mode)
    for outer, (mean, var) in zip((net.norm1, net.norm2), expected, strict=True):
        layer, used = layer_of(outer)
        torch.testing.assert_close(layer.running_mean[used].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var[used].double(), var, rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 3
        absent = torch.ones(layer.num_features, dtype=torch.bool)
        absent[used] = False
        layers.remove(layer)
        assert (layer.running_mean[absent] == 7).all() and (layer.running_var[absent] == 9).all()
    assert all((layer.running_mean == 7).all() and (layer.running_var == 9).all() for layer in layers)
    assert all(value is buffers[name] for name, value in net.named_buffers())


@torch.no_grad()
def test_a_path_at_two_widths_in_one_forward():
    """A layer that runs as a narrow and as a wide slice pools each channel over what that channel has seen."""
    net = PrefixNorm(4)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64).float() * 3 + 2
    recalibrate(net, [x], "pooled", forward=lambda x: (net(x[:4, :2]), net(x)))
    for channel, seen in ((0, torch.cat((x[:4, 0], x[:, 0])).double()), (3, x[:, 3].double())):
        torch.testing.assert_close(net.bn.running_mean[channel].double(), seen.mean(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(net.bn.running_var[channel].double(), seen.var(), rtol=1e-6, atol=1e-6)


def test_slices_that_are_no_prefix():
    """A module may run channels from the middle of a layer."""
    norm = nn.BatchNorm2d(6)

    def middle(x):
        part = slice(2, 5)
        return functional.batch_norm(x, norm.running_mean[part], norm.running_var[part], training=norm.training)

    x = torch.randn(4, 3, 5, 5) + 3
    recalibrate(norm, [x], "pooled", forward=middle)
    torch.testing.assert_close(norm.running_mean[2:5], x.mean((0, 2, 3)))
    assert (norm.running_mean[[0, 1, 5]] == 0).all() and (norm.running_var[[0, 1, 5]] == 1).all()


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_a_layer_that_averages_in_its_own_way(share):
    """A custom layer, whatever it makes of momentum and without a call of batch_norm, is recalibrated all the same."""

    class Own(nn.BatchNorm2d):
        def forward(self, input):
            mean, var = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False)
            if self.training:
                self.running_mean.mul_(share).add_(mean * (1 - share))
                self.running_var.mul_(share).add_(var * (1 - share))
            return (input - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()

    norm, x = Own(3), torch.randn(9, 3, 4, 4) * 5 - 2
    recalibrate(norm, x.split(4), "pooled", forward=lambda x: norm(input=x))
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-5, atol=1e-6)
    assert not norm._forward_hooks and not norm._forward_pre_hooks and norm.momentum == 0.1
