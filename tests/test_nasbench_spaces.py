"""NAS-Bench-201 and NAS-Bench-Macro through the same trainer, Evaluator and run folder as the main job."""

import json

import numpy as np
import pytest
import torch

from spos_fast import Evaluator, InputError, LatencySettings, data, evaluate, recalibrate
from spos_fast.cli import main
from spos_fast.latency import measure
from spos_fast.nn.parts import Part
from spos_fast.spaces import NASBench201, NASBenchMacro

SPACES = {
    "nasbench201": NASBench201(channels=4, cells=1, input_size=8, in_channels=1),
    "nasbench_macro": NASBenchMacro(
        stem_channels=4, head_channels=16, stage_repeats=(2, 2), input_size=8, in_channels=1
    ),
}
CONFIGS = {
    "nasbench201": 'stem_channels = 4\ncells = 1\nops = ["none", "skip_connect", "nor_conv_3x3"]',
    "nasbench_macro": "stem_channels = 4\nhead_channels = 16\nstage_repeats = [2, 2]",
}
SETTINGS = """
[train]
steps = 12
batch_size = 32
log_every = 6
channels_last = true
sampling = "isomorphism"

[search]
population = 6
generations = 1
top_k = 3
crossover = 3
mutation = 3
calibration_images = 64

[retrain]
steps = 4
batch_size = 32
log_every = 2
bn_steps = 2
"""


@pytest.fixture(scope="module")
def images():
    digits = data.load("digits")
    return digits.calibration(60, seed=0), digits.calibration(50, seed=1)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("mode", ["cumulative", "pooled", "ema"])
def test_scores_equal_those_of_every_candidate_alone(images, name, mode):
    """Bit for bit, in any order, with little memory, stacked or not; cells of zeros and dead edges among them."""
    torch.manual_seed(0)
    space, rng = SPACES[name], np.random.default_rng(0)
    net = space.supernet()
    archs = [space.sample(rng) for _ in range(10)]
    archs += [space.everywhere(0), space.everywhere(1), archs[0]]
    if name == "nasbench201":
        archs += [space.architecture(genes) for genes in ([3, 3, 2, 1, 0, 0], [0, 2, 2, 0, 0, 4])]
    options = dict(mode=mode, calibration_batch=25, batch_size=32)
    alone = Evaluator(net, *images, **options)
    expected = [alone([arch])[0] for arch in archs]
    assert len({score.loss for score in expected}) > 5 and not any(score.failed for score in expected)
    assert alone(archs) == expected
    assert alone(archs[::-1]) == expected[::-1]
    assert Evaluator(net, *images, memory=900_000, **options)(archs) == expected
    assert Evaluator(net, *images, stacked=True, **options)(archs) == expected


@pytest.mark.parametrize("name", SPACES)
def test_scores_are_those_of_the_extracted_network(images, name):
    """Extract, recalibrate on the same batches, evaluate: the same accuracy, the loss to rounding."""
    torch.manual_seed(0)
    space, rng, (calibration, validation) = SPACES[name], np.random.default_rng(3), images
    net = space.supernet()
    evaluator = Evaluator(net, calibration, validation, calibration_batch=30, batch_size=50)
    for _ in range(4):
        arch = space.sample(rng)
        plain = net.extract(arch)
        recalibrate(plain, [calibration.normalization(part) for part in calibration.pixels.split(30)])
        expected, score = evaluate(plain, validation.batches(50)), evaluator([arch])[0]
        assert score.accuracy == expected.accuracy and abs(score.loss - expected.loss) < 1e-5


def test_only_layers_that_run_are_kept_in_the_tree():
    """Statistics of those of its twelve normalisation layers that the output reads, and of no other."""
    cell = SPACES["nasbench201"].supernet().features[0][0].eval()
    for genes, layers in (((3, 2, 3, 2, 3, 2), 6), ((3, 3, 2, 1, 0, 0), 0), ((1, 0, 0, 0, 4, 3), 1)):
        assert len(Part(cell, genes).norms) == layers


@pytest.mark.parametrize("name", SPACES)
def test_the_whole_job(tmp_path, name):
    """Train, search, retrain and report on the command line; again gives the same without a step more."""
    (tmp_path / "tiny.toml").write_text(
        f'[data]\nname = "digits"\n\n[space]\nname = "{name}"\n{CONFIGS[name]}\n{SETTINGS}'
    )
    folder, always = tmp_path / "run", ["--threads", "1", "--no-tensorboard"]
    assert main(["train", "--folder", str(folder), "--config", str(tmp_path / "tiny.toml"), *always]) == 0
    for command in ("search", "retrain"):
        assert main([command, "--folder", str(folder), *always]) == 0
    best = json.loads((folder / "search" / "best.json").read_text())
    assert set(best) == {"evolution", "random_search"}
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("retrain/*/result.json")}
    assert {"evolution", "random_search", "random_0"} < set(results) and all(r["params"] > 0 for r in results.values())
    candidates = (folder / "search" / "candidates.jsonl").read_bytes()
    page = (folder / "report.html").read_text()
    assert ("0→1" in page) == (name == "nasbench201") != ("part the stages" in page)
    assert main(["search", "--folder", str(folder), *always]) == 0
    assert (folder / "search" / "candidates.jsonl").read_bytes() == candidates


def test_latency_of_a_chain_is_measured_and_that_of_a_cell_refused():
    """A table has one entry a gene: the cells of NAS-Bench-201 all have the same genes."""
    settings = LatencySettings(batch_size=1, rounds=2, warmup=0, threads=1)
    table = measure(SPACES["nasbench_macro"], settings)
    assert [layer.median.shape for layer in table.layers] == [(3,)] * 4
    with pytest.raises(InputError, match="nasbench201"):
        measure(SPACES["nasbench201"], settings)
