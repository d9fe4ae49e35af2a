"""The command line: help that can be followed, errors of one line with exit code 2, nothing written by a mistake."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from spos_fast import spaces
from spos_fast.cli import COMMANDS, main

TINY = [
    "--threads", "1", "--no-tensorboard", "--config", "digits",
    "--space.stem_channels", "8", "--space.stage_channels", "16,32", "--space.stage_repeats", "2,2",
    "--space.stage_strides", "1,2", "--space.head_channels", "32",
    "--train.steps", "20", "--train.batch_size", "32", "--train.log_every", "10",
]  # fmt: skip
SEARCH = [
    "--search.population", "6", "--search.generations", "2", "--search.crossover", "3", "--search.mutation", "3",
    "--search.top_k", "3", "--search.calibration_images", "64",
]  # fmt: skip
RETRAIN = ["--retrain.steps", "10", "--retrain.batch_size", "32", "--retrain.log_every", "5", "--retrain.bn_steps", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["demo", "--folder", str(folder), *TINY, *SEARCH, *RETRAIN]) == 0
    return folder


def _refused(capsys, arguments, says):
    """The command ends with code 2 and one line that says what is wrong."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("spos-fast: error: ") and "\n" not in error, error
    assert says in error, error


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    """Every command explains itself and its settings."""
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "--folder" in text
    if command != "report":
        assert "optimiser steps" in text and "--config" in text


def test_a_finished_run_has_everything(finished):
    """Config, metrics, checkpoints, every scored candidate, best architectures, all baselines, the report."""
    assert set(json.loads((finished / "config.json").read_text())) == {
        "seed", "data", "space", "train", "search", "retrain",
    }  # fmt: skip
    rows = [json.loads(line) for line in (finished / "search" / "candidates.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["evolution"] * 18 + ["random_search"] * 18
    assert [row["step"] for row in map(json.loads, (finished / "supernet" / "metrics.jsonl").open())] == [10, 20]
    best = json.loads((finished / "search" / "best.json").read_text())
    for phase in ("evolution", "random_search"):
        accuracies = [row["accuracy"] for row in rows if row["phase"] == phase]
        assert best[phase]["accuracy"] == max(accuracies)
    labels = {path.parent.name for path in finished.glob("retrain/*/result.json")}
    assert labels == {
        "evolution", "random_search", "all_shuffle_k3", "all_shuffle_k5", "all_shuffle_k7", "all_xception", "random_0",
    }  # fmt: skip
    for label in labels:
        result = json.loads((finished / "retrain" / label / "result.json").read_text())
        assert result["test_images"] == 359 and 0 <= result["test_accuracy"] <= 1
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_stages_one_by_one_are_the_demo(finished, tmp_path, capsys):
    """train, search, retrain and report give the numbers of demo; settings come from the folder after the first."""
    run = str(tmp_path / "run")
    assert main(["train", "--folder", run, *TINY]) == 0
    assert main(["search", "--folder", run, "--threads", "1", "--no-tensorboard", *SEARCH]) == 0
    retrain = ["retrain", "--folder", run, "--threads", "1", "--no-tensorboard", *RETRAIN]
    assert main([*retrain, "--arch", "evolution", "--arch", "0,1,2,3"]) == 0
    assert main(["report", "--folder", run]) == 0
    for name in ("search/best.json", "search/candidates.jsonl", "retrain/evolution/result.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    assert (tmp_path / "run" / "retrain" / "genes_0-1-2-3" / "result.json").exists()


def test_running_again_does_nothing_again(finished, capsys):
    """A second demo on a finished run trains and scores nothing, and changes no file but the report."""
    before = {p: p.read_bytes() for p in finished.rglob("*.json*")}
    assert main(["demo", "--folder", str(finished), *TINY, *SEARCH, *RETRAIN]) == 0
    assert {p: p.read_bytes() for p in finished.rglob("*.json*")} == before
    assert "done before" in capsys.readouterr().out


def test_mistakes_write_nothing(tmp_path, capsys):
    """Unknown commands, flags, data, devices, settings out of range, infeasible constraints: no folder appears."""
    run = ["--folder", str(tmp_path / "run")]
    for arguments, says in (
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["train"], "--folder"),
        (["train", *run, "--train.step", "3"], "--train.step"),
        (["train", *run, "--train.steps", "x"], "--train.steps: got 'x'"),
        (["train", *run, "--train.steps", "0"], "train.steps: got 0"),
        (["train", *run], "--config: a new run needs one"),
        (["train", *run, "--data.name", "mnist"], "mnist"),
        (["train", *run, "--data.name", "cifar10", "--data.path", str(tmp_path / "no")], "no"),
        (["train", *run, *TINY, "--device", "cuda:77"], "cuda:77"),
        (["train", *run, "--config", "nonsense"], "a preset"),
        (["train", *run, *TINY, "--train.macs_max", "10"], "train.macs: no architecture has at most 10"),
        (["train", *run, *TINY, "--seed", "one"], "--seed"),
        (["demo", *run, *TINY, "--search.params_min", "1e9"], "search.params"),
        (["report", *run], "not a run folder"),
        (["train", *run, *TINY[2:], "--threads", "-1"], "--threads"),
        (["train", *run, *TINY, "--workers", "-1"], "--workers"),
        (["train", *run, *TINY, "--device", "meta"], "meta"),
        (["train", *run, *TINY, "--seed", "99999999999999999999"], "seed"),
        (["train", *run, *TINY, "--data.normalize", "foo"], "data.normalize"),
        (["train", *run, *TINY, "--data.validation", "1.5"], "data.validation"),
        (["demo", *run, *TINY, "--search.macs_max", "nan"], "macs"),
        (["train", *run, *TINY, "--space.channels", "1,0.5"], "channels: got 0.5 after 1"),
        (["train", *run, *TINY, "--space.channels", "wide"], "--space.channels: got 'wide'"),
        (["train", *run, *TINY, "--space.blocks", "0"], "blocks"),
        (["train", *run, *TINY, "--train.widening_end", "0.5"], "train.widening: the space searches no widths"),
        (["demo", *run, *TINY, "--search.calibration_images", "5000"], "search.calibration_images: got 5,000"),
        (["demo", *run, *TINY, *SEARCH, "--search.supernet", "absent.pt"], "absent.pt"),
        (["demo", *run, *TINY, "--search.early_stopping", "0.4"], "search.early_stopping: got 0.4"),
        (["demo", *run, *TINY, "--search.early_stopping", "0.9", "--search.batch_size", "5000"], "one batch; lower it"),
        (["demo", *run, *TINY, "--rank-timeout", "0"], "--rank-timeout: got 0"),
    ):
        _refused(capsys, arguments, says)
        assert not (tmp_path / "run").exists(), arguments


def test_stages_in_the_wrong_order_say_what_to_run(tmp_path, capsys):
    """search before train, retrain before search."""
    run = ["--folder", str(tmp_path / "run")]
    _refused(capsys, ["search", *run, *TINY, *SEARCH], "spos-fast train --folder")
    assert main(["train", *run, *TINY]) == 0
    _refused(capsys, ["retrain", *run, "--no-tensorboard", *RETRAIN], "spos-fast search --folder")


def test_architectures_on_the_command_line(finished, tmp_path, capsys):
    """Names, genes and files that are none are refused with what would be right."""
    (tmp_path / "other.json").write_text('{"space": "resnet", "genes": [0, 0, 0, 0]}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    base = ["retrain", "--folder", str(finished), "--no-tensorboard"]
    for arch, says in (
        ("best_of_all", "all_xception"),
        ("0,1,2", "3 genes"),
        ("0,1,2,9", "gene 3 is 9"),
        (str(tmp_path / "other.json"), "resnet"),
        (str(tmp_path / "broken.json"), "JSON"),
        (str(tmp_path / "binary.json"), "binary.json"),
        ("\u00b2", "all_xception"),
        (str(tmp_path / "absent.json"), "absent.json"),
    ):
        _refused(capsys, [*base, "--arch", arch], says)


def test_damaged_checkpoints_are_named(tmp_path, capsys):
    """A truncated supernet stops the search with the file's name; the file stays as it is."""
    run = ["--folder", str(tmp_path / "run")]
    assert main(["train", *run, *TINY]) == 0
    path = tmp_path / "run" / "supernet" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    damaged = path.read_bytes()
    _refused(capsys, ["search", *run, *SEARCH], "checkpoint.pt: truncated")
    _refused(capsys, ["train", *run], "checkpoint.pt: truncated")
    assert path.read_bytes() == damaged
    other = ["--folder", str(tmp_path / "other")]
    _refused(capsys, ["search", *other, *TINY, *SEARCH, "--search.supernet", str(path)], "not a readable checkpoint")
    _refused(capsys, ["search", *other, *TINY, *SEARCH, "--search.supernet", str(tmp_path / "no.pt")], "no.pt")
    assert not (tmp_path / "other").exists()


def test_those_who_have_the_published_checkpoint_search_at_once(tmp_path, capsys):
    """No training: a checkpoint in the published form goes into the search, and what was found can be retrained."""
    space = spaces.ShuffleNetV2(
        input_size=8, in_channels=1, num_classes=10, stem_channels=8, stem_stride=1, stage_channels=(16, 32),
        stage_repeats=(2, 2), stage_strides=(1, 2), head_channels=32,
    )  # fmt: skip
    weights = {f"module.{name}": value for name, value in space.supernet().state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "checkpoint-150000.pth.tar")
    run = ["--folder", str(tmp_path / "run"), "--threads", "1", "--no-tensorboard"]
    published = ["--search.supernet", str(tmp_path / "checkpoint-150000.pth.tar")]
    assert main(["search", *run, *TINY[3:], *SEARCH, *published]) == 0
    assert main(["retrain", *run, *RETRAIN, "--arch", "best", "--retrain.init", "inherited"]) == 0
    assert (tmp_path / "run" / "retrain" / "random_search" / "result.json").exists()
    assert not (tmp_path / "run" / "supernet").exists()


@pytest.mark.parametrize("blocks", [[], ["--space.blocks", "0"]], ids=["joint", "widths"])
def test_widths_are_searched_and_retrained(tmp_path, blocks):
    """Channel search with and without block search through all stages, with a widening schedule; the width of a
    searched architecture is that of the network that was retrained, by its number of weights.
    """
    flags = ["--space.channels", "0.4,1,1.6", *blocks, "--train.widening_start", "0.3", "--train.widening_end", "0.6"]
    run = tmp_path / "run"
    assert main(["demo", "--folder", str(run), *TINY, *SEARCH, *RETRAIN, *flags, "--retrain.init", "inherited"]) == 0
    labels = {path.parent.name for path in run.glob("retrain/*/result.json")}
    uniform = {"all_1x"} if blocks else {"all_shuffle_k3", "all_shuffle_k5", "all_shuffle_k7", "all_xception"}
    assert labels == {"evolution", "random_search", "random_0", *uniform}
    best = json.loads((run / "search" / "best.json").read_text())["evolution"]
    assert len(best["genes"]) == (4 if blocks else 8)
    weights = torch.load(run / "retrain" / "evolution" / "checkpoint.pt", weights_only=True)["model"]
    assert sum(value.numel() for value in weights.values() if value.dim() > 1) == best["params"]
    assert "Which width where" in (run / "report.html").read_text()


def test_ctrl_c_ends_in_one_line_and_the_run_goes_on(tmp_path):
    """SIGINT in the middle of training: code 130, no traceback; the same command goes on from the last checkpoint."""
    command = [sys.executable, "-m", "spos_fast", "train", "--folder", str(tmp_path / "run"), *TINY]
    command += ["--train.steps", "100000", "--train.checkpoint_seconds", "0"]
    path, seen = tmp_path / "run" / "supernet" / "checkpoint.pt", 0
    for attempt in range(2):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test that runs in the background may have inherited that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_mtime_ns == seen) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            output, error = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 130 and "run the same command again" in error and "Traceback" not in error, error
        assert ("goes on after" in output) == (attempt == 1)
        seen = path.stat().st_mtime_ns


def test_the_front_of_a_run_without_one_is_refused(finished, capsys):
    """Instead of the baselines."""
    before = sorted(finished.rglob("*"))
    _refused(capsys, ["retrain", "--folder", str(finished), "--arch", "front"], "--arch: ")
    assert sorted(finished.rglob("*")) == before


def test_a_search_in_which_all_fail_is_refused(tmp_path, capsys):
    """A supernet of NaN: nothing is handed on to retraining, and the failed ones are counted."""
    run = ["--folder", str(tmp_path / "run")]
    assert main(["train", *run, *TINY]) == 0
    path = tmp_path / "run" / "supernet" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for value in content["model"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    torch.save(content, path)
    capsys.readouterr()
    assert main(["search", *run, "--threads", "1", *SEARCH]) == 2
    error = capsys.readouterr().err
    assert "all 18 candidates of evolution gave NaN or infinity" in error and "18 failed" in error
    assert not (tmp_path / "run" / "search" / "best.json").exists()
