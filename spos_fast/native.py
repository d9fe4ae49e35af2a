"""Finds and loads the native modules, and says what they are. Importing this imports no torch.

Environment variables, read when the first op is imported:

- ``SPOS_FAST_BACKEND``: ``auto`` (the best kernel there is), ``native`` (the C++ or CUDA kernel, or an error),
  ``triton`` (Triton where the op has such a kernel) or ``reference`` (plain PyTorch).
- ``SPOS_FAST_STRICT``: ``1`` turns every fallback to the reference into an error.
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from spos_fast.errors import InputError

BACKENDS = ("auto", "native", "triton", "reference")
REBUILD = "build it with: pip install --no-build-isolation -e ."

_PACKAGE = Path(__file__).resolve().parent
OPS_LIBRARY = _PACKAGE / "_ops.so"


def backend() -> str:
    """The value of SPOS_FAST_BACKEND.

    Raises:
        InputError: it is none of BACKENDS.
    """
    value = os.environ.get("SPOS_FAST_BACKEND") or "auto"
    if value not in BACKENDS:
        raise InputError(f"SPOS_FAST_BACKEND must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def strict() -> bool:
    """Whether SPOS_FAST_STRICT asks for errors in place of fallbacks.

    Raises:
        InputError: it is neither 0 nor 1.
    """
    value = os.environ.get("SPOS_FAST_STRICT") or "0"
    if value not in ("0", "1"):
        raise InputError(f"SPOS_FAST_STRICT must be 0 or 1, got {value!r}")
    return value == "1"


def build_info() -> dict[str, Any]:
    """What the native build made: summary (one line), cuda (architectures and nvcc, or None), torch, python, compiler.

    Where nothing was built, only ``summary`` and ``cuda`` are there.
    """
    path = _PACKAGE / "_generated_build" / "build_info.json"
    if not path.is_file():
        return {"summary": f"nothing was built; {REBUILD}", "cuda": None}
    info: dict[str, Any] = json.loads(path.read_text())
    return info


class OpsLibrary:
    """The torch ops library, loaded into this process; or the reason why it is not (``problem``)."""

    def __init__(self, path: Path = OPS_LIBRARY) -> None:
        import ctypes

        import torch

        self.problem: str | None = None
        if not path.is_file():
            self.problem = f"{path.name} is not there; {REBUILD}"
            return
        try:
            torch.ops.load_library(str(path))
            self._register = ctypes.CDLL(str(path)).spos_fast_register_kernel
        except (OSError, AttributeError) as error:
            self.problem = f"{path.name} does not load ({error}); {REBUILD}"
            return
        self._register.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

    def register(self, op: str, dispatch_key: str) -> str | None:
        """Let the library's kernel serve ``spos_fast::<op>`` under a dispatch key; None, or why it does not."""
        if self.problem is not None:
            return self.problem
        status = self._register(op.encode(), dispatch_key.encode())
        if status == 0:
            return None
        if status == 1 and dispatch_key == "CUDA" and build_info()["cuda"] is None:
            return f"{OPS_LIBRARY.name} was built without CUDA ({build_info().get('cuda_note')})"
        return f"{OPS_LIBRARY.name} has no {dispatch_key} kernel of it; {REBUILD}"


_ops_library: OpsLibrary | None = None


def ops_library() -> OpsLibrary:
    """The one OpsLibrary of this process, loaded at the first call."""
    global _ops_library
    if _ops_library is None:
        _ops_library = OpsLibrary()
    return _ops_library


def cells() -> ModuleType:
    """The NAS-Bench-101 engine, without torch.

    Raises:
        ImportError: it was not built; there is no slow stand-in for it.
    """
    try:
        from spos_fast import _cells
    except ImportError as error:
        raise ImportError(f"spos_fast._cells is not there ({error}); {REBUILD}") from None
    module: ModuleType = _cells
    return module
