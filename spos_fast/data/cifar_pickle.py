"""Reading CIFAR's pickles without running what a foreign pickle may carry.

A pickle names functions to be called while it is read. CIFAR's files (pickled by Python 2) need four names, for NumPy
arrays and their bytes; every other name is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

from spos_fast.errors import InputError


def read_pickle(raw: bytes, where: str, *, least_bytes: int) -> Any:
    """What is pickled in ``raw``; Python 2 strings come back as ``bytes``. ``where`` names the file in errors.

    Raises ``InputError`` if the pickle asks for anything but arrays and plain values, or is truncated (a complete one
    has more than ``least_bytes`` bytes) or none at all.
    """
    try:
        return _CifarUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except _ForeignNameError as error:
        raise InputError(
            f"{where} asks for {error} while it is read, which CIFAR never does: the file is foreign and was not opened"
        ) from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where} is no complete pickle ({reason}): it has {len(raw)} bytes, a complete one over {least_bytes}"
        ) from None


class _ForeignNameError(Exception):
    """The name of something that a CIFAR pickle has no use for."""


_ARRAY_TYPE = "numpy.ndarray"  # stands for the type itself: CIFAR only names it, and a string cannot be called


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray[Any, Any]:
    """What NumPy's ``_reconstruct(ndarray, (0,), b"b")`` gives, and nothing else: the state comes afterwards."""
    if kind is not _ARRAY_TYPE:
        raise _ForeignNameError(f"an array of the type {kind!r}")
    return np.ndarray((0,), dtype=np.int8)


def _byte_dtype(code: object, align: object = 0, copy: object = 1) -> np.dtype[Any]:
    """What ``dtype("u1", 0, 1)`` gives: the pixels' type. Copied, because its state is set afterwards."""
    if code not in ("u1", b"u1"):
        raise _ForeignNameError(f"arrays of {code!r}")
    return np.dtype("u1", align=False, copy=True)


def _latin1_bytes(text: object, encoding: object = "latin1") -> bytes:
    """What ``codecs.encode(text, "latin1")`` gives: how Python 3 writes bytes for Python 2. No other codec."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise _ForeignNameError(f"the codec {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,  # the same module's name since NumPy 2
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _byte_dtype,
    ("_codecs", "encode"): _latin1_bytes,
}


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _ForeignNameError(f"{module}.{name}") from None
