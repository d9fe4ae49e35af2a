"""Channel search, alone and with block search: one rule for widths, exact costs, paths that are their networks."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from spos_fast import Constraint, Evaluator, InputError, UniformSampler, data, evolve, recalibrate, sampling
from spos_fast.scores import Score
from spos_fast.spaces import ShuffleNetV2
from spos_fast.spaces.base import scaled_channels

PUBLISHED_RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
# The architecture that the authors released for blocks and widths together (328M, 3.4M parameters, top-1 74.9).
PUBLISHED_BLOCKS = (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)
PUBLISHED_WIDTHS = (6, 5, 3, 5, 2, 6, 3, 4, 2, 5, 7, 5, 4, 6, 7, 4, 4, 5, 4, 3)
SIZES = dict(
    input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
    stage_strides=(1, 2), head_channels=32,
)  # fmt: skip
BLOCKS = (3, 0, 1, 3)


@pytest.fixture(scope="module", params=["joint", "widths"])
def space(request):
    """Four layers, three widths; blocks are searched too, or fixed."""
    fixed = BLOCKS if request.param == "widths" else None
    return ShuffleNetV2(**SIZES, stage_repeats=(2, 2), channels=(0.3, 1.0, 1.6), blocks=fixed)


def _everything(space):
    return [space.architecture(genes) for genes in itertools.product(*(range(len(c)) for c in space.choices))]


def test_the_published_network_costs_what_was_published():
    """327.9M MACs and 3.41M parameters, searched jointly or as widths of its blocks."""
    joint = ShuffleNetV2(channels=PUBLISHED_RATIOS)
    genes = itertools.chain(*zip(PUBLISHED_BLOCKS, PUBLISHED_WIDTHS, strict=True))
    cost = joint.cost(joint.architecture(list(genes)))
    assert cost.macs == 327_857_920 and cost.params == 3_407_035
    assert joint.size == 32**20 and joint.kinds == ("block", "width")
    widths = ShuffleNetV2(channels=PUBLISHED_RATIOS, blocks=PUBLISHED_BLOCKS)
    assert widths.cost(widths.architecture(PUBLISHED_WIDTHS)) == cost
    assert widths.size == 8**20 and widths.kinds == ("width",)


def test_widths_are_rounded_down_in_exact_arithmetic():
    """The published list for 32 channels, whether the ratios are written out or multiplied up; and products that fall
    short of a whole number in floating point.
    """
    for ratios in (PUBLISHED_RATIOS, [0.2 * k for k in range(1, 9)], np.arange(1, 9) / 5, np.arange(0.2, 1.7, 0.2)):
        assert [scaled_channels(32, ratio) for ratio in ratios] == [6, 12, 19, 25, 32, 38, 44, 51]
    assert int(100 * 1.1) == 110 and int(100 * 1.15) == 114  # what int() alone would do
    assert scaled_channels(100, 1.15) == 115 and scaled_channels(10, 0.1 + 0.7) == 8
    assert all(
        scaled_channels(base, 0.2 * k) == base * k // 5 for base in (24, 48, 96, 80, 160, 320) for k in range(1, 11)
    )


def test_without_channels_the_space_is_that_of_block_search():
    """Architectures, costs and parameter names of run folders and published checkpoints stay what they are."""
    plain, ratio_1 = ShuffleNetV2(**SIZES, stage_repeats=(2, 2)), ShuffleNetV2(
        **SIZES, stage_repeats=(2, 2), channels=[1.0]
    )  # fmt: skip
    assert plain.kinds == ("block",) and len(plain.choices) == 4
    names = {name: value.shape for name, value in plain.supernet().state_dict().items()}
    assert names == {name: value.shape for name, value in ratio_1.supernet().state_dict().items()}
    for choice in range(4):
        assert plain.cost(plain.everywhere(choice)) == ratio_1.cost(ratio_1.everywhere(choice, 0))


def test_cost_agrees_with_the_flop_counter_and_the_real_weights(space):
    """The closed form is the truth for random architectures."""
    rng = np.random.default_rng(0)
    for arch in [space.sample(rng) for _ in range(6)]:
        network = space.build(arch).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.zeros(1, 1, 8, 8))
        assert counter.get_total_flops() == 2 * space.cost(arch).macs
        assert sum(p.numel() for p in network.parameters() if p.dim() > 1) == space.cost(arch).params


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_path_is_the_extracted_network(space, memory_format):
    """In training and in evaluation, statistics included; and nothing outside of its slices is read."""
    torch.manual_seed(0)
    net = space.supernet().to(memory_format=memory_format)
    x = torch.randn(4, 1, 8, 8).contiguous(memory_format=memory_format)
    rng = np.random.default_rng(1)
    for arch in [space.sample(rng) for _ in range(4)]:
        net.train()
        net(x, arch)  # gives the path statistics of its own
        plain = net.extract(arch)
        for training in (False, True):
            torch.manual_seed(3)
            expected = net.train(training)(x, arch)
            torch.manual_seed(3)
            torch.testing.assert_close(plain.train(training)(x), expected)
        # The batch moved both networks' statistics alike.
        for name, value in net.extract(arch).state_dict().items():
            if "running" in name:
                torch.testing.assert_close(plain.state_dict()[name], value)


def test_scores_do_not_depend_on_what_was_scored_before(space):
    """Widths share their statistics' memory; each architecture's are its own all the same, bit for bit."""
    digits = data.load("digits")
    torch.manual_seed(0)
    net = space.supernet()
    evaluator = Evaluator(net, digits.calibration(128, seed=0), digits.validation(), calibration_batch=64)
    rng = np.random.default_rng(0)
    archs = list({space.sample(rng) for _ in range(5)})
    first = evaluator(archs)
    assert first == list(reversed(evaluator(list(reversed(archs)))))
    assert evaluator([archs[2]]) == [first[2]]
    assert len({score.loss for score in first}) == len(archs)


@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
def test_a_recalibrated_path_is_the_recalibrated_network(space, mode):
    """Statistics of the slices, in every mode."""
    digits = data.load("digits")
    torch.manual_seed(0)
    net = space.supernet()
    calibration, validation = digits.calibration(128, seed=0), digits.validation()
    arch = space.sample(np.random.default_rng(5))
    (score,) = Evaluator(net, calibration, validation, mode=mode, calibration_batch=64, batch_size=50)([arch])
    plain = net.extract(arch)
    batches = list(calibration.batches(64))
    recalibrate(plain, batches, mode)
    recalibrate(net, batches, mode, modules=net.path(arch), forward=lambda images: net(images, arch))
    for name, value in net.extract(arch).state_dict().items():
        # Convolutions of a slice and of a network add up in another order.
        torch.testing.assert_close(plain.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    plain.eval()
    with torch.no_grad():
        logits = torch.cat([plain(x) for x, _ in validation.batches(50)])
    assert score.accuracy == (logits.argmax(1) == validation.labels).double().mean().item()


DRAWS = 10_000


@pytest.mark.parametrize("pairs", [sampling._MAX_PAIRS, 300])
@pytest.mark.parametrize("names", [("macs",), ("macs", "params")])
def test_constrained_sampling_is_uniform(monkeypatch, names, pairs):
    """Chi-square over what a filter of the whole space keeps, counted exactly and in coarser units."""
    monkeypatch.setattr(sampling, "_MAX_PAIRS", pairs)
    space = ShuffleNetV2(**SIZES, stage_repeats=(1, 2), channels=(0.3, 1.0, 1.6))
    everything = _everything(space)
    ranges = {}
    for name in names:
        values = sorted(getattr(space.cost(arch), name) for arch in everything)
        ranges[name] = (float(values[int(0.3 * len(values))]), float(values[int(0.6 * len(values))]))
    constraint = Constraint(**ranges)
    allowed = [arch for arch in everything if constraint.allows(space.cost(arch))]
    assert 100 < len(allowed) < 700
    sampler = UniformSampler(space, constraint)
    assert (sampler._lattice.unit == 1) == (pairs > 300)
    assert sampler.count == (len(allowed) if names == ("macs",) and pairs > 300 else None)
    rng = np.random.default_rng(0)
    drawn = Counter(sampler.sample(rng) for _ in range(DRAWS))
    assert set(drawn) <= set(allowed)
    assert stats.chisquare([drawn[arch] for arch in allowed]).pvalue > 1e-3


def test_the_papers_joint_space_is_sampled_within_a_narrow_range():
    """32**20 networks have too many sums to count one by one; coarse units cost little rejection."""
    space = ShuffleNetV2(channels=PUBLISHED_RATIOS)
    for constraint in (Constraint(macs=(329.9e6, 330e6)), Constraint(macs=(None, 330e6), params=(None, 3.2e6))):
        sampler = UniformSampler(space, constraint)
        rng = np.random.default_rng(0)
        assert all(constraint.allows(space.cost(sampler.sample(rng))) for _ in range(20))
    with pytest.raises(InputError, match="macs: no architecture has at most 1,000,000; the space has"):
        UniformSampler(space, Constraint(macs=(None, 1e6)))


@pytest.mark.parametrize(("ratios", "blocks", "mean"), [(8, (0,), 271), (8, None, 302), (10, None, 364)])
def test_mean_costs_are_those_of_the_reference(ratios, blocks, mean):
    """An independent calculation of the mean MACs, in millions, for ratios up to 1.6 and up to 2."""
    macs = ShuffleNetV2(channels=[k / 5 for k in range(1, ratios + 1)], blocks=blocks).cost_tables["macs"]
    assert round((macs.fixed + sum(layer.mean() for layer in macs.layers)) / 1e6) == mean


def test_evolution_searches_all_genes(space):
    """It finds the best network of a made-up score, within the constraint."""
    target = space.sample(np.random.default_rng(3))
    constraint = Constraint(macs=(None, space.cost(target).macs))

    def score(archs):
        return [Score(float(np.mean(np.equal(arch.genes, target.genes))), 0.0, 1) for arch in archs]

    result = evolve(space, score, population=20, generations=15, top_k=5, crossover=10, mutation=10,
                    mutation_probability=0.2, constraint=constraint)  # fmt: skip
    assert result.best.architecture == target
    assert all(constraint.allows(space.cost(candidate.architecture)) for candidate in result.candidates)


def test_baselines_have_the_usual_width(space):
    """What a search is compared with: each block everywhere at ratio 1, or ratio 1 on the fixed blocks."""
    baselines = {label: arch.genes for label, arch in space.baselines().items()}
    if "block" in space.kinds:
        assert baselines["all_xception"] == (3, 1) * 4 and len(baselines) == 4
    else:
        assert baselines == {"all_1x": (1,) * 4}


def test_config_rebuilds_the_space(space):
    """A space can be stored as its keywords."""
    again = ShuffleNetV2(**space.config())
    assert again.config() == space.config() and again.choices == space.choices


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(channels=(0.4, 0.2)), "channels: got 0.2 after 0.4"),
        (dict(channels=(0.5, 0.5)), "channels"),
        (dict(channels=(0.0, 1.0)), "channels"),
        (dict(channels=(1.0, 2.2)), "channels: got 2.2"),
        (dict(channels=(float("nan"),)), "channels"),
        (dict(channels=(0.1, 1.0)), "channels: 0.1 leaves none of the first stage's 8 mid channels"),
        (dict(channels="wide"), "channels: got 'wide'"),
        (dict(blocks=(0,)), "blocks: with all of them fixed nothing is left to search"),
        (dict(channels=(1.0,), blocks=(0, 1)), "blocks: got 2; expected one for each of the 4 layers"),
        (dict(channels=(1.0,), blocks=(4,)), "blocks: got 4"),
        (dict(channels=(1.0,), blocks=0), "blocks: got 0; expected indices of choices"),
        (dict(channels=0.5), "channels: got 0.5; expected ratios"),
        (dict(channels="12"), "channels: got '12'; expected ratios"),
        (dict(channels=(0.2, 0.21, 1.0)), "channels: 0.2 and 0.21 both give 1 channels in a stage of 8"),
    ],
)
def test_what_makes_no_search_is_refused(given, says):
    """The message names the keyword and the value."""
    with pytest.raises(InputError, match=says):
        ShuffleNetV2(**SIZES, stage_repeats=(2, 2), **given)


def test_genes_of_one_search_mean_nothing_in_another():
    """An architecture of a block search is refused where widths are searched, also with as many genes."""
    sizes = dict(SIZES, stage_repeats=(2, 2))
    blocks, widths = ShuffleNetV2(**sizes), ShuffleNetV2(**sizes, channels=(0.3, 0.6, 1.0, 1.6), blocks=(0,))
    arch = blocks.architecture((3, 2, 1, 0))
    for refused in (widths.cost, widths.build, widths.supernet().extract):
        with pytest.raises(InputError, match="belongs to space 'shufflenet_v2'"):
            refused(arch)
    assert len({blocks.name, widths.name, ShuffleNetV2(**sizes, channels=(1.0, 1.6)).name}) == 3


def test_a_double_supernet_is_extracted_in_double(space):
    """The network's values are the supernet's, not rounded on their way."""
    net = space.supernet().double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.div_(3)
    arch = space.sample(np.random.default_rng(0))
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(net.extract(arch)(images), net(images, arch))
