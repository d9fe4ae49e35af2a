"""What holds for every op on every device, on the small arguments of samples.py.

On a machine with a GPU the CUDA cases run: CUDA = Triton = CPU = reference, graphs, opcheck, repeatability. Elsewhere
they are skipped and the CPU cases run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spos_fast import native, ops  # noqa: F401  ops defines the ops
from spos_fast.ops.dispatch import DEVICES as DEVICE_KEYS
from spos_fast.ops.dispatch import OPS, Op
from tests.ops.samples import SAMPLES, Arguments, on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = sorted(OPS)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device; the GPU only where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@pytest.fixture
def gpu() -> str:
    """The GPU, for what only a GPU has."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return "cuda"


def op_on(name: str, device: str) -> Op:
    """The op, if it has a kernel on the device; one that is still to be written is skipped, one that was not built is
    not."""
    op = OPS[name]
    if op.triton is None and f"has no {DEVICE_KEYS[device]} kernel of it" in op.choices[device].reason:
        pytest.skip(f"{name} has no kernel on {device} yet")
    return op


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def errors(outputs: Any, exact: Any) -> list[float]:
    """Relative error in the 2-norm of each output; NaN is infinite."""
    found = []
    for got, wanted in zip(tensors(outputs), tensors(exact), strict=True):
        got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
        assert got.shape == wanted.shape
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        found.append(error if error == error else float("inf"))
    return found


def widened(arguments: Arguments) -> Arguments:
    """The same values in double."""
    return tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments
    )


def packed(x: Tensor) -> Tensor:
    """The bytes of a tensor of any layout."""
    return x.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def identical(a: Any, b: Any) -> bool:
    """Bit for bit, NaN included."""
    return all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(packed(x), packed(y))
        for x, y in zip(tensors(a), tensors(b), strict=True)
    )


def test_every_op_has_samples() -> None:
    """A new op cannot be forgotten here."""
    assert set(SAMPLES) == set(OPS)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree(name: str, device: str) -> None:
    """Native, Triton and CPU kernels: error against double at most twice the reference's in the same dtype."""
    op = op_on(name, device)
    for arguments in SAMPLES[name]():
        exact = op.reference(*widened(arguments))
        here = on(arguments, device)
        kernels = {f"chosen ({op.choices[device].kernel})": op.overload}
        if device == "cuda" and not op.plain:
            expected = "native" if native.build_info()["cuda"] else "triton"
            assert op.choices["cuda"].kernel == expected, op.choices["cuda"].reason
            if op.triton is not None:
                kernels["triton"] = op.triton
        allowed = errors(op.reference(*here), exact)
        for label, kernel in kernels.items():
            outputs = kernel(*here)
            # The floor, a few roundings of the output, is for a reference that is right by luck.
            floor = [4 * torch.finfo(tensor.dtype).eps for tensor in tensors(outputs)]
            for got, eager, least in zip(errors(outputs, exact), allowed, floor, strict=True):
                assert got <= max(2 * eager, least), (
                    label,
                    [tuple(a.shape) for a in tensors(arguments[0])],
                    got,
                    eager,
                )


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(name: str, device: str, poisoned_memory: None) -> None:
    """Repeated calls give the same bits, also out of uninitialised memory full of NaN."""
    op = op_on(name, device)
    for arguments in SAMPLES[name]():
        here = on(arguments, device)
        first = op.overload(*here)
        assert all(tensor.isfinite().all() for tensor in tensors(first))
        for _ in range(3):
            assert identical(op.overload(*here), first)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_other_streams(name: str, gpu: str) -> None:
    """A kernel runs on the current stream: behind the work that makes its inputs, beside other streams' work."""
    op = op_on(name, gpu)
    for arguments in SAMPLES[name]():
        here = on(arguments, gpu)
        wanted = op.overload(*here)
        busy, side = torch.cuda.Stream(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(busy):
            torch.randn(1 << 22, device=gpu).sort()
        with torch.cuda.stream(side):
            late = tuple(v.clone(memory_format=torch.preserve_format) if isinstance(v, Tensor) else v for v in here)
            got = op.overload(*late)
        side.synchronize()
        assert errors(got, wanted) == pytest.approx([0.0] * len(tensors(got)), abs=1e-6)
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_graph_capture(name: str, gpu: str) -> None:
    """Captured once, replayed on new values: the bits of a plain call. The Triton kernel too."""
    op = op_on(name, gpu)
    kernels = [op.overload, *([op.triton] if op.triton else [])]
    for arguments in SAMPLES[name]():
        for kernel in kernels:
            here = on(arguments, gpu)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                kernel(*here)  # compiles what is compiled at the first call
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = kernel(*here)
            for value in here:
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.mul_(-0.5).add_(1)
            graph.replay()
            torch.cuda.synchronize()
            assert identical(outputs, kernel(*here))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, gpu: str) -> None:
    """Schema, fake, autograd and AOT dispatch of the CUDA kernel, as torch checks them."""
    op = op_on(name, gpu)
    for arguments in SAMPLES[name]():
        first, *rest = on(arguments, gpu)
        for grad in (False, True):
            torch.library.opcheck(op.overload, (first.detach().requires_grad_(grad), *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_inductor(name: str, gpu: str) -> None:
    """torch.compile with its own back end takes the op in one graph."""
    op = op_on(name, gpu)
    if op.choices[gpu].kernel == "composite":
        pytest.skip(f"{name} is compiled as the ops of PyTorch that it consists of, and rounds as those do")
    here = on(SAMPLES[name]()[0], gpu)
    compiled = torch.compile(lambda *arguments: op.overload(*arguments), fullgraph=True)
    assert identical(compiled(*here), op.overload(*here))
