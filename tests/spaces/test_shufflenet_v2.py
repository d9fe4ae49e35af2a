"""The ShuffleNetV2 space is the paper's, its costs are exact, and its supernet's paths are its networks."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spos_fast import Architecture, InputError
from spos_fast.spaces import ShuffleNetV2

# The architecture that the authors released (arXiv 1904.00420; 323M, 3.5M parameters, top-1 74.4).
PUBLISHED = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)


def test_the_published_network_costs_what_was_published():
    """322.9M MACs and 3.53M parameters; 20 blocks of 4 choices."""
    space = ShuffleNetV2()
    cost = space.cost(space.architecture(PUBLISHED))
    assert cost.macs == 322_918_720 and cost.params == 3_529_312
    assert space.size == 4**20


def test_every_block_costs_what_the_reference_table_says(shared_data):
    """All 80 entries, stem and head."""
    table = json.loads((shared_data / "shufflenet" / "op_macs.json").read_text())
    macs = ShuffleNetV2().cost_tables["macs"]
    assert [layer.tolist() for layer in macs.layers] == table["blocks"]
    assert macs.fixed == table["stem"] + table["head_640x1024_plus_fc1000"]


@pytest.mark.parametrize(
    "sizes",
    [
        dict(input_size=224),
        dict(input_size=96, num_classes=7),
        dict(input_size=33, num_classes=10, stem_stride=1, stage_strides=(1, 2, 2, 1)),
        dict(input_size=8, in_channels=1, num_classes=10, stem_stride=1, stage_channels=(32, 64), stage_repeats=(2, 3),
             stage_strides=(1, 2), head_channels=48),
    ],
)  # fmt: skip
def test_cost_agrees_with_the_flop_counter_and_the_real_weights(sizes):
    """The closed form is the truth for random architectures of odd and even sizes."""
    space = ShuffleNetV2(**sizes)
    rng = np.random.default_rng(0)
    for _ in range(3):
        arch = space.sample(rng)
        network = space.build(arch).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.zeros(1, space.in_channels, space.input_size, space.input_size))
        weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
        assert counter.get_total_flops() == 2 * space.cost(arch).macs
        assert weights == space.cost(arch).params


def test_extracted_network_equals_the_path(tiny_space):
    """Inherited weights and statistics give the path's output, in training and in evaluation."""
    torch.manual_seed(0)
    net = tiny_space.supernet()
    x = torch.randn(4, 1, 8, 8)
    rng = np.random.default_rng(1)
    for _ in range(4):
        arch = tiny_space.sample(rng)
        net.train()
        net(x, arch)  # gives the path statistics of its own
        net.eval()
        plain = net.extract(arch)
        assert torch.equal(plain(x), net(x, arch))
        net.train()
        torch.manual_seed(3)
        expected = net(x, arch)
        torch.manual_seed(3)
        assert torch.equal(plain.train()(x), expected)


def test_extracted_network_shares_nothing(tiny_space):
    """Training an extracted network leaves the supernet alone."""
    net = tiny_space.supernet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain = net.extract(tiny_space.everywhere(3)).train()
    optimizer = torch.optim.SGD(plain.parameters(), 1.0)
    plain(torch.randn(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_even_channels_pass_through_a_stride_1_unit():
    """The channel shuffle is the published one: even channels to the identity, odd ones to the branch."""
    space = ShuffleNetV2(input_size=16)
    block = space.supernet().features[1][0].eval()
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(block(x)[:, :32], x[:, ::2])
    odd = x.clone()
    odd[:, ::2] = 0
    assert torch.equal(block(odd)[:, 32:], block(x)[:, 32:])


def test_channels_last_stays_channels_last():
    """Every block keeps the memory format, so that no convolution converts."""
    space = ShuffleNetV2(input_size=32)
    net = space.supernet().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for module in net.path(space.everywhere(0))[:-2]:
        x = module(x)
        assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("genes", "says"),
    [
        ([0] * 19, "19 genes"),
        ([0] * 21, "21 genes"),
        ([0] * 19 + [4], "gene 19 is 4"),
        ([-1] + [0] * 19, "gene 0 is -1"),
        (Architecture("resnet", (0,) * 20), "resnet"),
    ],
)
def test_architectures_of_other_spaces_are_refused(genes, says):
    """One line that names what came."""
    with pytest.raises(InputError, match=says):
        ShuffleNetV2().architecture(genes)


def test_the_network_refuses_a_foreign_architecture(tiny_space):
    """Nothing runs with genes out of range."""
    net = tiny_space.supernet()
    for arch in (Architecture("other", (0,) * 4), Architecture(tiny_space.name, (0,) * 5)):
        for call in (lambda a: net(torch.zeros(2, 1, 8, 8), a), net.extract, tiny_space.build, tiny_space.cost):
            with pytest.raises(InputError):
                call(arch)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (dict(input_size=0), "input_size"),
        (dict(stage_channels=(64, 63, 320, 640)), "stage_channels"),
        (dict(stage_channels=(64, 64, 320, 640)), "stage_channels"),
        (dict(stage_channels=(16, 160, 320, 640)), "stage_channels"),
        (dict(stage_repeats=(4, 4)), "stage_repeats"),
        (dict(stage_repeats=(4, 4, 0, 4)), "stage_repeats"),
        (dict(stage_strides=(2, 2, 3, 2)), "stage_strides"),
        (dict(stem_stride=4), "stem_stride"),
        (dict(dropout=1.0), "dropout"),
        (dict(init="zeros"), "init"),
        (dict(num_classes=2.5), "num_classes"),
    ],
)
def test_sizes_that_make_no_network_are_refused(sizes, says):
    """The message names the keyword."""
    with pytest.raises(InputError, match=says):
        ShuffleNetV2(**sizes)


def test_initial_weights():
    """As the published code draws them by default; PyTorch's own on request."""
    torch.manual_seed(0)
    net = ShuffleNetV2(input_size=32).build(ShuffleNetV2().everywhere(2))
    pointwise, depthwise = net.features[5].branch_main[0], net.features[5].branch_main[3]
    assert net.first_conv[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert pointwise.weight.std().item() == pytest.approx(1 / 80, rel=0.05)
    assert depthwise.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert net.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.conv_last[1].bias.unique().tolist() == [pytest.approx(1e-4)]
    net = ShuffleNetV2(input_size=32, init="pytorch").build(ShuffleNetV2().everywhere(2))
    # Uniform within 1 / sqrt(49).
    assert net.features[5].branch_main[3].weight.abs().max().item() == pytest.approx(1 / 7, rel=0.01)


def test_config_rebuilds_the_space(tiny_space):
    """A space can be stored as its keywords."""
    again = ShuffleNetV2(**tiny_space.config())
    assert again.config() == tiny_space.config() and again.size == tiny_space.size
