"""Opens a benchmark file of either form."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from spos_fast.errors import InputError
from spos_fast.nasbench.table import Table

_MAGIC = b"SPOS101\n"


def open_any(path: str | os.PathLike[str]) -> Table:
    """A table that :meth:`Table.convert` wrote, or an official tfrecord.

    A tfrecord is converted to a temporary file that is gone from its folder as soon as it is open: nothing is left
    beside the user's file, and the conversion is repeated every time. Convert once to open in milliseconds.

    Raises:
        InputError: there is no such file, or it is neither, or damaged.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: could not be read ({error.strerror or error})") from None
    if begin == _MAGIC:
        return Table.open(path)
    with tempfile.TemporaryDirectory(prefix="spos_fast_") as folder:
        return Table.convert(path, Path(folder) / "table")  # stays mapped after the folder is deleted
