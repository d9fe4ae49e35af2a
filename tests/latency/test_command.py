"""``spos-fast latency`` and what a run does with its table."""

import importlib.util
import json
import shutil

import pytest

from spos_fast.cli import main
from spos_fast.latency import commands, timing
from tests.test_cli import RETRAIN, SEARCH, TINY, _refused

SPACE = TINY[3 : TINY.index("--train.steps")]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of the command-line tests' space."""
    path = tmp_path_factory.mktemp("latency") / "table.json"
    assert main(["latency", "--out", str(path), *SPACE, "--rounds", "2", "--warmup", "0", "--networks", "4"]) == 0
    return path


def test_help(capsys):
    """The command explains its options and the settings of the space."""
    with pytest.raises(SystemExit) as caught:
        main(["latency", "--help"])
    assert caught.value.code == 0 and "--space.stage_channels" in capsys.readouterr().out


def test_the_file_says_what_was_measured(table, capsys):
    """Settings, machine, versions, quantiles and the comparison with whole networks."""
    content = json.loads(table.read_text())
    assert content["settings"]["rounds"] == 2 and content["machine"]["device"] and content["versions"]["torch"]
    assert [len(layer["median"]) for layer in content["layers"]] == [4] * 4
    assert len(content["networks"]["measured"]) == 4 and -1 <= content["networks"]["spearman"] <= 1
    assert content["space"]["config"]["stage_channels"] == [16, 32]


def test_a_search_is_limited_and_goes_on(table, tmp_path, capsys):
    """Every candidate has its latency and lies below the limit; half a Pareto search is gone on with, even after the
    table's file is gone, to the same front; a member of it is retrained by its label.
    """
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spos-fast[pareto]'")
    given = tmp_path / "table.json"
    shutil.copy(table, given)
    content = json.loads(table.read_text())
    fixed = content["stem"]["median"] + content["head"]["median"]
    middle = (fixed + sum(sorted(layer["median"])[1] for layer in content["layers"])) / 1e6
    run, flags = tmp_path / "run", ["--threads", "1", "--no-tensorboard"]
    search = [*SEARCH, "--search.latency_table", str(given), "--search.latency_ms_max", f"{middle:.6f}"]
    objectives = ["--search.objectives", "accuracy,latency_ms,macs"]
    assert main(["train", "--folder", str(run), *TINY]) == 0
    assert main(["search", "--folder", str(run), *flags, *search, *objectives]) == 0
    rows = [json.loads(line) for line in (run / "search" / "candidates.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"evolution", "random_search", "pareto"}
    assert all(0 < row["latency_ms"] <= middle for row in rows)
    front = (run / "search" / "front.json").read_bytes()
    best = json.loads((run / "search" / "best.json").read_text())["evolution"]
    assert best["latency_ms"] <= middle and set(json.loads(front)[0]) >= {"genes", "macs", "latency_ms"}

    for name in ("front.json", "pareto.json", "best.json"):
        (run / "search" / name).unlink()
    path = run / "search" / "candidates.jsonl"
    pareto = [line for line in path.read_text().splitlines() if '"pareto"' in line]
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[: len(rows) - len(pareto) // 2]))
    given.unlink()
    assert main(["search", "--folder", str(run), *flags]) == 0
    assert (run / "search" / "front.json").read_bytes() == front
    assert main(["retrain", "--folder", str(run), *flags, *RETRAIN, "--arch", "pareto_0"]) == 0
    result = json.loads((run / "retrain" / "pareto_0" / "result.json").read_text())
    assert result["architecture"] == json.loads(front)[0]["genes"] and result["latency_ms"] <= middle
    report = (run / "report.html").read_text()
    assert "Accuracy against latency" in report and "pareto_0" in report
    _refused(capsys, ["retrain", "--folder", str(run), *flags, "--arch", "pareto_99"], "pareto_0")


def test_a_table_is_kept_with_the_first_candidate(table, tmp_path):
    """A copy of a search that scored nothing gives way to the table that is given now; a copy that candidates rest on
    stays.
    """
    run = tmp_path / "run"
    search = ["search", "--folder", str(run), "--threads", "1", "--no-tensorboard", *SEARCH]
    assert main(["train", "--folder", str(run), *TINY]) == 0
    old = json.loads(table.read_text())
    old["stem"] = {name: 10**9 for name in old["stem"]}
    (run / "search").mkdir()
    (run / "search" / "latency.json").write_text(json.dumps(old))
    assert main([*search, "--search.latency_table", str(table)]) == 0
    assert json.loads((run / "search" / "latency.json").read_text()) == json.loads(table.read_text())
    rows = [json.loads(line) for line in (run / "search" / "candidates.jsonl").read_text().splitlines()]
    assert max(row["latency_ms"] for row in rows) < 1000
    (run / "search" / "latency.json").write_text(json.dumps(old))
    assert main(search) == 0
    assert json.loads((run / "search" / "latency.json").read_text()) == old


def test_mistakes_are_refused_before_anything_is_measured(table, tmp_path, capsys, monkeypatch):
    """Files that cannot be written or would be lost, and settings that measure nothing."""

    def measured(*_, **__):
        raise AssertionError("something was measured")

    monkeypatch.setattr(commands, "measure", measured)
    (tmp_path / "photo.json").write_text('{"a": 1}')
    (tmp_path / "file").write_text("")
    for arguments, says in (
        (["--out", str(tmp_path / "photo.json"), *SPACE], "is no latency table"),
        (["--out", str(tmp_path / "file" / "t.json"), *SPACE], "could not be written"),
        (["--out", str(tmp_path), *SPACE], "is no regular file"),
        (["--out", "/proc/t.json", *SPACE], "could not be written"),
        (["--out", str(tmp_path / "t.json")], "--config"),
        (["--out", str(tmp_path / "t.json"), "--seed", "1"], "--config"),
        (["--out", str(tmp_path / ("t" * 300)), *SPACE], "could not be written"),
        (["--out", str(tmp_path / ("t" * 250)), *SPACE], "could not be written"),
        (["--out", str(tmp_path / "t.json"), *SPACE, "--threads", "100000000000"], "threads"),
        (["--out", str(tmp_path / "t.json"), *SPACE, "--rounds", "0"], "rounds"),
        (["--out", str(tmp_path / "t.json"), *SPACE, "--networks", "1"], "--networks"),
        (["--out", str(tmp_path / "t.json"), *SPACE, "--dtype", "int8"], "dtype"),
        (["--out", str(tmp_path / "t.json"), *SPACE, "--threads", "-1"], "threads"),
        (["--out", str(tmp_path / "t.json"), *SPACE, "--device", "cuda:77"], "cuda:77"),
        (["--out", str(tmp_path / "t.json"), "--folder", str(tmp_path / "no")], "not a run folder"),
        ([*SPACE], "--out"),
    ):
        _refused(capsys, ["latency", *arguments], says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photo.json"]


def test_ctrl_c_leaves_no_file(tmp_path, capsys, monkeypatch):
    """In the middle of the rounds: code 130, and the folder is as it was; so is the table that was there."""
    calls = iter(range(20))
    chain = timing.Clock.chain

    def interrupted(self, parts, x):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return chain(self, parts, x)

    monkeypatch.setattr(timing.Clock, "chain", interrupted)
    assert main(["latency", "--out", str(tmp_path / "t.json"), *SPACE]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_searches_with_a_wrong_table_are_refused(table, tmp_path, capsys):
    """Of another space, absent, limits without a table, limits that nothing meets, negative ones, wrong objectives."""
    run = ["demo", "--folder", str(tmp_path / "run"), *TINY, *SEARCH]
    given = ["--search.latency_table", str(table)]
    for arguments, says in (
        ([*given, "--space.head_channels", "64"], "head_channels 32, and the space has 64"),
        (["--search.latency_table", str(tmp_path / "no.json")], "no.json"),
        (["--search.latency_ms_max", "5"], "search.latency_table: a limit or objective of latency needs one"),
        (["--search.objectives", "accuracy,latency_ms"], "search.latency_table: a limit or objective"),
        ([*given, "--search.latency_ms_max", "1e-6"], "search.latency_ms: no architecture has at most 1e-06"),
        ([*given, "--search.latency_ms_max", "-3"], "search.latency_ms_max: got -3"),
        ([*given, "--search.latency_ms_max", "1", "--search.latency_ms_min", "2"], "latency_ms: the range 2 to 1"),
        (["--search.objectives", "accuracy"], "search.objectives: got accuracy"),
        (["--search.objectives", "accuracy,speed"], "search.objectives: got 'speed'"),
        (["--search.objectives", "accuracy,macs,macs"], "search.objectives: got accuracy, macs, macs"),
    ):
        _refused(capsys, [*run, *arguments], says)
        assert not (tmp_path / "run").exists(), arguments


def test_without_optuna_a_search_for_several_says_so(tmp_path, capsys, monkeypatch):
    """Before a folder is made."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    run = ["demo", "--folder", str(tmp_path / "run"), *TINY, *SEARCH, "--search.objectives", "accuracy,macs"]
    _refused(capsys, run, "search.objectives: a search for several needs Optuna")
    assert not (tmp_path / "run").exists()


def test_another_machine_is_a_warning(table, tmp_path, capsys):
    """One line on standard error; the search goes on."""
    content = json.loads(table.read_text())
    content["machine"]["device"] = "a phone"
    (tmp_path / "t.json").write_text(json.dumps(content))
    space = 'space = { init = "pytorch", stem_stride = 1 }'
    settings = f'data.name = "digits"\n{space}\nsearch.latency_table = "{tmp_path / "t.json"}"\n'
    (tmp_path / "settings.toml").write_text(settings)
    run = ["train", "--folder", str(tmp_path / "run"), *TINY[:3], "--config", str(tmp_path / "settings.toml")]
    assert main([*run, *SPACE[2:], "--train.steps", "2", "--train.batch_size", "32"]) == 0
    assert "spos-fast: warning: latency table: it was measured with device 'a phone'" in capsys.readouterr().err
