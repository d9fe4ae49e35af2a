"""A unit that runs with fewer mid channels is the unit that those channels would make, and touches no others."""

import pytest
import torch

from spos_fast import InputError
from spos_fast.nn import ShuffleUnit, XceptionUnit

MID = 7
UNITS = {
    "shuffle": lambda mid, affine: ShuffleUnit(12, 12, mid, 5, 1, affine),
    "shuffle, stride 2": lambda mid, affine: ShuffleUnit(6, 16, mid, 3, 2, affine),
    "xception": lambda mid, affine: XceptionUnit(12, 12, mid, 1, affine),
    "xception, stride 2": lambda mid, affine: XceptionUnit(6, 16, mid, 2, affine),
}
FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


def _prefix(value):
    return tuple(map(slice, value.shape))


def _pair(kind, affine, memory_format=torch.channels_last):
    """A wide unit with random weights, the narrow one that its first channels make, and images."""
    torch.manual_seed(0)
    wide, narrow = UNITS[kind](12, affine), UNITS[kind](MID, affine)
    with torch.no_grad():
        for name, value in (*wide.named_parameters(), *wide.named_buffers()):
            if value.dtype.is_floating_point:
                value.uniform_(0.5, 1.5) if "running" in name else value.normal_()
        stored = wide.state_dict()
        narrow.load_state_dict({name: stored[name][_prefix(value)] for name, value in narrow.state_dict().items()})
    x = torch.randn(4, 12 if wide.splits else 6, 9, 9).contiguous(memory_format=memory_format)
    return wide.to(memory_format=memory_format), narrow.to(memory_format=memory_format), x


def _outside(wide, narrow):
    """(name, tensor, mask of what does not belong to the slice) of every parameter and buffer with a shape."""
    slices = {name: _prefix(value) for name, value in narrow.state_dict().items()}
    for name, value in (*wide.named_parameters(), *wide.named_buffers()):
        if value.dim():
            mask = torch.ones(value.shape, dtype=torch.bool)
            mask[slices[name]] = False
            yield name, value, mask


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", UNITS)
def test_a_slice_is_the_narrow_unit(kind, affine, memory_format):
    """Output, gradients and running statistics, with batch statistics and with running ones; NaN outside of the slice
    is never seen, its gradient is exactly zero and its statistics do not move.
    """
    wide, narrow, x = _pair(kind, affine, FORMATS[memory_format])
    with torch.no_grad():
        for _, value, mask in _outside(wide, narrow):
            value[mask] = float("nan")
    for training in (True, False):
        wide.train(training), narrow.train(training)
        torch.testing.assert_close(wide(x, MID), narrow(x))
    probe = torch.randn_like(narrow(x))  # in evaluation, where statistics rest
    wide.train(), narrow.train()
    for unit, call in ((wide, lambda: wide(x, MID)), (narrow, lambda: narrow(x))):
        unit.zero_grad()
        (call() * probe).sum().backward()
    expected = dict(narrow.named_parameters()) | dict(narrow.named_buffers())
    for name, value, mask in _outside(wide, narrow):
        own = _prefix(expected[name])
        if value.requires_grad:
            torch.testing.assert_close(value.grad[own], expected[name].grad, atol=1e-4, rtol=1e-4)
            assert not value.grad[mask].any()
        else:
            torch.testing.assert_close(value[own], expected[name])
            assert value[mask].isnan().all()


@pytest.mark.parametrize("kind", UNITS)
def test_without_scale_and_shift_a_slice_is_a_mask(kind):
    """Where normalisation has no shift, zeroing the other channels of a wide unit is the same as leaving them out:
    CanyonWind's way of running a width.
    """
    wide, _, x = _pair(kind, affine=False)
    wide.train()

    def mask(_, __, output):
        return output * (torch.arange(12) < MID).to(output).view(1, -1, 1, 1)

    convolutions = [m for m in wide.branch_main if isinstance(m, torch.nn.Conv2d)]
    hooks = [m.register_forward_hook(mask) for m in convolutions[:-1] if m.out_channels == 12]
    masked = wide(x)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(wide(x, MID), masked)


@pytest.mark.parametrize("mid", [0, 13])
def test_widths_that_are_not_there_are_refused(mid):
    """One line with the number and the limit."""
    with pytest.raises(InputError, match=f"mid: got {mid}; expected 1 to 12"):
        UNITS["shuffle"](12, True)(torch.zeros(2, 12, 4, 4), mid)


def test_all_mid_channels_are_the_whole_unit():
    """The widest slice takes the way of a unit without slices, bit for bit."""
    wide, _, x = _pair("xception", affine=True)
    assert torch.equal(wide(x, 12), wide(x))
