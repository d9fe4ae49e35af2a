"""Files appear whole or not at all; the last good one survives a full disk and a kill."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from spos_fast import CheckpointError
from spos_fast.checkpoint import Records, load_checkpoint, read_json, save_checkpoint, write_json, write_whole


def test_round_trip(tmp_path):
    """Tensors and plain values come back; the folder is made."""
    save_checkpoint(tmp_path / "a" / "c.pt", {"step": 3, "x": torch.arange(3)})
    content = load_checkpoint(tmp_path / "a" / "c.pt")
    assert content["step"] == 3 and torch.equal(content["x"], torch.arange(3))
    write_json(tmp_path / "b.json", {"a": [1, 2]})
    assert read_json(tmp_path / "b.json") == {"a": [1, 2]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.json"]


@pytest.fixture()
def small_files_only():
    """A full disk, as far as a process can tell: writes beyond 64 KiB fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, small_files_only):
    """The old file is untouched, no half file stays, the error says so."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(CheckpointError, match="untouched"):
        save_checkpoint(path, {"step": 2, "x": torch.zeros(100_000)})
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_full_disk_keeps_whole_records(tmp_path, small_files_only):
    """A record that does not fit is cut off again; those before it stay and more can follow."""
    records = Records(tmp_path / "r.jsonl")
    records.append({"a": 1})
    with pytest.raises(CheckpointError, match="kept"):
        records.append({"long": "x" * 100_000})
    records.append({"a": 2})
    assert Records(tmp_path / "r.jsonl").rows == [{"a": 1}, {"a": 2}]


def test_an_unwritable_folder_is_named(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_whole(tmp_path / "file" / "c.pt", b"x")


def test_a_torn_last_line_is_dropped(tmp_path):
    """What a killed process left half-written; a damaged line in the middle is an error with its number."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    records = Records(path)
    assert records.rows == [{"a": 1}, {"a": 2}]
    records.append({"a": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 2}, {"a": 3}]
    records.keep(1)
    assert Records(path).rows == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a\n{"a": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        Records(path)


def test_damaged_files_are_named(tmp_path):
    """Missing, truncated, foreign and future checkpoints, and JSON that is none."""
    save_checkpoint(tmp_path / "good.pt", {"x": torch.zeros(1000)})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-500])
    torch.save({"x": 1}, tmp_path / "foreign.pt")
    torch.save({"format": "spos_fast_checkpoint", "version": 99}, tmp_path / "future.pt")
    for name, says in (
        ("absent.pt", "no such"),
        ("cut.pt", "truncated"),
        ("foreign.pt", "not a checkpoint"),
        ("future.pt", "version 99"),
    ):
        with pytest.raises(CheckpointError, match=says) as caught:
            load_checkpoint(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_json(tmp_path / "x.json")


def test_killed_while_saving(tmp_path):
    """A process that saves all the time and is killed at any moment leaves a checkpoint that loads."""
    code = textwrap.dedent("""
        import sys, torch
        from spos_fast.checkpoint import save_checkpoint
        step = 0
        while True:
            step += 1
            save_checkpoint(sys.argv[1], {"step": step, "x": torch.full((200_000,), float(step))})
            if step == 1:
                print("begun", flush=True)
    """)
    path = tmp_path / "c.pt"
    for pause in (0.0, 0.011, 0.023, 0.037):
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, env=os.environ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
            try:
                process.wait(pause)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        content = load_checkpoint(path)
        assert torch.equal(content["x"], torch.full((200_000,), float(content["step"])))
