"""``spos-fast export``: the network that was tested, in both formats; mistakes in one line."""

import json

import pytest
import torch

from spos_fast.cli import main
from spos_fast.evaluation import evaluate
from spos_fast.export import load_packed
from spos_fast.job import make_space
from spos_fast.run import resolve

SETTINGS = [
    "--threads", "1", "--no-tensorboard", "--config", "digits",
    "--space.name", "quant_resnet18", "--space.stem", "cifar", "--space.stage_channels", "8,16",
    "--space.stage_repeats", "1,1", "--space.weight_quantizer", "lsq", "--train.steps", "10",
    "--train.batch_size", "32", "--train.log_every", "10", "--search.population", "4", "--search.generations", "1",
    "--search.crossover", "2", "--search.mutation", "2", "--search.top_k", "2", "--search.calibration_images", "64",
    "--retrain.steps", "20", "--retrain.batch_size", "32", "--retrain.log_every", "20", "--retrain.bn_steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run of the mixed-precision space."""
    folder = tmp_path_factory.mktemp("export") / "run"
    assert main(["demo", "--folder", str(folder), *SETTINGS]) == 0
    return folder


def _result(folder, label):
    return json.loads((folder / "retrain" / label / "result.json").read_text())


def _loaded(folder, path):
    """The network of a packed file, and the run's data set."""
    config = resolve(folder, {}, {})
    source = config.data.load(0)
    return load_packed(path, make_space(config, source)), source


@pytest.mark.parametrize("label", ["best", "all_3W3A"])
def test_a_packed_network_is_the_one_that_was_tested(finished, tmp_path, capsys, label):
    """Its accuracy and loss are the recorded ones to the last bit, so its batch norm statistics are those that came
    after training; the file alone says which architecture it is. The run folder stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    out = tmp_path / "net.pt"
    capsys.readouterr()
    assert main(["export", "--folder", str(finished), "--arch", label, "--format", "packed", "--out", str(out)]) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    network, source = _loaded(finished, out)
    score = evaluate(network, source.test_batches(32))
    expected = _result(finished, "evolution" if label == "best" else label)
    assert (score.accuracy, score.loss) == (expected["test_accuracy"], expected["test_loss"])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_an_onnx_file_classifies_as_the_network_does(finished, tmp_path):
    """The same run through onnxruntime: the recorded accuracy, but for images whose class is a matter of rounding."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'spos-fast[export]' onnxruntime")
    import onnxruntime

    run = ["export", "--folder", str(finished)]
    assert main([*run, "--out", str(tmp_path / "net.onnx")]) == 0
    assert main([*run, "--format", "packed", "--out", str(tmp_path / "net.pt")]) == 0
    network, source = _loaded(finished, tmp_path / "net.pt")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    right = images = 0
    for batch, labels in source.test_batches(100):
        logits = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
        right += int((logits.argmax(1) == labels).sum())
        images += len(batch)
        with torch.no_grad():
            ours = network(batch)
        ends = ours.topk(2).values
        decided = ends[:, 0] - ends[:, 1] > 0.05 * ours.std()
        assert torch.equal(logits.argmax(1)[decided], ours.argmax(1)[decided])
    assert abs(right / images - _result(finished, "evolution")["test_accuracy"]) <= 2 / images


def test_mistakes(finished, tmp_path, capsys, monkeypatch):
    """No run, no such network, a folder as file, formats and opsets that are not there: code 2, one line, no file."""
    out = ["--out", str(tmp_path / "net.pt"), "--format", "packed"]
    run = ["export", "--folder", str(finished)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((finished / "config.json").read_text())
    for arguments, says in (
        (["export", *out], "--folder"),
        (["export", "--folder", str(tmp_path / "empty"), *out], "is not a run folder"),
        (["export", "--folder", str(tmp_path / "begun"), *out], "run `spos-fast retrain --folder"),
        ([*run, *out, "--arch", "pareto_0"], "no retrained network 'pareto_0'; it has all_3W3A, evolution, "),
        ([*run, "--format", "packed", "--out", str(tmp_path)], "--out: "),
        ([*run, *out, "--format", "tflite"], "tflite"),
        (run, "--out"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("spos-fast: error: ") and "\n" not in error and says in error, error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*run, "--out", str(tmp_path / "net.onnx")]) == 2
    assert "pip install 'spos-fast[export]'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "begun"}
