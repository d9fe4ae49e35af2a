"""Stand-ins for the supernets of other projects: how each of them runs batch normalisation, in a few lines.

Written after their public code: slimmable_networks (switchable and universally slimmable), once-for-all, mmrazor.
"""

import torch
from torch import nn
from torch.nn import functional

WIDTHS = (0.5, 1.0)


class SwitchableNorm(nn.Module):
    """slimmable_networks: a list of layers, one a width; ``width_mult`` says which runs."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(int(channels * width)) for width in WIDTHS)
        self.width_mult = 1.0

    def forward(self, x):
        return self.bn[WIDTHS.index(self.width_mult)](x)


class UniversalNorm(nn.BatchNorm2d):
    """slimmable_networks: a layer without statistics, which runs on the buffers of layers that are never called."""

    def __init__(self, channels):
        super().__init__(channels, track_running_stats=False)
        self.bn = nn.ModuleList(nn.BatchNorm2d(int(channels * width), affine=False) for width in WIDTHS)
        self.width_mult = 1.0

    def forward(self, x):
        kept = self.bn[WIDTHS.index(self.width_mult)]
        used = x.shape[1]
        return functional.batch_norm(
            x, kept.running_mean[:used], kept.running_var[:used], self.weight[:used], self.bias[:used],
            self.training, self.momentum, self.eps,
        )  # fmt: skip


class PrefixNorm(nn.Module):
    """once-for-all: the first channels of a layer, by a function on views of its buffers."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        bn, used = self.bn, x.shape[1]
        if used == bn.num_features:
            return bn(x)
        share = 0.0
        if bn.training and bn.track_running_stats:
            bn.num_batches_tracked += 1
            share = 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
        return functional.batch_norm(
            x, bn.running_mean[:used], bn.running_var[:used], bn.weight[:used], bn.bias[:used],
            bn.training or not bn.track_running_stats, share, bn.eps,
        )  # fmt: skip


class MaskedNorm(nn.BatchNorm2d):
    """mmrazor: the channels of a mask, any of them, by copies that are written back; the counter is replaced."""

    def __init__(self, channels):
        super().__init__(channels)
        self.mask = torch.ones(channels, dtype=torch.bool)

    def forward(self, x):
        mask, share = self.mask, self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked = self.num_batches_tracked + 1
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean, var = self.running_mean[mask], self.running_var[mask]
        out = functional.batch_norm(x, mean, var, self.weight[mask], self.bias[mask], self.training, share, self.eps)
        if self.training and self.track_running_stats:
            self.running_mean.masked_scatter_(mask, mean)
            self.running_var.masked_scatter_(mask, var)
        return out


class Slim(nn.Module):
    """Two convolutions of which ``used`` channels run, normalised in one of the styles."""

    def __init__(self, norm, channels=8):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, channels, 3, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, bias=False), norm(channels)
        self.used = torch.arange(channels)

    def forward(self, x):
        used = self.used
        x = self.norm1(functional.conv2d(x, self.conv1.weight[used])).relu()
        return self.norm2(functional.conv2d(x, self.conv2.weight[used][:, used])).relu()


def set_width(model, width):
    """As the slimmable projects do: ``model.apply(lambda m: setattr(m, "width_mult", width))``."""
    model.apply(lambda module: setattr(module, "width_mult", width))
    model.used = torch.arange(int(len(model.used) * width))


def set_mask(model, mask):
    """As mmrazor's mutables do: every layer gets the mask of its channels."""
    model.used = mask.nonzero().flatten()
    for module in model.modules():
        if isinstance(module, MaskedNorm):
            module.mask = mask
