"""A run folder belongs to one process and to one set of settings."""

import json
import os
import subprocess
import sys

import pytest

from spos_fast import InputError
from spos_fast.run import Run

GIVEN = {"seed": 3, "train": {"steps": 7}}


def _content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_settings_of_the_stages_that_ran_are_stored(tmp_path):
    """Later stages take them from the folder; their own can still be chosen."""
    with Run(tmp_path / "a", {}, GIVEN, ("train",)) as run:
        assert run.config.train.steps == 7
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert set(stored) == {"seed", "data", "space", "train"} and stored["train"]["steps"] == 7
    with Run(tmp_path / "a", {}, {"search": {"population": 60}}, ("search",)) as run:
        assert run.config.seed == 3 and run.config.train.steps == 7 and run.config.search.population == 60
    with Run(tmp_path / "a", {}, {}, ("search",)) as run:
        assert run.config.search.population == 60


def _results(path):
    """A file that binds settings."""
    path.parent.mkdir(parents=True)
    path.write_text("")


def test_a_preset_reaches_the_stages_that_come_later(tmp_path):
    """What ``--config`` said at the start holds for search and retraining; naming it again changes nothing."""
    preset = {"train": {"steps": 100}, "search": {"macs_max": 5e6}, "retrain": {"steps": 9}}
    with Run(tmp_path / "a", preset, {"train": {"steps": 7}}, ("train",)):
        _results(tmp_path / "a" / "supernet" / "checkpoint.pt")
    for again in ({}, preset):
        with Run(tmp_path / "a", again, {}, ("search",)) as run:
            assert run.config.train.steps == 7 and run.config.search.macs_max == 5e6 and run.config.retrain.steps == 9
    with Run(tmp_path / "a", {}, {"search": {"macs_max": 6e6}}, ("search",)) as run:
        assert run.config.search.macs_max == 6e6
    with pytest.raises(InputError, match=r"train\.steps: run .* was made with 7, not 8"):
        Run(tmp_path / "a", {**preset, "train": {"steps": 8}}, {}, ("search",))


def test_settings_without_results_can_be_changed(tmp_path):
    """A stage that failed at once (a wrong learning rate, say) is started again with other settings."""
    for steps in (7, 8):
        with Run(tmp_path / "a", {}, {"train": {"steps": steps}}, ("train",)) as run:
            assert run.config.train.steps == steps
    assert json.loads((tmp_path / "a" / "config.json").read_text())["train"]["steps"] == 8


def test_the_data_may_move(tmp_path):
    """The folder of the images is not part of the experiment."""
    for path in ("/old", "/new"):
        with Run(tmp_path / "a", {}, {"data": {"path": path}}, ("train",)) as run:
            assert run.config.data.path == path
        (tmp_path / "a" / "supernet" / "checkpoint.pt").exists() or _results(
            tmp_path / "a" / "supernet" / "checkpoint.pt"
        )
    with Run(tmp_path / "a", {}, {}, ("search",)) as run:
        assert run.config.data.path == "/new"


def test_a_run_that_was_killed_while_it_began_goes_on(tmp_path):
    """A folder with nothing but a lock and an unfinished file is a run folder to be."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").write_text("process 1 on elsewhere")
    (tmp_path / "a" / ".config.json.1.spos_fast_tmp").write_text("{")
    with Run(tmp_path / "a", {}, GIVEN, ("train",)):
        assert {path.name for path in (tmp_path / "a").iterdir()} == {".lock", "config.json", "given.json"}


def test_a_forked_worker_does_not_hold_the_folder(tmp_path):
    """A worker that outlives its killed parent by seconds must not keep the next start out."""
    run = Run(tmp_path / "a", {}, {}, ("train",))
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(InputError, match="in use"):
        Run(tmp_path / "a", {}, {}, ("train",))
    run.close()
    Run(tmp_path / "a", {}, {}, ("train",)).close()
    os.write(done[1], b"x")
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"train": {"steps": 8}}, r"train\.steps: run .* was made with 7, not 8"), ({"seed": 4}, "seed: run .* 3, not 4")],
)
def test_other_settings_are_refused(tmp_path, given, says):
    """A run is never half of one experiment and half of another; nothing is written."""
    with Run(tmp_path / "a", {}, GIVEN, ("train",)):
        _results(tmp_path / "a" / "supernet" / "checkpoint.pt")
    before = _content(tmp_path / "a")
    with pytest.raises(InputError, match=says):
        Run(tmp_path / "a", {}, given, ("train", "search"))
    assert _content(tmp_path / "a") == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_kind_of_space_is_refused_by_name(tmp_path, finished):
    """One line names both spaces, not a setting that the other one lacks; with results in the folder or without."""
    macro = {"space": {"name": "nasbench_macro", "head_channels": 8}}
    with Run(tmp_path / "a", {}, macro, ("train", "consistency")):
        if finished:
            _results(tmp_path / "a" / "supernet" / "checkpoint.pt")
    before = _content(tmp_path / "a")
    for preset, flags in (
        ({}, {"space": {"name": "nasbench201", "cells": 1}}),
        ({"space": {"name": "nasbench201"}}, {}),
    ):
        with pytest.raises(InputError, match=r"space\.name: run .* was made with 'nasbench_macro', not 'nasbench201'"):
            Run(tmp_path / "a", preset, flags, ("train", "consistency"))
    assert _content(tmp_path / "a") == before
    with Run(tmp_path / "a", {}, macro, ("train",)) as run:
        assert run.config.space.head_channels == 8


def test_runs_from_before_a_setting_existed_go_on(tmp_path):
    """Folders of block search store no widths: they go on as they were, and do not take widths up silently."""
    with Run(tmp_path / "a", {}, {}, ("train",)):
        _results(tmp_path / "a" / "supernet" / "checkpoint.pt")
    path = tmp_path / "a" / "config.json"
    stored = json.loads(path.read_text())
    for section, name in (("space", "channels"), ("space", "blocks"), ("train", "widening_start")):
        del stored[section][name]
    path.write_text(json.dumps(stored))
    with Run(tmp_path / "a", {}, {}, ("train", "search")) as run:
        assert run.config.space.channels == () and run.config.train.widening_start == 0
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"space\.channels: run .* was made with \[\], not \[0\.5, 1\.0\]"):
        Run(tmp_path / "a", {}, {"space": {"channels": [0.5, 1.0]}}, ("search",))


def test_a_second_process_is_refused(tmp_path):
    """With the number of the first; the folder is free again when the first one is gone, even by SIGKILL."""
    code = (
        "import sys, time; from spos_fast.run import Run; run = Run(sys.argv[1], {}, {}, ('train',)); "
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"open\n"
        before = _content(tmp_path / "a")
        with pytest.raises(InputError, match=f"in use by process {first.pid}") as caught:
            Run(tmp_path / "a", {}, {}, ("search",))
        assert "\n" not in str(caught.value) and _content(tmp_path / "a") == before
        first.kill()
    with Run(tmp_path / "a", {}, {}, ("search",)):
        assert str(os.getpid()) in (tmp_path / "a" / ".lock").read_text()


def test_foreign_folders_are_left_alone(tmp_path):
    """A folder with other files, a file, and settings of a foreign program."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    for name in ("photos", "file", "odd"):
        with pytest.raises(InputError, match=name):
            Run(tmp_path / name, {}, {}, ("train",))
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]
