"""What holds for every op on every device, on the small arguments of samples.py.

On a machine with a GPU the CUDA cases run: CUDA = Triton = CPU = reference, graphs, opcheck, repeatability. Elsewhere
they are skipped and the CPU cases run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

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
    """The tensors of an op's result or arguments, those of lists too."""
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]


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
    """The same values in double; a result whose dtype is an argument is of double, too."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) else value

    wide: Arguments = tree_map(widen, arguments)
    return wide


def packed(x: Tensor) -> Tensor:
    """The bytes of a tensor of any layout."""
    return x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def identical(a: Any, b: Any) -> bool:
    """Bit for bit, NaN included."""
    return all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(packed(x), packed(y))
        for x, y in zip(tensors(a), tensors(b), strict=True)
    )


def test_every_op_has_samples() -> None:
    """A new op cannot be forgotten here."""
    assert set(SAMPLES) == set(OPS)


def nudged(arguments: Arguments, seed: int) -> Arguments:
    """Values that differ in float32's last bit; the arguments themselves for seed 0."""
    if seed == 0:
        return arguments
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        signs = 2 * torch.randint(0, 2, x.shape, generator=generator) - 1
        return torch.empty_like(x).copy_(x * (1 + 2**-23 * signs))

    nudged: Arguments = tree_map_only(Tensor, nudge, arguments)
    return nudged


def excess(op: Op, kernel: Any, arguments: Arguments, device: str, draws: int) -> list[str]:
    """Outputs whose error against double is more than twice the reference's in the same dtype.

    Args:
        op: whose reference counts.
        kernel: what is judged.
        arguments: a sample.
        device: where to run both.
        draws: rounding errors are a matter of luck; the squares of this many draws are added.
    """
    ours: list[float] = []
    eager: list[float] = []
    for seed in range(draws):
        given = nudged(arguments, seed)
        exact, here = op.reference(*widened(given)), on(given, device)
        outputs = kernel(*here)
        draw = errors(outputs, exact), errors(op.reference(*here), exact)
        ours, eager = (
            [a + b * b for a, b in zip(s or [0.0] * len(d), d, strict=True)]
            for s, d in zip((ours, eager), draw, strict=True)
        )
    # The floor, a few roundings of the output, is for a reference that is right by luck. Integers are not rounded.
    floor = [
        (4 * torch.finfo(tensor.dtype).eps) ** 2 * draws if tensor.is_floating_point() else 0.0
        for tensor in tensors(outputs)
    ]
    return [
        f"output {place}: {a**0.5:.2e} for the reference's {b**0.5:.2e}"
        for place, (a, b, least) in enumerate(zip(ours, eager, floor, strict=True))
        if not a <= max(4 * b, least)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree(name: str, device: str) -> None:
    """Native, Triton and CPU kernels: error against double at most twice the reference's in the same dtype."""
    op = op_on(name, device)
    kernels = {f"chosen ({op.choices[device].kernel})": op.overload}
    if device == "cuda" and not op.plain:
        assert op.choices["cuda"].kernel in ("native", "triton"), op.choices["cuda"].reason
        if op.triton is not None:
            kernels["triton"] = op.triton
    for arguments in SAMPLES[name]():
        for label, kernel in kernels.items():
            if excess(op, kernel, arguments, device, 1):
                found = excess(op, kernel, arguments, device, 8)
                assert not found, (label, [tuple(a.shape) for a in tensors(arguments)], found)


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
            late = tree_map_only(Tensor, lambda v: v.clone(memory_format=torch.preserve_format), here)
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
            for value in tensors(here):
                if value.is_floating_point():
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
            given = tree_map_only(Tensor, lambda x, grad=grad: x.detach().requires_grad_(grad), first)
            torch.library.opcheck(op.overload, (given, *rest))


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
