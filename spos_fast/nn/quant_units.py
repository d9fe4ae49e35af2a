"""The choice blocks of the ShuffleNetV2 space on quantized convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spos_fast.nn.quant import Bits, Index, QuantConv2d
from spos_fast.nn.sliced import SlicedBatchNorm2d
from spos_fast.nn.units import Unit


class QuantUnit(nn.Module):
    """A :class:`ShuffleUnit` or :class:`XceptionUnit` whose convolutions are quantized, under the same names.

    The block's input is an image behind a ReLU. So is that of every convolution but those behind a depthwise one, whose
    normalised output is negative too: their codes are signed. Weights of a depthwise convolution have a scale for each
    channel, as every channel is a filter of its own.

    Args:
        unit: the block in full precision; its layers are taken over, with the same parameters.
        weight_bits: 1 to 8, or a list of all that can be chosen at a call.
        act_bits: likewise, of the inputs of all convolutions.
        weight_quantizer: dorefa or lsq.
        act_quantizer: lsq or lsq+; PACT has no signed codes.

    Raises:
        InputError: bits out of range, or a quantizer that is not there.
    """

    def __init__(
        self,
        unit: Unit,
        *,
        weight_bits: Bits,
        act_bits: Bits,
        weight_quantizer: str = "lsq",
        act_quantizer: str = "lsq",
    ) -> None:
        super().__init__()
        self.mid_channels = unit.mid_channels

        def quantized(branch: nn.Sequential) -> nn.Sequential:
            layers: list[nn.Module] = []
            for layer in branch:
                if isinstance(layer, nn.Conv2d):
                    layer = QuantConv2d.from_float(
                        layer,
                        weight_bits=weight_bits,
                        act_bits=act_bits,
                        weight_quantizer=weight_quantizer,
                        act_quantizer=act_quantizer,
                        per_channel=layer.groups > 1,
                        signed_act=bool(layers) and isinstance(layers[-1], nn.BatchNorm2d),
                    )
                elif isinstance(layer, nn.BatchNorm2d):
                    layer = SlicedBatchNorm2d(layer.num_features, affine=layer.affine)
                layers.append(layer)
            return nn.Sequential(*layers)

        self.branch_main = quantized(unit.branch_main)
        self.branch_proj = None if unit.branch_proj is None else quantized(unit.branch_proj)

    def forward(self, x: Tensor, setting: tuple[int, Index, Index] | None = None) -> Tensor:
        """Shapes as :meth:`ShuffleUnit.forward` has them.

        Args:
            x: images, behind a ReLU.
            setting: the number of mid channels that are used, and the indices of the weights' and the activations'
                bit-widths; None for all channels and index 0.
        """
        mid, *bits = (self.mid_channels, 0, 0) if setting is None else setting
        passed, narrow = (x[:, ::2], x[:, 1::2]) if self.branch_proj is None else (x, x)
        if self.branch_proj is not None:
            passed = _run(self.branch_proj, passed, None, *bits)
        return torch.cat((passed, _run(self.branch_main, narrow, mid, *bits)), 1)


def _run(branch: nn.Sequential, x: Tensor, mid: int | None, weight_index: Index, act_index: Index) -> Tensor:
    """A branch with some of its mid channels; None for all."""
    last = max(position for position, layer in enumerate(branch) if isinstance(layer, QuantConv2d))
    for position, layer in enumerate(branch):
        if isinstance(layer, QuantConv2d):
            # A depthwise convolution makes as many channels as come in, the last one as many as it has.
            made = None if layer.groups > 1 or position == last else mid
            x = layer(x, weight_index, act_index, out_channels=made)
        else:
            x = layer(x)
    return x
