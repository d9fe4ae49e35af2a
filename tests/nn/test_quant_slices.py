"""A quantized convolution that uses some of its channels is the one that has no others."""

import pytest
import torch

from spos_fast.errors import InputError
from spos_fast.nn import QuantConv2d

BITS = dict(weight_bits=(1, 2, 4), act_bits=(2, 4))


@pytest.mark.parametrize("weight_quantizer", ["dorefa", "lsq"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize(("groups", "narrow", "made"), [(1, 5, 3), (1, 8, 3), (1, 5, 8), (8, 5, 5)])
@pytest.mark.parametrize("index", range(3))
def test_slice_is_the_narrow_layer(weight_quantizer, per_channel, groups, narrow, made, index):
    """Output and gradients: channels that are not used have no part in scales, and their gradient is zero."""
    torch.manual_seed(0)
    settings = dict(weight_quantizer=weight_quantizer, per_channel=per_channel, bias=True, padding=1)
    wide = QuantConv2d(8, 8, 3, groups=groups, **settings, **BITS)
    with torch.no_grad():
        wide.weight[made:] *= 9
        if groups == 1:
            wide.weight[:, narrow:] *= 9
    inside = min(groups, narrow)
    plain = QuantConv2d(narrow, made, 3, groups=inside, weight_bits=BITS["weight_bits"][index], act_bits=4, **settings)
    with torch.no_grad():
        plain.weight.copy_(wide.weight[:made, : plain.weight.shape[1]])
        plain.bias.copy_(wide.bias[:made])
        plain.act.step.copy_(wide.act.step[1:])
        if wide.weight_step is not None:
            step = wide.weight_step[index : index + 1]
            plain.weight_step.copy_(step[:, :made] if per_channel else step)
    x = torch.rand(2, narrow, 6, 6)
    out = wide(x, index, 1, out_channels=None if groups > 1 else made)
    expected = plain(x)
    assert torch.equal(out, expected)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(wide.weight.grad[:made, : plain.weight.shape[1]], plain.weight.grad)
    torch.testing.assert_close(wide.bias.grad[:made], plain.bias.grad)
    assert wide.weight.grad[made:].eq(0).all() and wide.bias.grad[made:].eq(0).all()
    if wide.weight_step is not None:
        found = wide.weight_step.grad[index]
        torch.testing.assert_close(found[:made] if per_channel else found, plain.weight_step.grad[0])


def test_grouped_convolutions_are_not_sliced():
    """One line, as of the plain sliced convolution."""
    with pytest.raises(InputError):
        QuantConv2d(8, 8, 3, groups=2, **BITS)(torch.rand(1, 8, 5, 5), out_channels=4)
