"""Timing, roofs, the gate and the tables: what makes a figure one that can be believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import __main__ as command
from bench import cost, measure, registry, run, table, tune, verify
from bench.environment import ROOT, slug
from bench.registry import OURS, Case

CPU = torch.device("cpu")
ROOF = {"copy_bytes_per_second": 1e10, "matrix_flops_per_second": {"float32": 1e11}}


wait_for_quiet = measure.wait_for_quiet


class Clock:
    """The time that bench sees: what passes, and what toys pretend to take (a sleep is late on a busy machine)."""

    pretended = 0.0
    sleep = staticmethod(time.sleep)

    def perf_counter(self):
        return time.perf_counter() + Clock.pretended

    def monotonic(self):
        return time.monotonic() + Clock.pretended


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Toys take no time, and ask for no quiet machine: waiting for one would cost up to three seconds each."""
    monkeypatch.setattr(measure, "time", Clock())
    monkeypatch.setattr(run, "time", measure.time)
    monkeypatch.setattr(measure, "wait_for_quiet", lambda: None)


def toy(**changes):
    """A case whose peer takes twice as long as ours."""

    def sleeper(seconds, value=1.0):
        def bind(given):
            def once():
                Clock.pretended += seconds
                return given * value

            return once

        return bind

    settings = dict(
        op="toy",
        shape="4",
        dtype="float32",
        device="cpu",
        bytes=1000,
        flops=0,
        inputs=lambda where: torch.ones(4),
        contenders={OURS: sleeper(0.002), "slow": sleeper(0.004), "slower": sleeper(0.006)},
        tests=("tests/a.py",),
        items=4,
        unit="things",
        headline=True,
    )
    return Case(**settings | changes), sleeper


def measured(verdicts=None, **changes):
    case, _ = toy(**changes)
    given = {"tests/a.py": "green"} if verdicts is None else verdicts
    return run.measure_case(case, CPU, ROOF, given, compiled=False, seconds=0.1)


def record_of(*cases):
    environment = {
        "device": "Test CPU (2 cores)",
        "device_type": "cpu",
        "threads": 2,
        "torch": "2",
        "commit": "abc",
        "uncommitted_changes": False,
    }
    return {"date": "2026-01-02", "environment": environment, "roofs": ROOF, "cases": list(cases), "left_out": []}


def test_contenders_take_turns():
    """Every round has each contender once, after a run of its own to warm up; the order is another each time."""
    order = []
    runs = {name: (lambda name=name: (order.append(name), time.sleep(0.002))) for name in "ABC"}
    samples = measure.interleaved(runs, CPU, seconds=0.01, least=8, most=8)
    assert [len(values) for values in samples.values()] == [8, 8, 8]
    timed = order[-48:]
    assert timed[::2] == timed[1::2]
    rounds = ["".join(timed[at : at + 6 : 2]) for at in range(0, 48, 6)]
    assert all(sorted(names) == ["A", "B", "C"] for names in rounds) and len(set(rounds)) > 2


def test_the_same_function_twice_is_as_fast_as_itself():
    """The A/A check: what separates two equal contenders is noise."""
    x = torch.randn(64, 64, 28, 28)
    samples = measure.interleaved(
        {name: lambda: x.square().sum() for name in "AB"}, CPU, seconds=0.5, least=9, most=200
    )
    assert 0.7 < measure.ratio(samples["A"], samples["B"])["median"] < 1.4


def test_short_runs_are_repeated_until_the_clock_can_see_them():
    """A sample of a microsecond's work holds many runs, and its time is that of one."""
    calls = []
    samples = measure.interleaved({"quick": lambda: calls.append(1)}, CPU, seconds=0.05, least=3, most=5)
    assert len(calls) > 1000
    assert max(samples["quick"]) < 1e-4


@pytest.mark.parametrize(("shares", "looks"), [([0.0], 1), ([0.9, 0.5, 0.05, 0.9], 3), ([None], 1), ([0.9] * 99, 12)])
def test_waiting_ends_with_the_other_work_or_after_three_seconds(shares, looks, monkeypatch):
    """A look every quarter of a second, until the others take less than a tenth of a core; 12 looks at most."""
    left, clock = list(shares), [0.0]
    monkeypatch.setattr(measure.OtherWork, "share", lambda self: left.pop(0))
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    wait_for_quiet()
    assert len(shares) - len(left) == looks


def test_ratios_and_spread():
    """The ratio is that of the medians shown beside it; its spread is of the rounds, where a slow round hits both."""
    ours, theirs = [1.0, 1.0, 10.0, 1.0, 1.0], [2.0, 2.0, 20.0, 2.0, 2.2]
    found = measure.ratio(theirs, ours)
    assert found["median"] == 2.0 and found["p20"] == 2.0 and 2.0 <= found["p80"] < 2.1
    spread = measure.spread([3.0, 1.0, 2.0])
    assert spread == pytest.approx({"median": 2.0, "p20": 1.4, "p80": 2.6, "samples": 3})
    mirrored = measure.spread([-3.0, -1.0, -2.0])
    assert (mirrored["p20"], mirrored["p80"]) == pytest.approx((-2.6, -1.4))


def test_floor_is_the_greater_of_bytes_and_flops():
    """By hand; no flops roof for a dtype without a matrix rate."""
    assert measure.floor_seconds(10**9, 10**9, "float32", ROOF) == (0.1, "bytes")
    assert measure.floor_seconds(10**9, 10**11, "float32", ROOF) == (1.0, "flops")
    assert measure.floor_seconds(0, 10**11, "uint8", ROOF) == (0.0, "")


def test_roofs_rise_to_what_was_reached():
    """A contender faster than the product that was timed is the roof, and all shares are counted anew."""

    def case(flops, ours, peer):
        spread = {"ours": {"median": ours}, "peer": {"median": peer}}
        return {"bytes": 0, "flops": flops, "dtype": "float32", "seconds": spread, "ours": "ours", "rates": {}}

    roofs = {"copy_bytes_per_second": 1e9, "matrix_flops_per_second": {"float32": 1e9}}
    record = {"roofs": roofs, "cases": [case(4e9, 4.0, 2.0), case(1e9, 1.0, 1.0)]}
    run.raise_roofs(record)
    assert roofs["matrix_flops_per_second"]["float32"] == 2e9
    assert [(c["floor_seconds"], c["rates"]["percent_of_roof"]) for c in record["cases"]] == [(2.0, 50.0), (0.5, 50.0)]


def test_roofs_are_of_this_machine():
    """More than a floppy disk, less than a data centre."""
    roof = measure.roofs(CPU)
    assert 1e8 < roof["copy_bytes_per_second"] < 1e13
    assert 1e8 < roof["matrix_flops_per_second"]["float32"] < 1e14


def test_a_green_case_has_a_ratio_to_every_peer_and_names_the_best():
    """The ratio that counts is the one to the fastest peer."""
    case = measured()
    assert case["verdict"] == "green" and case["best_peer"] == "slow"
    assert 1.3 < case["ratios"]["slow"]["median"] < 2.5 < case["ratios"]["slower"]["median"] < 4
    assert case["rates"]["percent_of_roof"] == pytest.approx(100 * 1e-7 / case["seconds"][OURS]["median"])
    shown = table.markdown(record_of(case), headline=True)
    assert f"{case['ratios']['slow']['median']:.2f}x" in shown and "| slow |" in shown


@pytest.mark.parametrize(
    ("changes", "verdicts", "said"),
    [
        ({}, {"tests/a.py": "red"}, "red: tests/a.py"),
        ({}, {}, "not run: tests/a.py"),
        ({"tests": ()}, {}, "names no test"),
        ("wrong peer", None, "slow differs from ours by 1.0e-01"),
    ],
)
def test_no_ratio_without_correctness(changes, verdicts, said):
    """A red test, tests that were not run, no tests, or a peer that computes something else: times, but no ratio."""
    if changes == "wrong peer":
        _, sleeper = toy()
        changes = {"contenders": {OURS: sleeper(0.002), "slow": sleeper(0.004, 1.1)}}
    case = measured(verdicts, **changes)
    assert said in case["verdict"] and "ratios" not in case and case["seconds"][OURS]["median"] > 0
    record = record_of(case)
    for text in (table.line(case), table.full(record), table.markdown(record, headline=True)):
        assert said in text or "not shown" in text
        assert "x (" not in text
    assert not table.summaries([case, case])


def test_a_peer_that_fails_is_named_and_the_others_go_on():
    """One contender raises; the rest is measured."""

    def broken(given):
        raise RuntimeError("no such kernel\nsecond line")

    _, sleeper = toy()
    case = measured(contenders={OURS: sleeper(0.002), "slow": sleeper(0.004), "broken": broken})
    assert case["failed"] == {"broken": "RuntimeError: no such kernel"} and case["best_peer"] == "slow"
    assert "broken" in table.full(record_of(case))


@pytest.mark.parametrize("broken", ["ours", "peers", "inputs", "while timing"])
def test_whatever_breaks_costs_one_case(broken, monkeypatch):
    """A kernel of ours that raises, no peer that runs, inputs that cannot be made: red, and the next case goes on."""
    monkeypatch.setattr(measure, "roofs", lambda device: ROOF)
    _, sleeper = toy()

    def fails(given):
        raise RuntimeError("out of memory")

    calls = []

    def fails_later(given):
        def once():
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("out of memory")
            return given

        return once

    changes = {
        "ours": {"contenders": {OURS: fails, "slow": sleeper(0.002)}},
        "peers": {"contenders": {OURS: sleeper(0.002), "slow": fails}},
        "inputs": {"inputs": fails},
        "while timing": {"contenders": {OURS: sleeper(0.002), "slow": fails_later}},
    }[broken]
    cases = [toy(shape="bad", **changes)[0], toy(shape="good")[0]]
    lines = []
    record = run.run(
        cases,
        CPU,
        {"tests/a.py": "green"},
        compiled=False,
        seconds=0.01,
        on_case=lambda record, case: lines.append(table.line(case)),
    )
    assert "x (" in lines[1] and ("no peer" in lines[0] if broken == "peers" else "not shown (red" in lines[0])
    assert "out of memory" in table.full(record)
    assert table.markdown(record, headline=True)


def test_disturbed_cases_are_marked_and_not_averaged():
    """Other work on the machine: the row carries a mark, the means leave it out."""
    quiet, busy = measured(), measured(shape="5")
    quiet["other_work"], busy["other_work"] = 0.0, 0.9
    shown = table.markdown(record_of(quiet, busy), headline=True)
    assert "| toy 5 float32 † |" in shown and "| toy 4 float32 |" in shown and "† other processes" in shown
    assert not table.summaries([quiet, busy]) and table.summaries([quiet, quiet])


def test_reports_older_than_the_code_are_refused(tmp_path):
    """Yesterday's green says nothing about today's code."""
    report = tmp_path / "junit.xml"
    report.write_text("<testsuites/>")
    assert verify.older_than_code(report) is None
    os.utime(report, (1, 1))
    assert verify.older_than_code(report) is not None


def test_pytest_benchmark_runs_the_cases(tmp_path):
    """pytest bench/ times every contender of a case in one group, and writes and compares its JSON."""
    command = [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider"]
    storage = [f"--benchmark-storage={tmp_path}", "--benchmark-max-time=0.1", "--benchmark-min-rounds=2"]
    both = ["-k", "hash and one and by", "--benchmark-autosave", f"--benchmark-json={tmp_path / 'out.json'}"]
    # Ours alone, for the peer's gate runs the case's tests.
    ours = ["-k", "hash and one and by and not plain", "--benchmark-compare"]
    # pytest-benchmark measures nothing in a process of pytest-xdist, nor below one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    said = []
    for extra, passed in ((both, 2), (ours, 1)):
        given = [*command, *storage, *extra]
        done = subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and f"{passed} passed" in done.stdout, done.stdout[-3000:]
        said.append(done.stdout)
    assert "plain Python" in said[0] and "(NOW)" in said[1]
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert len(found) == 2 and len({benchmark["group"] for benchmark in found}) == 1


def test_ops_to_come_show_their_peers_only():
    """No kernel of ours: no ratio, and the README leaves the row out."""
    _, sleeper = toy()
    case = measured(contenders={"slow": sleeper(0.004)}, tests=())
    assert case["verdict"] == run.NO_KERNEL and case["best_peer"] == "slow"
    assert "| toy" not in table.markdown(record_of(case), headline=True)
    assert run.NO_KERNEL in table.markdown(record_of(case), headline=False)


def test_a_case_without_a_peer_has_no_ratio():
    """What no peer can do in reasonable time is shown as such."""
    _, sleeper = toy()
    case = measured(contenders={OURS: sleeper(0.002)})
    assert case["verdict"] == "green" and table.speedup(case) == "no peer"
    assert "no peer" in table.line(case) and "no peer" in table.markdown(record_of(case), headline=True)


def test_a_budget_leaves_cases_out_by_name(tmp_path, monkeypatch):
    """Nothing is dropped silently; the file holds what was measured."""
    monkeypatch.setattr(measure, "roofs", lambda device: ROOF)
    cases = [toy(shape=str(n))[0] for n in range(3)]
    seen = []

    def on_case(record, case):
        seen.append(case["name"])
        Clock.pretended += 100

    record = run.run(cases, CPU, {}, compiled=False, seconds=0.01, budget=60, on_case=on_case)
    assert seen == ["toy 0 float32"] and record["left_out"] == ["toy 1 float32", "toy 2 float32"]
    partial = run.write(record, tmp_path, complete=False)
    assert partial.name.endswith(".partial.json") and not table.newest(tmp_path)
    file = run.write(record, tmp_path, complete=True)
    assert not partial.exists()
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert file.name == f"{slug(record['environment']['device'])}-{record['date']}.json"
    assert {"torch", "commit", "threads", "device", "python"} <= set(record["environment"])


def test_with_a_budget_compilers_come_last(monkeypatch):
    """Every case is first measured without torch.compile, then those with such peers again."""
    monkeypatch.setattr(measure, "roofs", lambda device: ROOF)
    _, sleeper = toy()
    cases = [toy(shape=str(n), contenders={OURS: sleeper(0.001), "compile": sleeper(0.001)})[0] for n in range(2)]
    peers = []
    record = run.run(
        cases,
        CPU,
        {},
        compiled=True,
        seconds=0.01,
        budget=60,
        on_case=lambda record, case: peers.append(len(case["seconds"])),
    )
    assert peers == [1, 1, 2, 2] and len(record["cases"]) == 2
    assert all(case["compile_peers"] for case in record["cases"])


def test_verdicts_come_from_pytests_report(tmp_path):
    """Green, red, skipped, an error while collecting, and a target that never ran."""
    (tmp_path / "test_ok.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (tmp_path / "test_bad.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    (tmp_path / "test_skip.py").write_text("import pytest\ndef test_a(): pytest.skip('no')\n")
    (tmp_path / "test_broken.py").write_text("import nothing_like_it\n")
    report = tmp_path / "junit.xml"
    arguments = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={tmp_path}"]
    arguments += [f"--junit-xml={report}", "."]
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, check=False)
    targets = ["test_ok.py", "test_bad.py", "test_skip.py", "test_broken.py", "test_bad.py::test_a", "test_none.py"]
    assert verify.verdicts([report], targets) == {
        "test_ok.py": "green",
        "test_bad.py": "red",
        "test_skip.py": "not run",
        "test_broken.py": "red",
        "test_bad.py::test_a": "green",
        "test_none.py": "not run",
    }
    assert verify.verdicts([tmp_path / "missing.xml"], ["test_ok.py"]) == {"test_ok.py": "not run"}


def test_the_gate_runs_the_tests_itself():
    """A real target of this repository."""
    target = "tests/test_architecture.py"
    assert verify.run_tests([target, target]) == {target: "green"}


def test_command_measures_prints_and_writes(tmp_path, capsys, monkeypatch):
    """One small real case through the command; --only writes nothing unless told where."""
    monkeypatch.setattr(measure, "roofs", lambda device: ROOF)
    arguments = ["--device", "cpu", "--only", "bn_moments 7x7 NHWC", "--no-compile", "--seconds", "0.05"]
    report = tmp_path / "junit.xml"
    passed = [f'<testcase classname="tests.ops.{name}" name="test_a"/>' for name in ("test_batchnorm", "test_every_op")]
    report.write_text(f"<testsuites>{''.join(passed)}</testsuites>")
    assert command.main([*arguments, "--junit", str(report), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "bn_moments 32x320x7x7 NHWC float32" in shown and "x (" in shown
    (file,) = (tmp_path / "out").iterdir()
    assert [case["verdict"] for case in json.loads(file.read_text())["cases"]] == ["green"]
    report.write_text("<testsuites/>")
    assert command.main([*arguments, "--junit", str(report)]) == 1
    assert "not shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "no case's name holds 'nonsense'"),
        (["--threads", "0"], "--threads: got 0"),
        (["--junit", "/nowhere.xml"], "there is no file /nowhere.xml"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    """Exit code 2 and one line on what is wrong."""
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_newest_keeps_one_record_a_device(tmp_path):
    """The last date wins; GPUs come first."""
    for device, kind, date in (("a", "cpu", "2026-01-01"), ("a", "cpu", "2026-03-01"), ("b", "cuda", "2026-02-01")):
        record = record_of() | {"date": date}
        record["environment"] = record["environment"] | {"device": device, "device_type": kind}
        (tmp_path / f"{device}-{date}.json").write_text(json.dumps(record))
    found = table.newest(tmp_path)
    assert [(r["environment"]["device"], r["date"]) for r in found] == [("b", "2026-02-01"), ("a", "2026-03-01")]


def test_cost_of_the_published_protocol():
    """153.6 million images and 35.28 million forwards; hours by hand."""
    assert (cost.TRAINING_IMAGES, cost.FORWARDS) == (153_600_000, 35_280_000)
    spread = {"p20": 1.0, "p80": 1.0, "samples": 3}

    def case(op, items, **seconds):
        times = {name.replace("_", " "): {"median": value, **spread} for name, value in seconds.items()}
        times["spos_fast"] = times.pop("ours")
        shape = {"op": op, "shape": "224x224 batch 32", "items": items, "seconds": times}
        return shape | {"ours": "spos_fast", "verdict": "green", "best_peer": min(set(times) - {"spos_fast"})}

    step = case("supernet step", 1000, ours=1.0, eager_NCHW=2.0, eager_channels_last=1.5)
    scoring = case("scoring candidates", 1000, ours=0.5, published=1.0)
    scoring["seconds"]["published, NCHW"] = scoring["seconds"].pop("published")
    scoring["best_peer"] = "published, NCHW"
    first, second = cost.costs(record_of(step, scoring))
    assert first["ours"] == pytest.approx(153_600 / 3600) and first["eager"] == pytest.approx(2 * 153_600 / 3600)
    assert second["ours"] == pytest.approx(17_640 / 3600) and second["best"] == pytest.approx(35_280 / 3600)
    assert "47.6" in cost.report(record_of(step, scoring))
    assert cost.costs(record_of(step | {"verdict": "red"}))[0]["ours"] is None
    assert "not measured" in cost.report(record_of())


def test_tune_has_nothing_to_choose_without_a_gpu():
    """Triton kernels do not run on the CPU: no row, no error."""
    case = next(case for case in registry.cases("cpu") if case.op == "bn_moments")
    assert tune.compare(case, CPU, 0.01) is None


def test_gpu_script_goes_on_after_failures_and_sums_up(tmp_path):
    """With a python that always fails every step fails, and the script still ends with a summary and exit code 1."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho broken >&2\nexit 7\n")
    fake.chmod(0o755)
    out = tmp_path / "out"
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), str(out)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake), "REHEARSE": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=100, check=False)
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 1
    for name in ("machine", "build", "tests_gpu", "tests_cpu", "memcheck", "racecheck", "tune", "benchmarks"):
        assert f"== {name}: FAILED with exit code" in summary, name
    assert "8 steps did not pass" in summary
    assert (out / "logs.tar.gz").is_file() and not (out / "logs").exists()
    usage = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh")], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and "usage: bash bench/gpu.sh OUT_FOLDER" in usage.stderr


def test_tables_of_the_pages_are_in_step_with_the_committed_results():
    """README and docs/performance.md show what bench/results holds (python -m bench.table rewrites them)."""
    records = table.newest(table.RESULTS)
    assert records
    for page, text in table.pages(records).items():
        assert page.read_text() == table.replaced(page.read_text(), text), page.name
    assert any(case["verdict"] == "green" for record in records for case in record["cases"])
