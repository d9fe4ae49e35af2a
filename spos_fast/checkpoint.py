"""Files that appear whole or not at all: checkpoints, JSON documents, and JSON-lines records."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

from spos_fast.errors import CheckpointError

_FORMAT = "spos_fast_checkpoint"
_VERSION = 1
# How the name of a state that is kept beside a checkpoint begins.
_KEPT = "checkpoint_at_"
# Ending of a file that is being written.
TEMPORARY = ".spos_fast_tmp"


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary neighbour and a rename, so that ``path`` is the old or the new file, never half.

    Raises:
        CheckpointError: the content could not be written (full disk, no permission), or ``path`` is a folder or a
            device; ``path`` is as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file; name another one")
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the file that was there is untouched" if path.exists() else ""
        raise CheckpointError(f"{path}: could not be written ({error.strerror or error}){kept}") from None


def check_writable(path: str | Path) -> None:
    """Refuse before hours of work what :func:`write_whole` would refuse after them. Nothing is left behind.

    Raises:
        CheckpointError: ``path`` is a folder or a device, no file can be made in its folder (or, where that is still to
            be made, in the folder that is to hold it), or the name is too long.
    """
    path = Path(path).absolute()
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no regular file; name another one")
        folder = next(folder for folder in path.parents if folder.exists())
        temporary = folder / _temporary(path).name
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise CheckpointError(f"{path}: could not be written ({error.strerror or error})") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Save tensors and plain Python values; the last good checkpoint survives any failure.

    Raises:
        CheckpointError: it could not be written.
    """
    import torch  # here, so that whole files can be written without torch

    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, **content}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote; tensors and plain values only, no code is run.

    Raises:
        CheckpointError: missing, truncated or foreign file, or one of another version.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # torch raises many types for a damaged or foreign file
        kind = type(error).__name__
        raise CheckpointError(f"{path}: truncated or not a checkpoint of spos_fast ({kind})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of spos_fast")
    if content.get("version") != _VERSION:
        raise CheckpointError(f"{path}: format version {content.get('version')!r}; this program reads {_VERSION}")
    return content


def kept_path(checkpoint: str | Path, step: int) -> Path:
    """Where the state of a step is kept beside a checkpoint."""
    return Path(checkpoint).with_name(f"{_KEPT}{step:09}.pt")


def kept_checkpoints(checkpoint: str | Path) -> dict[int, Path]:
    """The states that :func:`spos_fast.train` kept beside a checkpoint, by their steps, ascending."""
    found = sorted(Path(checkpoint).parent.glob(f"{_KEPT}*.pt"))
    return {int(path.stem.removeprefix(_KEPT)): path for path in found}


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON document, whole or not at all.

    Raises:
        CheckpointError: it could not be written.
    """
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON document.

    Raises:
        CheckpointError: missing file or no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read ({error.strerror or error})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None


class Records:
    """An append-only file of JSON lines. A line that a killed process left half-written is dropped on opening.

    Attributes:
        rows: what the file holds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        self._size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._size].splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                raise CheckpointError(f"{self.path}: line {number} is not JSON; the file is damaged") from None
        if self._size < len(content):
            self._cut()

    def append(self, row: dict[str, Any]) -> None:
        """Add one row and bring it to the disk.

        Raises:
            CheckpointError: it could not be written; the rows before are whole.
        """
        line = (json.dumps(row) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._cut()
            raise CheckpointError(
                f"{self.path}: a record could not be written ({error.strerror or error}); the ones before are kept"
            ) from None
        self._size += len(line)
        self.rows.append(row)

    def keep(self, count: int) -> None:
        """Drop all rows after the first ``count``."""
        if count < len(self.rows):
            self.rows = self.rows[:count]
            write_whole(self.path, b"".join((json.dumps(row) + "\n").encode() for row in self.rows))
            self._size = self.path.stat().st_size

    def _cut(self) -> None:
        if self.path.exists():
            os.truncate(self.path, self._size)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
