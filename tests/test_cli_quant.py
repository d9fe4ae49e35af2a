"""The command line on the mixed-precision spaces: a whole run under a limit of bit operations, its report, mistakes."""

import json

import pytest

from spos_fast.analysis.run_data import read_run
from spos_fast.analysis.tables import strip
from spos_fast.cli import main
from spos_fast.config_io import config_from, read_config
from spos_fast.spaces import QuantResNet

LIMIT = "2.2e6"
TINY = [
    "--threads", "1", "--no-tensorboard", "--config", "digits", "--space", "quant_resnet18", "--space.stem", "cifar",
    "--space.stage_channels", "8,16", "--space.stage_repeats", "1,2",
    "--train.steps", "20", "--train.batch_size", "32", "--train.log_every", "10",
]  # fmt: skip
SEARCH = [
    "--search.population", "6", "--search.generations", "2", "--search.crossover", "3", "--search.mutation", "3",
    "--search.top_k", "3", "--search.calibration_images", "64", "--search.bitops_max", LIMIT,
    "--search.random_search", "false",
]  # fmt: skip
RETRAIN = ["--retrain.steps", "10", "--retrain.batch_size", "32", "--retrain.log_every", "5", "--retrain.bn_steps", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, stage by stage; later stages know the space from the folder."""
    folder = tmp_path_factory.mktemp("quant") / "run"
    for stage, settings in (("train", TINY), ("search", SEARCH), ("retrain", RETRAIN)):
        assert main([stage, "--folder", str(folder), "--threads", "1", "--no-tensorboard", *settings]) == 0
    return folder


def test_candidates_and_baselines_have_bit_operations(finished):
    """All candidates meet the limit; the searched networks, uniform 3W3A and a random one are retrained."""
    rows = json.loads((finished / "search" / "evolution.json").read_text())
    assert len(rows) == 18 and all(0 < row["bitops"] <= float(LIMIT) for row in rows)
    results = {path.parent.name: json.loads(path.read_text()) for path in finished.glob("retrain/*/result.json")}
    assert set(results) == {"evolution", "all_3W3A", "random_0"}
    space = QuantResNet(
        input_size=8, in_channels=1, num_classes=10, stem="cifar", stage_channels=(8, 16), stage_repeats=(1, 2)
    )
    for result in results.values():
        assert result["bitops"] == space.cost(space.architecture(result["architecture"])).bitops
    assert results["all_3W3A"]["architecture"] == list(space.uniform(3, 3).genes)
    assert results["random_0"]["bitops"] <= float(LIMIT)


def test_report_draws_the_bits_of_every_layer(finished):
    """Bit operations in the table and as an axis, a strip of bits for every architecture, and the limit."""
    page, data = (finished / "report.html").read_text(), read_run(finished)
    assert "BitOps" in page and "Accuracy against bit operations" in page and "bitops_max" in page
    assert "Which bits where" in page and "Which width where" in page
    uniform = data.baselines["all_3W3A"]
    assert 'aria-label="3W3A, 3W3A, 3W3A"' in strip(uniform, data) and strip(uniform, data) in page
    assert data.names("bits")[-1] == "3W3A" and data.searched == {"bits": 6, "width": 3} and data.stages == (1, 2)
    assert "--space.name quant_resnet18" in page, "the commands for the same run must name the space"


def test_running_again_changes_nothing(finished):
    """Every stage finds its results."""
    before = {path: path.read_bytes() for path in finished.rglob("*.json*")}
    for stage in ("train", "search", "retrain"):
        assert main([stage, "--folder", str(finished), "--threads", "1", "--no-tensorboard"]) == 0
    assert {path: path.read_bytes() for path in finished.rglob("*.json*")} == before


def test_mistakes_are_one_line(tmp_path, capsys):
    """Bits that are none, limits that nothing meets, bit operations of a space without bits: nothing is written."""
    run = ["--folder", str(tmp_path / "run")]
    digits = ["--config", "digits"]
    for arguments, says in (
        (["train", *run, *digits, "--space", "resnet"], "space.name: got 'resnet'; expected one of shufflenet_v2"),
        (["train", *run, *TINY, "--space.bits", "3"], "bits: got '3'; expected bits of weights and activations"),
        (["train", *run, *TINY, "--space.bits", "9W1A"], "bits: got (9, 1)"),
        (["train", *run, *TINY, "--train.bitops_max", "10"], "train.bitops: no architecture has at most 10"),
        (
            ["demo", *run, *digits, "--search.bitops_max", "1e9"],
            "search.bitops: the space has none; choose a quantized",
        ),
        (["train", *run, *digits, "--train.bitops_min", "1e9"], "train.bitops: the space has none"),
        (["demo", *run, *digits, "--search.objectives", "accuracy,bitops"], "search.objectives: bitops: the space has"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("spos-fast: error: ") and "\n" not in error and says in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["quant_resnet18", "quant_cifar10_small"])
def test_presets_search_at_the_cost_of_3w3a(preset):
    """The limit of the presets is exactly what their uniform 3W3A costs."""
    config = config_from(read_config(preset), preset)
    size = 224 if config.data.name == "imagenet" else 32
    space = config.space.make(input_size=size, in_channels=3, num_classes=1000 if size == 224 else 10)
    assert space.cost(space.uniform(3, 3)).bitops == config.search.bitops_max
    assert space.baselines() == {"all_3W3A": space.uniform(3, 3)}


def test_sizes_of_a_preset_for_another_kind_of_space_are_left_out(tmp_path, capsys):
    """The digits preset has sizes of ShuffleNetV2, which a ResNet has not; of two ResNets they are kept."""
    shared = ["--threads", "1", "--no-tensorboard", "--train.steps", "1", "--train.batch_size", "8"]
    sizes = ["--space.stage_channels", "8,16", "--space.stage_repeats", "1,1", "--space.stem", "cifar"]
    own = tmp_path / "own.toml"
    own.write_text(
        '[data]\nname = "digits"\n[space]\nname = "quant_resnet18"\nstem = "cifar"\n[search]\nbitops_max = 9e6\n'
    )
    for config, name, given in (("digits", "quant_resnet18", sizes), (str(own), "quant_resnet34", sizes[:4])):
        run = tmp_path / name
        assert main(["train", "--folder", str(run), "--config", config, "--space", name, *given, *shared]) == 0
        space = json.loads((run / "config.json").read_text())["space"]
        assert (space["name"], space["stem"], space["stage_channels"]) == (name, "cifar", [8, 16])
        assert "bitops_max" not in json.loads((run / "given.json").read_text())["preset"].get("search", {})
