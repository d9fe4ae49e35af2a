"""The mixed-precision ResNet space: costs as published, choices as asked for, references beside the search."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from spos_fast import Constraint, UniformSampler
from spos_fast.errors import InputError
from spos_fast.spaces import QuantResNet
from spos_fast.spaces.bits import named_bits
from spos_fast.widening import WideningSampler

G = 2**30
UNIFORM = ((2, 2), (3, 3), (4, 4))


def tiny(**changes):
    """Two stages, two blocks, for 8 x 8 digits."""
    sizes = dict(
        input_size=8, num_classes=10, in_channels=1, stem="cifar", stage_channels=(8, 16), stage_repeats=(1, 1)
    )
    return QuantResNet(18, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("depth", "published"), [(18, (6.32, 14.21, 25.27)), (34, (13.21, 29.72, 52.83))], ids=["resnet18", "resnet34"]
)
def test_bitops_are_the_papers(depth, published):
    """The six BitOps of the paper's uniform networks, to their last digit."""
    space = QuantResNet(depth, uniform_bits=UNIFORM)
    costs = [space.cost(space.uniform(*bits)).bitops / G for bits in UNIFORM]
    assert [round(cost, 2) for cost in costs] == list(published)


def test_macs_and_params_of_resnet18():
    """The usual network has the MACs (1.814 G) and weights of ResNet-18, batch normalisation left out."""
    space = QuantResNet(18)
    cost = space.cost(space.uniform(4, 4))
    assert cost.macs == 1_814_073_344 and cost.params == 11_689_512 - 9_600


@pytest.mark.parametrize(
    "changes", [{}, {"stem": "imagenet", "input_size": 33}, {"stem_stride": 2, "ratios": (1, 2.5)}]
)
def test_closed_form_cost_is_what_the_network_has(changes):
    """MACs, weights and bit operations counted in the forward of the built network."""
    space, rng = tiny(**changes), np.random.default_rng(0)
    for _ in range(4):
        arch = space.sample(rng)
        net, macs, bitops = space.build(arch).eval(), [], []

        def count(layer, _, out, macs=macs, bitops=bitops):
            macs.append(layer.weight.numel() * (out.numel() // out.shape[1] if out.dim() == 4 else 1))
            if hasattr(layer, "act"):
                bitops.append(macs[-1] * layer.weight_bits[0] * layer.act.bits[0])

        layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            layer.register_forward_hook(count)
        net(torch.randn(1, 1, space.input_size, space.input_size))
        cost = space.cost(arch)
        weights = sum(
            parameter.numel() for layer in layers for parameter in (layer.weight, layer.bias) if parameter is not None
        )
        assert (cost.macs, cost.bitops, cost.params) == (sum(macs), sum(bitops), weights)


def test_sampling_under_bitops_is_uniform_over_what_is_searched():
    """Every architecture in the range is drawn, and none with a reference's bits."""
    space = tiny()
    everything = [space.architecture(genes) for genes in itertools.product(*(range(len(c)) for c in space.choices))]
    limit = sorted(space.cost(arch).bitops for arch in everything)[len(everything) // 10]
    inside = {arch for arch in everything if space.cost(arch).bitops <= limit}
    sampler = UniformSampler(space, Constraint(bitops=(None, limit)))
    assert sampler.count == len(inside) < len(everything) == space.size
    rng = np.random.default_rng(0)
    assert {sampler.sample(rng) for _ in range(30 * len(inside))} == inside


def test_uniform_networks_beside_the_search():
    """The paper's 3W3A is no choice of its search, and still an architecture with costs, and the baseline."""
    space = QuantResNet(18)
    arch = space.uniform(3, 3)
    assert space.baselines() == {"all_3W3A": arch} and arch.genes == (6, 1) * 8
    assert "3W3A" not in space.choices[0] and space.candidates(0)[6] == "3W3A"
    assert space.uniform(2, 2) == space.everywhere(1, 1)
    with pytest.raises(InputError, match=r"uniform: got \(8, 8\); the space knows 1W2A, .*, 4W4A, 3W3A"):
        space.uniform(8, 8)
    with pytest.raises(InputError, match="gene 0 is 7"):
        space.everywhere(7, 0)
    # Searched pairs keep the order that they are given in.
    wide = QuantResNet(18, bits=((8, 8), (3, 3)))
    assert wide.uniform(3, 3) == wide.everywhere(1, 1) and not wide.references["bits"]


def test_size_and_names():
    """18**8 and 18**16 networks; the configuration makes the same space again."""
    for depth, blocks in ((18, 8), (34, 16)):
        space = QuantResNet(depth)
        assert space.size == 18**blocks and space.name == f"quant_resnet{depth}"
    space = tiny(bits=((1, 2), (8, 4)), bn="per_bits", act_quantizer="lsq")
    again = QuantResNet(**space.config())
    assert again.config() == space.config() and again.choices == space.choices
    assert space.kinds == ("bits", "width") and space.choices[:2] == (("1W2A", "8W4A"), ("0.5x", "1x", "1.5x"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 50}, "depth: got 50; expected 18 or 34"),
        ({"bits": ()}, "bits: got none"),
        ({"bits": ((0, 2),)}, r"bits: got \(0, 2\)"),
        ({"bits": ((2, 9),)}, r"bits: got \(2, 9\)"),
        ({"bits": (4,)}, "bits: got 4"),
        ({"uniform_bits": ((2, 2), (2, 2))}, "uniform_bits: 2W2A is there twice"),
        ({"ratios": (1, 0.5)}, "ratios: got 0.5 after 1"),
        ({"ratios": ()}, "ratios: got none"),
        ({"ratios": (1, 1.01)}, "ratios: 1, 1.01 do not give different"),
        ({"ratios": (0.001,)}, "ratios: 0.001 do not give different"),
        ({"stem": "both"}, "stem: got 'both'; expected imagenet or cifar"),
        ({"stem_stride": 3}, "stem_stride: got 3"),
        ({"stage_channels": (64, 128)}, "stage_repeats: got 4 values for 2"),
        ({"stage_channels": (64, 128, 256, 0)}, "stage_channels: got 0"),
        ({"input_size": 0}, "input_size: got 0"),
        ({"bn": "none"}, "bn: got 'none'; expected shared or per_bits"),
        ({"act_quantizer": "dorefa"}, "act_quantizer: got 'dorefa'"),
    ],
)
def test_wrong_sizes_are_refused(changes, says):
    """One line with the argument, the value and what would be right."""
    with pytest.raises(InputError, match=says):
        QuantResNet(**changes)


def test_names_of_bits():
    """Pairs by name, as the settings have them."""
    assert named_bits("bits", ["1W2A", "8w8a"]) == ((1, 2), (8, 8))
    with pytest.raises(
        InputError, match="uniform_bits: got '3'; expected bits of weights and activations such as 3W4A"
    ):
        named_bits("uniform_bits", ["3"])


def test_widening_schedule_runs_over_its_widths():
    """The schedule of widths works beside bits: the widest alone at first, all pairs of bit-widths from the start."""
    sampler = WideningSampler(UniformSampler(tiny()), steps=100, start=0.5, end=0.8)
    early = [sampler.at(0, step).genes for step in range(50)]
    assert {gene for genes in early for gene in genes[1::2]} == {2}
    assert {gene for genes in early for gene in genes[::2]} == set(range(6))
    assert {gene for step in range(80, 100) for gene in sampler.at(0, step).genes[1::2]} == {0, 1, 2}
