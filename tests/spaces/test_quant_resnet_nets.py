"""The networks of the mixed-precision ResNet space: paths, plain networks, scores, training."""

import itertools

import numpy as np
import pytest
import torch

from spos_fast import Evaluator, TrainConfig, UniformSampler, recalibrate
from spos_fast.data import Images, load
from spos_fast.evaluation import evaluate
from spos_fast.spaces import QuantResNet
from spos_fast.training import train

QUANTIZERS = [("dorefa", "pact"), ("lsq", "lsq"), ("lsq", "lsq+"), ("dorefa", "pact_residual")]


def tiny(**changes):
    """Two stages, three blocks, for 8 x 8 digits."""
    sizes = dict(input_size=8, num_classes=10, in_channels=1, stem="cifar")
    return QuantResNet(18, **{**sizes, **dict(stage_channels=(8, 16), stage_repeats=(1, 2)), **changes})


def unlike(net):
    """Parameters and statistics that differ from each other everywhere, as after training."""
    with torch.no_grad():
        for name, value in itertools.chain(net.named_parameters(), net.named_buffers()):
            if value.is_floating_point() and value.dim() <= 2:
                value.mul_(torch.empty_like(value).uniform_(0.7, 1.4))
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
    return net


@pytest.mark.parametrize(
    ("bn", "quantizers"), [*(("shared", pair) for pair in QUANTIZERS), ("per_bits", QUANTIZERS[0])], ids=str
)
def test_extracted_network_is_the_path(bn, quantizers):
    """At every pair of bit-widths and every width: one step a quantizer, the same output. In float64: sums in another
    order would now and then round an activation to the neighbouring code.
    """
    torch.manual_seed(0)
    space = tiny(weight_quantizer=quantizers[0], act_quantizer=quantizers[1], bn=bn)
    net = unlike(space.supernet()).double().eval()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    archs = [space.everywhere(bits, width) for bits in range(7) for width in range(3)]
    archs += [space.sample(np.random.default_rng(seed)) for seed in range(3)]
    for arch in archs:
        plain = net.extract(arch)
        assert all(p.shape == (1,) for name, p in plain.named_parameters() if name.endswith(("step", "offset")))
        torch.testing.assert_close(plain(x), net(x, arch), rtol=1e-9, atol=1e-9)
        assert {n: p.shape for n, p in plain.named_parameters()} == {
            n: p.shape for n, p in space.build(arch).named_parameters()
        }


@pytest.fixture(scope="module")
def digits():
    """A data set of 8 x 8 images."""
    return load("digits")


def _images(source, count, seed):
    images = source.calibration(count, seed=seed)
    return Images(images.pixels, source.validation().labels[:count], images.normalization)


@pytest.mark.parametrize("bn", ["shared", "per_bits"])
def test_scores_are_those_of_recalibrated_plain_networks(digits, bn):
    """The Evaluator scores a candidate as its plain network scores alone, and leaves the supernet as it is."""
    torch.manual_seed(1)
    space = tiny(bn=bn)
    net = unlike(space.supernet())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rng = np.random.default_rng(1)
    archs = [space.uniform(3, 3), *(space.sample(rng) for _ in range(4))]
    calibration, validation = _images(digits, 96, 0), _images(digits, 64, 1)
    scores = Evaluator(net, calibration, validation, calibration_batch=32, batch_size=32)(archs)
    for arch, score in zip(archs, scores, strict=True):
        plain = net.extract(arch)
        recalibrate(plain, (calibration.normalization(part) for part in calibration.pixels.split(32)), "cumulative")
        alone = evaluate(plain, validation.batches(32))
        assert not score.failed and score.loss == pytest.approx(alone.loss, rel=1e-3)
        assert score.accuracy == pytest.approx(alone.accuracy, abs=2 / 64)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def _trained(space, digits, steps, checkpoint=None, stop=None, **recipe):
    torch.manual_seed(0)
    net = space.supernet()
    config = TrainConfig(steps=steps, batch_size=16, lr=0.1, log_every=1, checkpoint_seconds=0.0, **recipe)

    def on_metrics(metrics):
        if metrics.step == stop:
            raise KeyboardInterrupt

    sampler = UniformSampler(space)
    try:
        train(net, digits, config, sampler=sampler, seed=3, checkpoint=checkpoint, on_metrics=on_metrics)
    except KeyboardInterrupt:
        return None
    return net


@pytest.mark.parametrize("quantizers", [("dorefa", "pact"), ("lsq", "lsq+")], ids="-".join)
def test_training_moves_steps_and_resumes_exactly(digits, tmp_path, quantizers):
    """Every step of every quantizer is trained, and a run that was stopped gives the same bits as one that was not."""
    space = tiny(weight_quantizer=quantizers[0], act_quantizer=quantizers[1], uniform_bits=())
    whole = _trained(space, digits, 30)
    assert _trained(space, digits, 30, tmp_path / "checkpoint.pt", stop=11) is None
    again = _trained(space, digits, 30, tmp_path / "checkpoint.pt")
    torch.manual_seed(0)
    fresh = dict(space.supernet().named_parameters())
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        if name.endswith("step"):
            assert (p != fresh[name]).sum() >= len(p) - 1 and p.isfinite().all(), name


def test_reference_bits_stay_untrained(digits):
    """Steps of bit-widths that only a uniform network has are not touched by a training that never samples them."""
    space = tiny()
    net = _trained(space, digits, 5, weight_decay=0.5, momentum=0.5)
    torch.manual_seed(0)
    fresh = dict(space.supernet().named_parameters())
    for name, p in net.named_parameters():
        if name.endswith("act.step"):
            assert torch.equal(p[1], fresh[name][1]), name  # 2, 3, 4 bits


def test_plain_network_trains_alone(digits):
    """A plain network of mixed bits learns with the same trainer."""
    torch.manual_seed(0)
    space = tiny(stage_channels=(16, 32))
    net = space.build(space.architecture([0, 1, 3, 2, 5, 0]))
    rows = []
    train(net, digits, TrainConfig(steps=60, batch_size=32, lr=0.1, log_every=20), on_metrics=rows.append)
    assert rows[-1].accuracy > 0.5 and rows[-1].loss < rows[0].loss


def test_compiled_supernet_draws_bits():
    """With ``dynamic=True`` 100 paths of random bits, all at one width, run in at most two graphs."""
    from torch._dynamo.testing import CompileCounter

    space = tiny()
    net, x, counter = space.supernet().eval(), torch.randn(2, 1, 8, 8), CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=True)
    generator = np.random.default_rng(0)
    for position in range(100):
        genes = [int(generator.integers(len(space.candidates(at)))) if at % 2 == 0 else 1 for at in range(6)]
        out = compiled(x, space.architecture(genes))
        if position % 20 == 0:
            torch.testing.assert_close(out, net(x, space.architecture(genes)), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
