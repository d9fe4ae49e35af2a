"""Rank consistency on tiny runs: which architectures, which ways, against which rows; killed, resumed, extended."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from spos_fast import InputError, consistency
from spos_fast.analysis.ranks import rank_statistics
from spos_fast.cli import main
from spos_fast.config import ConsistencyConfig
from spos_fast.console import Console
from spos_fast.nasbench import NASBench201
from spos_fast.scores import Score
from spos_fast.spaces import NASBench201 as Cells
from spos_fast.spaces import NASBenchMacro as Macro

TINY = [
    "--threads", "1", "--no-tensorboard", "--device", "cpu", "--data.name", "digits",
    "--train.steps", "12", "--train.batch_size", "32", "--train.log_every", "3",
]  # fmt: skip
MACRO = ["--space.name", "nasbench_macro", "--space.stem_channels", "2", "--space.head_channels", "8"]
# Not the table's order of operations.
OPS = ("skip_connect", "nor_conv_3x3", "none")
CELLS = [
    "--space.name",
    "nasbench201",
    "--space.ops",
    ",".join(OPS),
    "--space.stem_channels",
    "2",
    "--space.cells",
    "1",
]


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """The bootstrap is tested where it is; here it would be most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency, "rank_statistics", functools.partial(rank_statistics, resamples=5))
        yield


@pytest.fixture(scope="module")
def macro_table(tmp_path_factory) -> Path:
    """Made-up accuracies of all 6,561 networks in the official layout."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("table") / "macro.json"
    genes = np.stack(np.unravel_index(np.arange(3**8), (3,) * 8), axis=1)
    rows = {
        "".join(map(str, row)): {
            "test_acc": [70.0 + sum(row) + noise for noise in rng.normal(size=3)],
            "params": int(100 + sum(row)),
            "flops": int(50 + row[0]),
        }
        for row in genes.tolist()
    }
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, macro_table) -> Path:
    """A finished tiny run with everything."""
    folder = tmp_path_factory.mktemp("consistency") / "run"
    assert _run(folder, macro_table, "--ablation", "ema,cumulative,none", "--calibration-images", "64,32",
                "--train.keep_checkpoints", "1") == 0  # fmt: skip
    return folder


def _run(folder: Path, table: Path, *flags: str, space=MACRO) -> int:
    arguments = ["--table", str(table), "--dataset", "cifar10", "--n", "12", "--calibration-images", "64"]
    return main(["consistency", "--folder", str(folder), *TINY, *space, *arguments, *flags])


def _scores(folder: Path) -> dict[str, list[dict]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "consistency").glob("*.jsonl"))
    }


def test_draws_are_distinct_nested_and_in_the_order_of_genes():
    """A greater n holds a smaller one's architectures, so that their scores are used again; all is all."""
    space = Macro()
    few, more = ({arch.genes for arch in consistency.draw(space, n, 1)} for n in ("20", "60"))
    assert len(few) == 20 and len(more) == 60 and few < more
    drawn = [arch.genes for arch in consistency.draw(space, "60", 1)]
    assert drawn == sorted(drawn) and drawn != [arch.genes for arch in consistency.draw(space, "60", 2)]
    reduced = Cells(OPS, channels=2, cells=1)
    everything = consistency.draw(reduced, "all", 0)
    assert len(everything) == len(set(everything)) == 3**6 == reduced.size
    assert [arch.genes for arch in consistency.draw(reduced, str(reduced.size), 5)] == [a.genes for a in everything]


def test_ways_of_scoring():
    """Every mode once; other numbers of images and earlier states in the first mode that takes images."""
    config = ConsistencyConfig(ablation=("none", "ema", "pooled"), calibration_images=(64, 16), calibration_batch=8)
    names = [way.name for way in consistency.ways(config, (100, 200))]
    assert names == [
        "none",
        "ema_64_in_8",
        "pooled_64_in_8",
        "ema_16_in_8",
        "ema_64_in_8_step_100",
        "ema_64_in_8_step_200",
    ]
    bare = ConsistencyConfig(ablation=("none",), calibration_images=(64, 16))
    assert [way.name for way in consistency.ways(bare, (100,))] == ["none", "none_step_100"]
    assert len(consistency.ways(ConsistencyConfig(checkpoints=False), (100,))) == 2


def test_a_finished_run_has_everything(finished):
    """A file of scores a way, all of the same architectures; all statistics beside the reference lines; the report."""
    scores = _scores(finished)
    assert set(scores) == {
        "ema_64_in_128", "cumulative_64_in_128", "none", "ema_32_in_128", "ema_64_in_128_step_6",
    }  # fmt: skip
    genes = [row["genes"] for row in scores["none"]]
    assert len(genes) == 12 and all([row["genes"] for row in rows] == genes for rows in scores.values())
    assert len({tuple(row["loss"] for row in rows) for rows in scores.values()}) == 5
    result = json.loads((finished / "consistency" / "result.json").read_text())
    assert (result["space"], result["dataset"], result["size"], result["n"]) == ("nasbench_macro", "cifar10", 6561, 12)
    assert [row["name"] for row in result["scored"]] == [
        "ema_64_in_128", "cumulative_64_in_128", "none", "ema_32_in_128", "ema_64_in_128_step_6",
    ]  # fmt: skip
    names = [row["name"] for row in result["references"]]
    assert names[:3] == ["random order", "parameters", "FLOPs"] and names[3].startswith("ceiling")
    assert result["references"][0]["tau"] == 0 and result["references"][1]["partial_tau"] is None
    assert json.loads((finished / "config.json").read_text())["consistency"]["n"] == "12"
    assert not (finished / "search").exists()


def test_statistics_are_those_of_the_recorded_scores_and_the_table(finished, macro_table):
    """SciPy on what is on record: accuracies of every way against the mean of the trainings, parameters and FLOPs
    against the same, and for the ceiling one training against the mean of the other two."""
    table = json.loads(macro_table.read_text())
    result = json.loads((finished / "consistency" / "result.json").read_text())
    scores = _scores(finished)
    rows = [table["".join(map(str, row["genes"]))] for row in scores["none"]]
    true = np.mean([row["test_acc"] for row in rows], axis=1)
    params, flops = ([row[name] for row in rows] for name in ("params", "flops"))

    def tau(one, other):
        return stats.kendalltau(one, other).statistic

    for row in result["scored"]:
        accuracy = [score["accuracy"] for score in scores[row["name"]]]
        if len(set(accuracy)) == 1:
            continue
        assert row["tau"] == pytest.approx(tau(accuracy, true))
        assert row["spearman"] == pytest.approx(stats.spearmanr(accuracy, true).statistic)
        with_params = tau(accuracy, params), tau(true, params)
        partial = (tau(accuracy, true) - with_params[0] * with_params[1]) / np.sqrt(
            (1 - with_params[0] ** 2) * (1 - with_params[1] ** 2)
        )
        assert row["partial_tau"] == pytest.approx(partial)
    _, of_params, of_flops, ceiling = result["references"]
    assert of_params["tau"] == pytest.approx(tau(params, true)) and of_flops["tau"] == pytest.approx(tau(flops, true))
    trainings = np.array([row["test_acc"] for row in rows])
    assert ceiling["tau"] == pytest.approx(tau(trainings[:, 0], trainings[:, 1:].mean(axis=1)))


def test_the_report_is_one_page_of_its_own(finished):
    """All sections, one scatter plot a mode, no script and nothing to load, no id twice."""
    text = (finished / "report_consistency.html").read_text()
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")
    for wanted in (
        "Rank consistency on nasbench_macro", "no recalibration", "cumulative, 64 images", "Over the training",
        "Number of calibration images", "Predicted against true", "random order", "step 6",
    ):  # fmt: skip
        assert wanted in text, wanted
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and text.count("<svg role") == 6
    assert "spos-fast consistency --folder runs/again" in text and "--consistency.n 12" in text


def test_a_second_run_scores_nothing_and_a_larger_one_only_what_is_new(finished, macro_table, tmp_path, monkeypatch):
    """What is on record is used: for the same command, for a way more, and for more architectures."""
    run, asked = tmp_path / "run", []
    shutil.copytree(finished, run)
    original = consistency.Evaluator.__call__
    monkeypatch.setattr(
        consistency.Evaluator, "__call__", lambda self, archs: asked.append(len(archs)) or original(self, archs)
    )
    before = _scores(run)
    flags = ["--ablation", "ema,cumulative,none", "--calibration-images", "64,32", "--checkpoints", "true"]
    result = json.loads((run / "consistency" / "result.json").read_text())
    assert _run(run, macro_table, *flags) == 0
    assert not asked and _scores(run) == before
    assert json.loads((run / "consistency" / "result.json").read_text()) == result
    assert _run(run, macro_table, "--ablation", "ema,pooled", "--checkpoints", "false") == 0
    assert asked == [12] and len(_scores(run)) == 6
    asked.clear()
    assert _run(run, macro_table, "--ablation", "none", "--checkpoints", "false", "--n", "15") == 0
    assert asked == [3]
    known = {tuple(row["genes"]): row["loss"] for row in before["none"]}
    grown = {tuple(row["genes"]): row["loss"] for row in _scores(run)["none"][12:]}
    assert len(grown) == 15 and known.items() <= grown.items()
    assert _run(run, macro_table, *flags) == 0  # the smaller number again, from the same records
    assert asked == [3] and json.loads((run / "consistency" / "result.json").read_text()) == result


def test_an_interrupted_run_goes_on_to_the_same_scores(finished, macro_table, tmp_path, monkeypatch):
    """Ctrl-C in training and between scores: exit code 130, every score so far on record, the same in the end."""
    monkeypatch.setattr(consistency, "_AT_ONCE", 5)
    original, calls = consistency.Evaluator.__call__, []

    def stop(self, archs):
        calls.append(len(archs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, archs)

    flags = ["--ablation", "ema", "--calibration-images", "64", "--train.keep_checkpoints", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(consistency.Evaluator, "__call__", stop)
        assert _run(tmp_path / "run", macro_table, *flags) == 130
    assert [len(rows) for rows in _scores(tmp_path / "run").values()] == [5]
    assert _run(tmp_path / "run", macro_table, *flags) == 0
    expected = {name: _scores(finished)[name] for name in ("ema_64_in_128", "ema_64_in_128_step_6")}
    assert _scores(tmp_path / "run") == expected


def test_the_time_that_is_left_is_told_when_a_call_has_been_scored(capsys, monkeypatch):
    """Candidates of one call come at once; from the first of them the time left would be too long by their number."""
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    console = Console()
    console.resumed("none_n100", 0, 100)
    monkeypatch.setattr("time.monotonic", lambda: 130.0)
    score = Score(0.5, 1.0, 10)
    for number in range(1, 51):
        console.candidate("none_n100", number, 100, score, score)
    console.generation("none_n100", 50, 100)
    assert capsys.readouterr().err == "none_n100: 50 of 100, accuracy 50.00%, best 50.00%, 30 s left\n"


def test_a_kept_state_that_is_missing_is_told(finished, macro_table, tmp_path, capsys):
    """A warning, a sentence of the report and an entry of the result name its step; nobody who left states out is
    warned."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flags = ["--ablation", "ema", "--calibration-images", "64"]
    assert _run(run, macro_table, *flags) == 0
    assert "warning" not in capsys.readouterr().err
    assert "are missing" not in (run / "report_consistency.html").read_text()
    (run / "supernet" / "checkpoint_at_000000006.pt").unlink()
    assert _run(run, macro_table, *flags) == 0
    says = "states that training kept are missing and not scored: of step 6"
    assert capsys.readouterr().err == f"spos-fast: warning: {says}\n"
    assert says in (run / "report_consistency.html").read_text().replace("States", "states")
    assert json.loads((run / "consistency" / "result.json").read_text())["missing"] == [6]
    assert _run(run, macro_table, *flags, "--checkpoints", "false") == 0
    assert "warning" not in capsys.readouterr().err


def test_scores_meet_the_rows_of_their_own_cells(tmp_path):
    """A reduced space with operations in another order, against a table made of its own scores: tau is 1."""
    rows = np.stack(np.unravel_index(np.arange(5**6), (5,) * 6), axis=1).astype(np.uint8)
    columns = {"ops": rows, "op_names": np.array(NASBench201.OPS), "params": np.arange(5**6), "flops": np.arange(5**6)}
    accuracies = np.random.default_rng(0).uniform(10, 90, 5**6)
    np.savez(tmp_path / "table.npz", **columns, c10_test_200=accuracies)
    flags = ["--ablation", "cumulative", "--calibration-images", "64", "--n", "40"]
    folder = tmp_path / "run"
    assert _run(folder, tmp_path / "table.npz", *flags, space=CELLS) == 0
    for row in _scores(folder)["cumulative_64_in_128"]:
        own = [NASBench201.OPS.index(OPS[gene]) for gene in row["genes"]]
        accuracies[np.ravel_multi_index(own, (5,) * 6)] = 100 * row["accuracy"]
    np.savez(tmp_path / "table.npz", **columns, c10_test_200=accuracies)
    assert _run(folder, tmp_path / "table.npz", *flags, space=CELLS) == 0
    (scored,) = json.loads((folder / "consistency" / "result.json").read_text())["scored"]
    assert scored["tau"] == pytest.approx(1) and scored["top"][0]["regret"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--n", "1"], "consistency.n"),
        (["--n", "7000"], "6,561 architectures"),
        (["--ablation", "cumulative,mean"], "consistency.ablation: got 'mean'"),
        (["--ablation", "none,none"], "each once"),
        (["--calibration-images", "1"], "calibration_images"),
        (["--calibration-images", "64,100000"], "the training part has"),
        (["--dataset", "cifar100"], "the table has cifar10"),
        (["--dataset", ""], "the table has cifar10"),  # digits are no data set of the table
        (["--table", "nowhere.json"], "nowhere.json could not be read"),
        (["--table", ""], "give the file"),
        (["--space.stage_repeats", "2,3"], "space.stage_repeats: got (2, 3)"),
        (["--space.stage_repeats", "3,3,2"], "space.stage_repeats: got (3, 3, 2)"),
        (["--train.keep_checkpoints", "-1"], "train.keep_checkpoints"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(macro_table, tmp_path, capsys, flags, says):
    """One line, exit code 2, no folder."""
    assert _run(tmp_path / "run", macro_table, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error and not (tmp_path / "run").exists()


def test_a_space_without_a_table_is_refused(macro_table, tmp_path, capsys):
    """ShuffleNetV2 has no ground truth."""
    assert _run(tmp_path / "run", macro_table, space=["--space.name", "shufflenet_v2"]) == 2
    assert "no table of shufflenet_v2" in capsys.readouterr().err


def test_a_damaged_record_is_named(finished, macro_table, tmp_path, capsys):
    """Records of something else are never taken for scores."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "consistency" / "none.jsonl"
    path.write_text('{"genes": [1]}\n')
    assert _run(tmp_path / "run", macro_table, "--ablation", "none") == 2
    assert f"{path}: line 1 is no scored candidate" in capsys.readouterr().err


def test_settings_that_cannot_be_are_refused_in_files_too():
    """The checks are the dataclass', whoever makes it."""
    with pytest.raises(InputError, match="batch_size"):
        ConsistencyConfig(batch_size=0)
