"""Small networks with every kind of quantized layer, and how far their activations are from the next code."""

import torch
from torch import nn

from spos_fast import recalibrate
from spos_fast.export.codes import act_grid
from spos_fast.nn import QuantAct, QuantBasicBlock, QuantConv2d, initialize_steps


class Mixed(nn.Module):
    """Residual blocks with and without a 1x1 shortcut, a strided depthwise and a 1x1 convolution with a bias."""

    def __init__(self, bits, weight_quantizer, act_quantizer):
        """``bits``: pairs of weights' and activations' for the two blocks, the depthwise and the 1x1 convolution."""
        super().__init__()
        names = dict(weight_quantizer=weight_quantizer, act_quantizer=act_quantizer)
        first, second, third, fourth = (dict(weight_bits=w, act_bits=a, **names) for w, a in bits)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.identity = QuantBasicBlock(8, 8, 6, **first)
        self.shortcut = QuantBasicBlock(8, 12, 12, 2, **second)
        self.depthwise = QuantConv2d(12, 12, 5, 2, 2, groups=12, bias=False, per_channel=True, **third)
        self.pointwise = QuantConv2d(12, 16, 1, **fourth)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(16)])
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        x = self.shortcut(self.identity(self.stem(x)))
        x = self.norms[0](self.depthwise(x)).relu()
        return self.classifier(self.norms[1](self.pointwise(x)).relu().mean((2, 3)))


class Together(nn.Module):
    """Several modules on one input: one graph instead of many."""

    def __init__(self, modules):
        super().__init__()
        self.all = nn.ModuleList(modules)

    def forward(self, x):
        return torch.stack([module(x) for module in self.all])


def settled(network, images):
    """Steps and statistics of the images; in evaluation mode."""
    initialize_steps(network, images)
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        recalibrate(network, [images])
    return network.eval()


@torch.no_grad()
def border_distances(network, images):
    """For every image the least distance of an activation from the border between two codes, in parts of all codes'
    range."""
    least = torch.full((len(images),), torch.inf)

    def look(act, arguments):
        grid = act_grid(act)
        x = arguments[0] if grid.offset is None else arguments[0] - grid.offset
        n = 2**grid.bits - 1
        low = -(2 ** (grid.bits - 1)) if grid.signed else 0
        v = (x / grid.step).clamp(low, low + n)
        distance = (v if grid.signed and grid.bits == 1 else v - v.floor() - 0.5).abs() / n
        least.copy_(torch.minimum(least, distance.flatten(1).amin(1)))

    hooks = [act.register_forward_pre_hook(look) for act in network.modules() if isinstance(act, QuantAct)]
    network(images)
    for hook in hooks:
        hook.remove()
    return least
