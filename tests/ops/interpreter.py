"""Triton kernels without a GPU: interpreted, in a process that is told so before it imports triton."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_every_op import errors, tensors, widened

Arguments = tuple[Any, ...]


def run_interpreted(file: str) -> None:
    """Run a file of tests beside this one under Triton's interpreter; its failures are this test's.

    To see them one by one: ``TRITON_INTERPRET=1 python -m pytest tests/ops/FILE``.
    """
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0" and triton.__version__ < "3.9":
        pytest.skip(f"the interpreter of triton {triton.__version__} cannot loop with numpy {numpy.__version__}")
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = path.parents[2]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def assert_twice_eagers_error_at_most(kernel: Callable[..., Any], reference: Callable[..., Any], given: Arguments):
    """Error against double at most twice the reference's in the same dtype; the floor is a few roundings."""
    exact, eager, made = reference(*widened(given)), reference(*given), kernel(*given)
    for got, allowed, value, like in zip(
        errors(made, exact), errors(eager, exact), tensors(made), tensors(eager), strict=True
    ):
        assert value.dtype == like.dtype
        assert got <= max(2 * allowed, 4 * torch.finfo(value.dtype).eps), (got, allowed)


def assert_equal_in_double(kernel: Callable[..., Any], reference: Callable[..., Any], given: Arguments) -> None:
    """In double nothing but the formula is left: kernel and reference agree up to rounding, also in their layout."""
    given = widened(given)
    made, wanted = kernel(*given), reference(*given)
    assert max(errors(made, wanted)) <= 1e-12, errors(made, wanted)
    for value, like in zip(tensors(made), tensors(wanted), strict=True):
        assert value.dtype == like.dtype and value.shape == like.shape
        assert value.dim() < 4 or value.is_contiguous(memory_format=torch.channels_last) or value.is_contiguous()


class NoWordToTheHost(TorchDispatchMode):
    """Refuses whatever waits for the device, and so cannot be captured in a CUDA graph."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else through."""
        assert not any(name in str(function) for name in self.FORBIDDEN), function
        return function(*args, **(kwargs or {}))


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random channels-last images."""
    return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
