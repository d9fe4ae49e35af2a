"""Bits of ShuffleNetV2's blocks, searched together with blocks and channels."""

import numpy as np
import pytest
import torch
from torch import nn

from spos_fast import Constraint, Evaluator, TrainConfig, UniformSampler, evolve, recalibrate
from spos_fast.data import Images, load
from spos_fast.errors import InputError
from spos_fast.evaluation import evaluate
from spos_fast.nn import QuantConv2d
from spos_fast.spaces import ShuffleNetV2
from spos_fast.training import train

BITS = ((1, 2), (2, 2), (4, 4))


def tiny(**changes):
    """Two stages, three layers, for 8 x 8 digits."""
    sizes = dict(input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1, head_channels=32)
    sizes |= dict(stage_channels=(16, 32), stage_repeats=(1, 2), stage_strides=(1, 2), init="pytorch", bits=BITS)
    return ShuffleNetV2(**{**sizes, **changes})


JOINT = {"channels": (0.5, 1.0, 1.5)}


def test_kinds_names_and_baselines():
    """Every layer gets a gene of bits behind those of block and width; a space without bits is what it was."""
    plain = tiny(bits=None)
    assert "bitops" not in plain.cost_tables and "bits" not in plain.config() and plain.name == "shufflenet_v2"
    kinds = {
        "shufflenet_v2+bits": ({}, ("block", "bits"), "all_shuffle_k3_3W3A"),
        "shufflenet_v2+widths+bits": (JOINT, ("block", "width", "bits"), "all_shuffle_k3_3W3A"),
        "shufflenet_v2_widths+bits": ({**JOINT, "blocks": (0,)}, ("width", "bits"), "all_1x_3W3A"),
        "shufflenet_v2_bits": ({"blocks": (0,)}, ("bits",), "all_3W3A"),
    }
    for name, (changes, expected, baseline) in kinds.items():
        space = tiny(**changes)
        assert (space.name, space.kinds) == (name, expected) and next(iter(space.baselines())) == baseline
        assert len(space.baselines()) == (4 if "block" in expected else 1)
        assert space.choices[len(expected) - 1] == ("1W2A", "2W2A", "4W4A")
        assert ShuffleNetV2(**space.config()).choices == space.choices


@pytest.mark.parametrize("changes", [JOINT, {}, {"blocks": (3,)}], ids=["joint", "blocks", "bits only"])
def test_cost_is_what_the_network_has(changes):
    """MACs and bit operations counted in the forward of the built network; stem, head and classifier are in float."""
    space, rng = tiny(**changes), np.random.default_rng(0)
    for arch in [*space.baselines().values(), *(space.sample(rng) for _ in range(4))]:
        net, macs, bitops = space.build(arch).eval(), [], []

        def count(layer, _, out, macs=macs, bitops=bitops):
            macs.append(layer.weight.numel() * (out.numel() // out.shape[1] if out.dim() == 4 else 1))
            if isinstance(layer, QuantConv2d):
                bitops.append(macs[-1] * layer.weight_bits[0] * layer.act.bits[0])

        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(count)
        net(torch.randn(1, 1, 8, 8))
        cost = space.cost(arch)
        assert (cost.macs, cost.bitops) == (sum(macs), sum(bitops)) and len(macs) > len(bitops) > 0


@pytest.mark.parametrize("quantizers", [("lsq", "lsq"), ("dorefa", "lsq+")], ids="-".join)
def test_extracted_network_is_the_path(quantizers):
    """Every block at every width, at all pairs of bit-widths, gives what its plain network gives. In float64: sums in
    another order would now and then round an activation to the neighbouring code.
    """
    torch.manual_seed(0)
    space = tiny(**JOINT, weight_quantizer=quantizers[0], act_quantizer=quantizers[1])
    net = space.supernet().double().eval()
    with torch.no_grad():
        for name, vector in net.named_parameters():
            if name.endswith(("step", "offset")):
                vector.mul_(torch.empty_like(vector).uniform_(0.7, 1.4)).add_(0.01)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for block in range(4):
        for width in range(3):
            arch = space.everywhere(block, width, (block + width) % 4)
            plain = net.extract(arch)
            assert all(len(p) == 1 for name, p in plain.named_parameters() if name.endswith(("step", "offset")))
            torch.testing.assert_close(plain(x), net(x, arch), rtol=1e-9, atol=1e-9)


def test_blocks_channels_and_bits_together():
    """Training by uniform paths, evolution under a limit of bit operations with the Evaluator, retraining: all genes
    vary, every candidate meets the limit, and scores are those of the recalibrated plain networks.
    """
    torch.manual_seed(0)
    digits, space = load("digits"), tiny(**JOINT)
    net = space.supernet()
    rows = []
    config = TrainConfig(steps=30, batch_size=32, lr=0.1, log_every=15)
    train(net, digits, config, sampler=UniformSampler(space), seed=1, on_metrics=rows.append)
    assert rows[-1].loss < rows[0].loss
    images = digits.calibration(64, seed=0)
    validation = Images(images.pixels, digits.validation().labels[:64], images.normalization)
    evaluator = Evaluator(net, images, validation, calibration_batch=32, batch_size=64)
    table = space.searched_costs("bitops")
    limit = (table.smallest + table.largest) // 2
    found = evolve(
        space, evaluator, population=6, generations=2, top_k=3, crossover=3, mutation=3,
        constraint=Constraint(bitops=(None, limit)), seed=0,
    )  # fmt: skip
    genes = np.array([candidate.architecture.genes for candidate in found.candidates])
    assert len(genes) == 18 and (np.ptp(genes, axis=0) > 0).all() and genes[:, 2::3].max() == 2
    assert all(space.cost(candidate.architecture).bitops <= limit for candidate in found.candidates)
    best = found.best
    plain = net.extract(best.architecture)
    recalibrate(plain, (images.normalization(part) for part in images.pixels.split(32)), "cumulative")
    assert evaluate(plain, validation.batches(64)).loss == pytest.approx(best.score.loss, rel=1e-3)
    alone = []
    train(space.build(best.architecture), digits, config, on_metrics=alone.append)
    assert alone[-1].loss < alone[0].loss


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": ((0, 4),)}, r"bits: got \(0, 4\)"),
        ({"act_quantizer": "pact"}, "act_quantizer: got 'pact'; expected lsq or lsq+"),
        ({"weight_quantizer": "sign"}, "weight_quantizer: got 'sign'; expected dorefa or lsq"),
        ({"bits": None, "blocks": (0,)}, "give channels or bits too"),
    ],
)
def test_wrong_settings_are_refused(changes, says):
    """One line with the argument, the value and what would be right."""
    with pytest.raises(InputError, match=says):
        tiny(**changes)


def test_bit_operations_of_a_space_without_bits_are_refused():
    """As a constraint and in the message what would have them."""
    with pytest.raises(InputError, match="bitops: the space has none; choose a quantized one, such as quant_resnet18"):
        UniformSampler(tiny(bits=None), Constraint(bitops=(None, 1e9)))
