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
    with Run(tmp_path / "a", GIVEN, ("train",)) as run:
        assert run.config.train.steps == 7
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert set(stored) == {"seed", "data", "space", "train"} and stored["train"]["steps"] == 7
    with Run(tmp_path / "a", {"search": {"population": 60}}, ("search",)) as run:
        assert run.config.seed == 3 and run.config.train.steps == 7 and run.config.search.population == 60
    with Run(tmp_path / "a", {}, ("search",)) as run:
        assert run.config.search.population == 60


@pytest.mark.parametrize(
    ("given", "says"),
    [({"train": {"steps": 8}}, r"train\.steps: run .* was made with 7, not 8"), ({"seed": 4}, "seed: run .* 3, not 4")],
)
def test_other_settings_are_refused(tmp_path, given, says):
    """A run is never half of one experiment and half of another; nothing is written."""
    with Run(tmp_path / "a", GIVEN, ("train",)):
        pass
    before = _content(tmp_path / "a")
    with pytest.raises(InputError, match=says):
        Run(tmp_path / "a", given, ("train", "search"))
    assert _content(tmp_path / "a") == before


def test_a_second_process_is_refused(tmp_path):
    """With the number of the first; the folder is free again when the first one is gone, even by SIGKILL."""
    code = (
        "import sys, time; from spos_fast.run import Run; run = Run(sys.argv[1], {}, ('train',)); "
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"open\n"
        before = _content(tmp_path / "a")
        with pytest.raises(InputError, match=f"in use by process {first.pid}") as caught:
            Run(tmp_path / "a", {}, ("search",))
        assert "\n" not in str(caught.value) and _content(tmp_path / "a") == before
        first.kill()
    with Run(tmp_path / "a", {}, ("search",)):
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
            Run(tmp_path / name, {}, ("train",))
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.jpg"]
