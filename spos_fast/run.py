"""The run folder: configuration, lock, records. It can be killed at any moment and resumed to the same result.

::

    config.json                 settings of every stage that was started; given.json: what the user gave for all stages
    supernet/checkpoint.pt      weights, momentum, step; metrics.jsonl beside it, and checkpoint_at_STEP.pt: weights on
                                the way, with keep_checkpoints
    search/candidates.jsonl     every scored candidate; evolution.json, random_search.json, best.json at the end;
                                pareto.json, front.json with objectives; latency.json: the table that limits rest on
    retrain/LABEL/              checkpoint.pt, metrics.jsonl, result.json of one architecture
    consistency/WAY.jsonl       scores of architectures, one file for each way to score them; result.json
    tensorboard/                scalars
    report.html, report_consistency.html
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from spos_fast.checkpoint import TEMPORARY, Records, read_json, write_json
from spos_fast.config import SECTIONS, Config
from spos_fast.config_io import config_from, merged, plain
from spos_fast.errors import CheckpointError, InputError
from spos_fast.spaces.settings import SPACE_CONFIGS

# What every stage depends on: its own settings and those of the stages before it.
STAGES = {
    "train": ("seed", "data", "space", "train"),
    "search": ("seed", "data", "space", "train", "search"),
    "retrain": ("seed", "data", "space", "train", "search", "retrain"),
    "consistency": ("seed", "data", "space", "train", "consistency"),
}


class Run:
    """An open run folder. One process at a time; a context manager that gives the folder back.

    Attributes:
        path: the folder.
        config: settings of the run, stored ones first.
    """

    def __init__(
        self, path: str | Path, preset: Mapping[str, Any], flags: Mapping[str, Any], stages: tuple[str, ...]
    ) -> None:
        """Open a folder, and make it if it is not there.

        Args:
            path: the folder.
            preset: nested plain values of the settings that the user gave by a preset or a file.
            flags: the same, given one by one; they lie over the preset.
            stages: stages that are about to run; their settings are stored in the folder.

        Raises:
            InputError: another process works in the folder, the folder is no run, or a setting differs from the one
                that the run was made with. Nothing is written then.
        """
        self.path = Path(path)
        self.config = resolve(self.path, preset, flags)
        # Hidden files may be those of a run that was killed while it began.
        entries = [entry for entry in self.path.iterdir() if entry.name[0] != "."] if self.path.is_dir() else []
        if entries and not (self.path / "config.json").exists():
            raise InputError(f"folder: {self.path} is not empty and not a run folder; name another")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until close()
        except OSError as error:
            raise InputError(f"folder: {self.path} cannot be used as a folder ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise InputError(f"folder: {self.path} is in use by {owner}; wait for it, or name another folder") from None
        try:
            # Another process may have stored its settings between the first look and the lock.
            self.config = resolve(self.path, preset, flags)
            _held.add(self._lock)
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()
            for unfinished in self.path.rglob(f".*{TEMPORARY}"):
                unfinished.unlink()  # of a process that was killed while it wrote
            self._store({part for stage in stages for part in STAGES[stage]})
            _remember(self.path, preset, flags)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{self.path}: could not be written ({error.strerror or error})") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes work in the folder."""
        _held.discard(self._lock)
        with contextlib.suppress(OSError):  # a full disk: the owner's name was not written
            self._lock.close()

    def records(self, name: str) -> Records:
        """The JSON-lines file of this name in the folder."""
        return Records(self.path / name)

    def _store(self, parts: set[str]) -> None:
        path = self.path / "config.json"
        stored = read_json(path) if path.exists() else {}
        values = plain(self.config)
        new = {name: values[name] for name in ("seed", *SECTIONS) if name in parts or name in stored}
        if new != stored:
            write_json(path, new)


# Locks of this process. A forked child (a worker that decodes images) must not hold them: it may outlive its parent.
_held: set[IO[str]] = set()


def _let_go_in_child() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def resolve(path: Path, preset: Mapping[str, Any], flags: Mapping[str, Any]) -> Config:
    """Settings of a run: those that its results rest on, and for the rest what the user gives now or gave before.

    A part is bound as soon as results rest on it: the supernet's settings by its first checkpoint, the search's by its
    first candidate, the retraining's by its first checkpoint; seed, data and space by any of them. The data may move.

    Raises:
        InputError: a given setting is wrong, or differs from a bound one.
    """
    path = Path(path)
    stored, before = _read(path / "config.json"), _read(path / "given.json")
    # Settings of a space can be given without its name, which the run knows.
    earlier = merged(*(_space_name(values) for values in (stored, before.get("preset", {}), before.get("flags", {}))))
    config_from(merged(earlier, preset, flags), "settings")
    # The preset that the run began with may be named again; its flags then were what made the difference.
    given = merged({} if preset == before.get("preset") else preset, flags)
    _check_kind_of_space(path, stored, given)
    bound = {name: stored[name] for name in _bound(path) if name in stored}
    if isinstance(bound.get("data"), dict):
        bound["data"] = {key: value for key, value in bound["data"].items() if key != "path"}
    free = merged(before.get("preset", {}), before.get("flags", {}), preset, flags)
    config = config_from(
        merged({k: v for k, v in free.items() if k not in bound}, _data_path(stored, free), bound), "run"
    )
    asked = merged(bound, given)
    for part, value in plain(config).items():
        if part not in bound or part not in asked:
            continue
        if not isinstance(value, dict):
            if asked[part] != value:
                raise _differs(path, part, value, asked[part])
            continue
        wanted = plain(config_from({part: asked[part]}, "settings"))[part]
        if part == "space" and wanted["name"] != value["name"]:
            raise _differs(path, "space.name", value["name"], wanted["name"])
        for key in value:
            if (part, key) == ("data", "path"):
                continue
            if wanted[key] != value[key]:
                raise _differs(path, f"{part}.{key}", value[key], wanted[key])
    return config


def _space_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """The name of the space alone, if the values have one."""
    space = values.get("space")
    return {"space": {"name": space["name"]}} if isinstance(space, Mapping) and "name" in space else {}


def _check_kind_of_space(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a space of another kind than the run's, whose settings would be mixed with those given before."""
    old, new = (_space_name(values).get("space", {}).get("name") for values in (stored, given))
    if old and new and SPACE_CONFIGS.get(old) is not SPACE_CONFIGS[new]:
        raise _differs(path, "space.name", old, new)


def _data_path(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Where the data is: as given now or before, else where it was."""
    path = given.get("data", {}).get("path") or stored.get("data", {}).get("path", "")
    return {"data": {"path": path}} if path else {}


def _differs(path: Path, name: str, old: Any, new: Any) -> InputError:
    return InputError(f"{name}: run {path} was made with {old!r}, not {new!r}; leave it out, or name another folder")


def _bound(path: Path) -> set[str]:
    """Parts of the settings that results in the folder rest on."""
    parts: set[str] = set()
    if (path / "supernet" / "checkpoint.pt").exists():
        parts |= {*STAGES["train"]}
    if (path / "search" / "candidates.jsonl").exists():
        parts |= {*STAGES["search"]}
    if any(path.glob("retrain/*/checkpoint.pt")):
        parts |= {*STAGES["retrain"]}
    return parts


def _remember(path: Path, preset: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Keep what the user gave, for the stages that come later."""
    before = _read(path / "given.json")
    now = {"preset": preset or before.get("preset", {}), "flags": merged(before.get("flags", {}), flags)}
    if now != before:
        write_json(path / "given.json", now)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"folder: {path} holds no settings")
    return value
