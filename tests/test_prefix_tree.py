"""A generation scored as a tree gives what every candidate gives alone, within its memory; every prefix runs once."""

import gc
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from bench.memory import TensorsAlive
from spos_fast import Architecture, Evaluator, InputError, data, memory
from spos_fast.calibration import recalibrate
from spos_fast.nn import ShuffleUnit, parts
from spos_fast.nn.stem_part import StemPart
from spos_fast.spaces import QuantResNet, ShuffleNetV2
from spos_fast.supernet import Supernet


@pytest.fixture(scope="module")
def images():
    digits = data.load("digits")
    return digits.calibration(60, seed=0), digits.calibration(50, seed=1)


def _space(**options):
    return ShuffleNetV2(
        input_size=8, num_classes=10, in_channels=1, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
        stage_repeats=(2, 2), stage_strides=(1, 2), head_channels=32, **options,
    )  # fmt: skip


SPACES = {"blocks": {}, "widths": {"channels": (0.5, 1.0), "blocks": (3, 1, 0, 3)}, "joint": {"channels": (0.5, 1.5)}}


def _archs(space, count=14):
    """Random ones, relatives that begin alike, and one twice."""
    rng = np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(count)]
    for arch in archs[:4]:
        changed = [*arch.genes[:-1], (arch.genes[-1] + 1) % len(space.choices[-1])]
        archs.append(space.architecture(changed))
    return [*archs, archs[0]]


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
def test_scores_equal_those_of_every_candidate_alone(images, kind, mode):
    """Bit for bit, in any order, with any memory, stacked or not; calibration in batches of two sizes."""
    torch.manual_seed(0)
    space = _space(**SPACES[kind])
    net, archs = space.supernet(), _archs(space)
    options = dict(mode=mode, calibration_batch=25, batch_size=32)
    alone = Evaluator(net, *images, **options)
    expected = [alone([arch])[0] for arch in archs]
    assert len({score.loss for score in expected}) > 5
    assert alone(archs) == expected
    assert alone(archs[::-1]) == expected[::-1]
    for budget in (2_500_000, 1_200_000):
        assert Evaluator(net, *images, memory=budget, **options)(archs) == expected
    for budget in (None, 6_000_000):
        assert Evaluator(net, *images, memory=budget, stacked=True, **options)(archs) == expected


@pytest.fixture()
def four_threads():
    """PyTorch with four threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _threads_of(monkeypatch, evaluator, archs):
    """Scores, and for each tree that was walked how many threads its ops had."""
    seen = []
    own = evaluator._statistics

    def statistics(*arguments):
        seen.append(torch.get_num_threads())
        return own(*arguments)

    monkeypatch.setattr(evaluator, "_statistics", statistics)
    return evaluator(archs), seen


@pytest.mark.parametrize("kind", ["blocks", "joint"])
def test_workers_give_the_scores_of_one(images, kind, monkeypatch, four_threads):
    """Bit for bit, with two and four threads that share what PyTorch has; too few architectures or too little memory
    for several need one. Threads and gradients of the caller stay as they are."""
    torch.manual_seed(0)
    space = _space(**SPACES[kind])
    net, archs = space.supernet(), _archs(space, 40)
    one = Evaluator(net, *images, workers=1)
    expected, seen = _threads_of(monkeypatch, one, archs)
    assert seen == [4]
    assert len({score.loss for score in expected}) > 5
    for workers, each in ((None, [1, 1, 1, 1]), (2, [2, 2])):
        scores, seen = _threads_of(monkeypatch, Evaluator(net, *images, workers=workers), archs)
        assert scores == expected and seen == each
    for evaluator, some in ((Evaluator(net, *images), archs[:12]), (Evaluator(net, *images, memory=2_500_000), archs)):
        scores, seen = _threads_of(monkeypatch, evaluator, some)
        assert scores == expected[: len(some)] and seen == [4]
    assert torch.get_num_threads() == 4 and torch.is_grad_enabled()
    started = []
    later = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert started == [4]


def test_quantized_networks_have_workers(monkeypatch, four_threads):
    """On integers, with a head that is a classifier alone: bit for bit. Weights of 8 DoReFa bits run in floats, whose
    bits depend on threads: one worker."""
    torch.manual_seed(0)
    options = dict(input_size=32, num_classes=10, stage_channels=(16, 32), stage_repeats=(2, 1), stem="cifar")
    pixels, labels = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (24,))
    given = data.Images(pixels, labels, data.Normalization((0.5,) * 3, (0.25,) * 3))
    for bits, trees in ((((2, 2), (3, 4)), [1, 1, 1, 1]), (((8, 8), (3, 4)), [4])):
        space = QuantResNet(18, bits=bits, **options)
        net, archs = space.supernet(), [space.sample(np.random.default_rng(seed)) for seed in range(40)]
        if bits[0][0] == 8:
            archs = [space.architecture([0, *arch.genes[1:]]) for arch in archs]
        expected, seen = _threads_of(monkeypatch, Evaluator(net, given, given, workers=1), archs)
        assert seen == [4] and len({score.loss for score in expected}) > 5
        scores, seen = _threads_of(monkeypatch, Evaluator(net, given, given), archs)
        assert seen == trees
        assert scores == expected


def test_a_worker_that_fails_ends_the_others(images, monkeypatch, four_threads):
    """The error comes out, at once, and nothing goes on running."""
    space = _space()
    archs = _archs(space, 40)
    evaluator = Evaluator(space.supernet(), *images, calibration_batch=2)
    calls, most, own = [], math.inf, parts.Part.calibrate

    def calibrate(self, inputs):
        calls.append(self)
        if len(calls) == most:
            raise InputError("a quarter of them")
        return own(self, inputs)

    monkeypatch.setattr(parts.Part, "calibrate", calibrate)
    before = evaluator(archs)
    total, most = len(calls), len(calls) // 4
    calls.clear()
    threads = threading.active_count()
    with pytest.raises(InputError, match="a quarter of them"):
        evaluator(archs)
    assert len(calls) < total / 2
    assert threading.active_count() == threads
    monkeypatch.undo()
    assert evaluator(archs) == before


@pytest.mark.parametrize("images_left", [7, 256])
def test_bits_do_not_depend_on_threads_behind_the_last_block(images_left):
    """A wide head and many classes, where PyTorch's own ops round as the number of threads has it."""
    space = ShuffleNetV2(
        input_size=16, num_classes=1000, stem_channels=8, stage_channels=(16, 32), stage_repeats=(2, 2),
        stage_strides=(1, 2), head_channels=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    net, archs = space.supernet(), _archs(space, 20)
    pixels, labels = torch.randint(0, 256, (256, 3, 16, 16), dtype=torch.uint8), torch.randint(0, 1000, (256,))
    normalization = data.Normalization((0.5,) * 3, (0.25,) * 3)
    calibration = data.Images(pixels[:40], labels[:40], normalization)
    validation = data.Images(pixels[:images_left], labels[:images_left], normalization)
    before, scores = torch.get_num_threads(), []
    try:
        for threads, workers in ((1, 1), (2, 1), (2, None), (4, 1), (4, None)):
            torch.set_num_threads(threads)
            scores.append(Evaluator(net, calibration, validation, workers=workers)(archs))
    finally:
        torch.set_num_threads(before)
    assert scores[1:] == scores[:1] * 4


def test_what_several_threads_cannot_run_keeps_one_worker(images, monkeypatch, four_threads):
    """A classifier of the user's own, and hooks on all modules."""
    space = _space()
    net, archs = space.supernet(), _archs(space, 40)

    class Own(nn.Linear):
        pass

    plain = net.classifier
    net.classifier = Own(32, 10)
    assert _threads_of(monkeypatch, Evaluator(net, *images), archs)[1] == [4]
    net.classifier = plain
    assert _threads_of(monkeypatch, Evaluator(net, *images), archs)[1] == [1, 1, 1, 1]
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert _threads_of(monkeypatch, Evaluator(net, *images), archs)[1] == [4]
    finally:
        hook.remove()


def test_blocks_that_run_as_modules_keep_one_worker(images, monkeypatch, four_threads):
    """Their normalisation layers have one set of buffers."""
    space = _space()
    net, archs = space.supernet(), _archs(space, 40)
    net.features[0][0].register_forward_hook(lambda *_: None)
    scores, seen = _threads_of(monkeypatch, Evaluator(net, *images), archs)
    assert seen == [4]
    assert scores == Evaluator(net, *images, workers=1)(archs)


def test_plain_modules_give_the_same_statistics_and_scores(images):
    """SPOS_FAST_BACKEND=reference, in a process of its own: the tree equals every candidate alone, bit for bit, and the
    scores are those of the kernels to rounding."""
    program = """
        import json, sys
        import torch
        from tests.test_prefix_tree import _archs, _space, SPACES
        from spos_fast import Evaluator, data
        digits = data.load("digits")
        images = digits.calibration(60, seed=0), digits.calibration(50, seed=1)
        for kind in SPACES:
            torch.manual_seed(0)
            space = _space(**SPACES[kind])
            net, archs = space.supernet(), _archs(space, 5)
            evaluator = Evaluator(net, *images, calibration_batch=25, batch_size=32)
            scores = evaluator(archs)
            assert scores == [evaluator([arch])[0] for arch in archs]
            print(json.dumps([score.loss for score in scores]))
    """
    environment = {**os.environ, "SPOS_FAST_BACKEND": "reference", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True, capture_output=True, text=True
    )
    for kind, line in zip(SPACES, done.stdout.splitlines(), strict=True):
        torch.manual_seed(0)
        space = _space(**SPACES[kind])
        net, archs = space.supernet(), _archs(space, 5)
        ours = [score.loss for score in Evaluator(net, *images, calibration_batch=25, batch_size=32)(archs)]
        assert ours == pytest.approx(json.loads(line), rel=1e-4)


def test_every_prefix_runs_once_a_batch(images, monkeypatch):
    """Shared prefixes are computed once a batch, leaves once an architecture, whatever occurs twice."""
    calls = Counter()

    def count(kind):
        calibrate = kind.calibrate

        def counting(self, inputs):
            calls[id(self)] += len(inputs)
            return calibrate(self, inputs)

        monkeypatch.setattr(kind, "calibrate", counting)

    count(parts.Part)
    count(StemPart)
    space = _space()
    archs = _archs(space)
    evaluator = Evaluator(space.supernet(), *images, calibration_batch=30, workers=1)
    evaluator(archs)
    probed = len({(layer, gene) for arch in archs for layer, gene in enumerate(arch.genes)}) + 1
    prefixes = {arch.genes[:length] for arch in archs for length in range(len(archs[0].genes) + 1)}
    assert sum(calls.values()) == probed + 2 * len(prefixes)


@pytest.mark.parametrize("stacked", [False, True])
def test_memory_stays_within_the_budget(images, stacked):
    """Tensors alive at once, by count: within every budget, less with less; too little for a batch is refused."""
    space = _space()
    net, archs = space.supernet(), _archs(space, 40)
    peaks = []
    for budget in (24_000_000, 3_000_000, 1_500_000):
        evaluator = Evaluator(net, *images, memory=budget, stacked=stacked, workers=1)  # what threads make is not seen
        evaluator(archs[:1])  # what is made once does not count
        gc.collect()
        with TensorsAlive() as alive:
            evaluator(archs)
        assert alive.most < budget
        peaks.append(alive.most)
    assert peaks[-1] < peaks[0]
    with pytest.raises(InputError, match="memory: got 100,000 bytes; a batch of 60"):
        Evaluator(net, *images, memory=100_000)(archs)


class _Plain(nn.Module):
    """A candidate that no op stands in for: convolution with bias, affine BN, another activation; maybe dropout."""

    def __init__(self, channels, kernel_size):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2),
            nn.BatchNorm2d(channels, eps=1e-3),
            nn.GELU(),
            nn.Dropout(0.5),
        )

    def forward(self, x, mid):
        return x + self.layers(x)


def _plain_supernet():
    torch.manual_seed(0)
    net = Supernet(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)),
        [[_Plain(6, 1), _Plain(6, 3)] for _ in range(3)],
        nn.Sequential(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12, affine=False), nn.SiLU()),
        nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)),
        0.2,
        route=lambda arch: [(gene, 6) for gene in arch.genes],
        build=lambda arch: None,
    )
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
    return net


@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
def test_any_module_with_batch_norm_is_scored_as_recalibrate_does(images, mode):
    """Plain convolutions, affine BN, BN in the classifier, dropout: as recalibrating the network by hand."""
    net = _plain_supernet()
    archs = [Architecture("plain", genes) for genes in ((0, 1, 1), (0, 1, 0), (1, 1, 1))]
    scores = Evaluator(net, *images, mode=mode, calibration_batch=30)(archs)
    calibration, validation = images
    for arch, score in zip(archs, scores, strict=True):
        path = net.path(arch)
        batches = [x for x, _ in calibration.batches(30)]
        recalibrate(net, batches, mode, modules=path, forward=lambda x, arch=arch: net(x, arch))
        net.eval()
        with torch.no_grad():
            logits = torch.cat([net(x, arch) for x, _ in validation.batches(50)])
        assert score.accuracy == (logits.argmax(1) == validation.labels).double().mean().item()
        assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, validation.labels).item(), rel=1e-5)


def test_a_network_without_batch_norm_is_scored_as_it_is(images):
    """There is nothing to calibrate then."""
    net = _plain_supernet()
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.Identity())
    arch = Architecture("plain", (0, 1, 0))
    (score,) = Evaluator(net, *images)([arch])
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(x, arch) for x, _ in images[1].batches(50)])
    assert score.accuracy == (logits.argmax(1) == images[1].labels).double().mean().item()


def test_a_layer_that_runs_twice_is_refused(images):
    """Its statistics would be those of the last time."""
    net = _plain_supernet()
    block = net.features[1][0].layers
    block.append(block[1])
    with pytest.raises(InputError, match="runs twice"):
        Evaluator(net, *images)([Architecture("plain", (0, 0, 0))])


def test_hooks_see_their_modules_run(images):
    """A hook in a block keeps the fused op away from it; the scores stay the same to rounding."""
    torch.manual_seed(0)
    space = _space()
    net, arch = space.supernet(), space.everywhere(1)
    evaluator = Evaluator(net, *images)
    (before,) = evaluator([arch])
    seen = []
    net.features[2][1].branch_main[0].register_forward_hook(lambda *_: seen.append(1))
    (after,) = evaluator([arch])
    assert seen and after.loss == pytest.approx(before.loss, rel=1e-5)


def test_a_block_with_a_hook_or_a_forward_of_its_own_runs_it(images):
    """What the fused op would pass by changes the scores, in the tree as by hand."""
    torch.manual_seed(0)
    space = _space()
    arch = space.everywhere(1)

    class Silent(ShuffleUnit):
        def forward(self, x, mid=None):
            return super().forward(x, mid) * 0

    def hooked(block):
        block.register_forward_hook(lambda _module, _inputs, out: out * 0)

    def overridden(block):
        block.forward = lambda x, mid=None: type(block).forward(block, x, mid) * 0

    def subclassed(block):
        block.__class__ = Silent

    for change in (hooked, overridden, subclassed):
        net = space.supernet()
        (before,) = Evaluator(net, *images)([arch])
        change(net.features[-1][1])
        (after,) = Evaluator(net, *images)([arch])
        assert after.loss != before.loss and after.loss == pytest.approx(np.log(space.num_classes)), change.__name__


def test_blocks_that_write_to_their_input_do_not_touch_their_siblings(images):
    """An input is shared by all candidates of a layer; so is what a skip connection hands on."""
    torch.manual_seed(0)
    space = _space()
    net = space.supernet()
    for layer, candidates in enumerate(net.features):
        if layer == 0:
            continue
        channels = candidates[0].branch_in * 2
        for choice, block in enumerate(
            (
                nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)),
                nn.Identity(),
                nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)),
            )
        ):
            if candidates[choice].splits:
                candidates[choice] = _Widthless(block)
    archs = [space.architecture(genes) for genes in itertools.product(range(3), repeat=len(net.features))]
    for stacked in (False, True):
        evaluator = Evaluator(net, *images, stacked=stacked)
        assert evaluator(archs) == [evaluator([arch])[0] for arch in archs]


class _Widthless(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, mid):
        return self.block(x)


def test_autocast_scores_are_near(images):
    """In bfloat16 the modules run on the CPU; the tree equals every candidate alone there, too."""
    torch.manual_seed(0)
    space = _space()
    net, archs = space.supernet(), _archs(space, 3)
    evaluator = Evaluator(net, *images)
    exact = evaluator(archs)
    with torch.autocast("cpu", torch.bfloat16):
        scores = evaluator(archs)
        assert scores == [evaluator([arch])[0] for arch in archs]
    assert [score.loss for score in scores] == pytest.approx([score.loss for score in exact], rel=0.05)


def test_a_container_s_limit_counts_as_free_memory(tmp_path, monkeypatch):
    """What a control group has left, caches not counted as used; without a limit what the system has."""
    device = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.free_memory(device)
    assert 1 << 20 < whole < 1 << 50
    for name, text in (("max", "5000\n"), ("current", "3000\n"), ("stat", "anon 100\ninactive_file 500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free_memory(device) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(device) > 1 << 20
