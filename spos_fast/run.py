"""The run folder: configuration, lock, records. It can be killed at any moment and resumed to the same result.

::

    config.json                 settings of every stage that has begun
    supernet/checkpoint.pt      weights, momentum, step; metrics.jsonl beside it
    search/candidates.jsonl     every scored candidate; evolution.json, random_search.json, best.json at the end
    retrain/LABEL/              checkpoint.pt, metrics.jsonl, result.json of one architecture
    tensorboard/                scalars
    report.html
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from spos_fast.checkpoint import TEMPORARY, Records, read_json, write_json
from spos_fast.config import SECTIONS, Config, config_from, merged, plain
from spos_fast.errors import InputError

# What every stage depends on: its own settings and those of the stages before it.
STAGES = {
    "train": ("seed", "data", "space", "train"),
    "search": ("seed", "data", "space", "train", "search"),
    "retrain": ("seed", "data", "space", "train", "search", "retrain"),
}


class Run:
    """An open run folder. One process at a time; a context manager that gives the folder back.

    Attributes:
        path: the folder.
        config: settings of the run, stored ones first.
    """

    def __init__(self, path: str | Path, given: Mapping[str, Any], stages: tuple[str, ...]) -> None:
        """Open a folder, and make it if it is not there.

        Args:
            path: the folder.
            given: nested plain values of the settings that the user gave, see :func:`spos_fast.config.merged`.
            stages: stages that are about to run; their settings are stored in the folder.

        Raises:
            InputError: another process works in the folder, the folder is no run, or a setting differs from the one
                that the run was made with. Nothing is written then.
        """
        self.path = Path(path)
        self.config = resolve(self.path, given)
        existed = self.path.is_dir()
        if existed and any(self.path.iterdir()) and not (self.path / "config.json").exists():
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
            self.config = resolve(self.path, given)
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._lock.flush()
            for unfinished in self.path.rglob(f".*{TEMPORARY}"):
                unfinished.unlink()  # of a process that was killed while it wrote
            self._store({part for stage in stages for part in STAGES[stage]})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes work in the folder."""
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


def resolve(path: Path, given: Mapping[str, Any]) -> Config:
    """Settings of a run: what the folder stores, and what the user gives for the rest.

    Raises:
        InputError: a given setting is wrong or differs from a stored one.
    """
    config = config_from(given, "settings")
    file = Path(path) / "config.json"
    if not file.exists():
        return config
    stored = read_json(file)
    if not isinstance(stored, dict):
        raise InputError(f"folder: {file} holds no settings")
    config = config_from(merged(given, stored), str(file))
    asked = plain(config_from(merged(stored, given), "settings"))
    for part, value in plain(config).items():
        if part not in stored or asked[part] == value:
            continue
        old, new = (value, asked[part])
        name = part
        if isinstance(value, dict):
            key = next(key for key in value if value[key] != asked[part][key])
            name, old, new = f"{part}.{key}", value[key], asked[part][key]
        raise InputError(f"{name}: run {path} was made with {old!r}, not {new!r}; leave it out, or name another run")
    return config
