"""Quantized residual blocks scored on integers: equal to the blocks run as modules, up to a rounding of the sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spos_fast import Evaluator
from spos_fast.data import Images
from spos_fast.data.images import Normalization
from spos_fast.errors import InputError
from spos_fast.nn import QuantBasicBlock
from spos_fast.nn.parts import Part, Statistics
from spos_fast.nn.quant_parts import QuantPart
from spos_fast.spaces import QuantResNet

BITS = ((1, 2, 4), (2, 4))


def block(stride: int = 1, **quantizers: str) -> QuantBasicBlock:
    """A block with all kinds of bits; 12 of its 18 mid channels will run."""
    torch.manual_seed(0)
    made = QuantBasicBlock(16, 16, 18, stride, weight_bits=BITS[0], act_bits=BITS[1], affine=False, **quantizers)
    return made.to(memory_format=torch.channels_last).eval()


def images(count: int = 6) -> Tensor:
    x = torch.rand(count, 16, 9, 9, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def assert_nearly_all_close(one: Tensor, other: Tensor) -> None:
    """A code on a border may fall to the other side, which moves few values."""
    far = (one - other).abs() > 1e-4 * (1 + other.abs())
    assert far.double().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("quantizers", [{}, dict(weight_quantizer="lsq", act_quantizer="lsq")], ids=["paper", "lsq"])
@pytest.mark.parametrize("bits", [(0, 0), (1, 1), (2, 1)])
def test_equals_the_block_run_as_modules(stride: int, quantizers: dict[str, str], bits: tuple[int, int]) -> None:
    """Outputs and statistics in calibration, and outputs on given statistics."""
    module, x = block(stride, **quantizers), images()
    setting = (12, *bits)
    fast, plain = QuantPart(module, setting), Part(module, setting)
    ((out, moments),), ((expected, plain_moments),) = fast.calibrate([x]), plain.calibrate([x])
    assert out is not None and expected is not None
    assert_nearly_all_close(out, expected)
    means, variances = (torch.cat([v.reshape(-1) for v in each]) for each in (moments.mean, moments.var))
    torch.testing.assert_close(means[:12], plain_moments.mean[0][:12], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variances[:12], plain_moments.var[0][:12], rtol=1e-4, atol=1e-5)
    assert [len(mean) for mean in moments.mean] == fast.widths
    scale = (variances + 1e-5).rsqrt()
    given = Statistics(means.double(), variances.double(), scale, -means * scale)
    # The modules' statistics are of all stored channels.
    wide = [torch.cat((v[:12], torch.ones(6), v[12:])) for v in (means, variances)]
    full = Statistics(wide[0].double(), wide[1].double(), None, None)
    (got,), modules = fast.infer([x], [given]), plain.infer([x], [full])
    assert_nearly_all_close(got, modules[0])


def test_changed_blocks_run_as_they_are() -> None:
    """A hook, or layers of another kind, would be passed over on integers."""
    module = block()
    assert QuantPart.takes(module)
    module.bn2.register_forward_hook(lambda *_: None)
    assert not QuantPart.takes(module)
    signed = block(act_quantizer="lsq+")
    assert not QuantPart.takes(signed)


def test_one_value_a_channel_is_refused() -> None:
    """It has no variance."""
    x = images(1)[:, :, :1, :1].contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), pytest.raises(InputError, match="one value a channel"):
        QuantPart(block(), (12, 0, 0)).calibrate([x])


def test_candidates_score_as_alone() -> None:
    """Bits, widths and the tree: any company and any order give the same scores, bit for bit."""
    space = QuantResNet(18, input_size=12, num_classes=4, stem="cifar", stage_channels=(8, 16), stage_repeats=(2, 1))
    torch.manual_seed(0)
    net = space.supernet()
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (48, 3, 12, 12), dtype=torch.uint8, generator=generator)
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    data = Images(pixels, torch.randint(0, 4, (48,), generator=generator), normalization)
    evaluate = Evaluator(net, data, data, calibration_batch=16, batch_size=20)
    rng = np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(6)]
    together = evaluate(archs)
    assert together == [evaluate([arch])[0] for arch in archs]
    assert evaluate(archs[::-1]) == together[::-1] and not any(score.failed for score in together)
