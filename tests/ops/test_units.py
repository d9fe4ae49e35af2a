"""shuffle_unit against double precision, and as a torch citizen. Shapes and dtypes: samples.py and test_every_op.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.ops.dispatch import OPS
from tests.ops.samples import SAMPLES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAST = torch.channels_last


def weights(half: int, stored: int, made: int, kernel: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights of a unit, of the size that keeps values around one."""
    sizes = ((stored, half, 1, 1), (stored, 1, kernel, kernel), (made, stored, 1, 1))
    return [torch.randn(size, dtype=dtype) / (size[1] * size[2] ** 2) ** 0.5 for size in sizes]


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random channels-last images."""
    return torch.randn(size, dtype=dtype).contiguous(memory_format=LAST)


def eager(x: Tensor, pw1: Tensor, dw: Tensor, pw2: Tensor) -> Tensor:
    """The unit as one writes it with torch.nn.functional."""

    def norm(z: Tensor) -> Tensor:
        return functional.batch_norm(z, None, None, None, None, True)

    y = norm(functional.conv2d(x[:, 1::2], pw1)).relu()
    y = norm(functional.conv2d(y, dw, padding=dw.shape[2] // 2, groups=dw.shape[0]))
    return torch.cat((x[:, ::2], norm(functional.conv2d(y, pw2)).relu()), 1)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, in the 2-norm; a NaN is infinite."""
    value = float((got.double() - wanted).norm() / wanted.norm())
    return value if value == value else float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side", "kernel"), [(64, 28, 3), (160, 14, 5), (320, 7, 7), (36, 13, 3)])
def test_twice_eagers_error_at_most(channels: int, side: int, kernel: int, dtype: torch.dtype) -> None:
    """Output and all gradients: error against double at most twice that of eager PyTorch in the same dtype.

    Where rounding moves a value across zero, ReLU's gradient is all or nothing, for eager as for the op; so gradients
    are those of the output where double precision leaves no doubt about any sign.
    """
    torch.manual_seed(0)
    half = channels // 2
    given = [image(4, channels, side, side, dtype=dtype), *weights(half, half, half, kernel, dtype)]
    grad = image(4, channels, side, side, dtype=dtype)

    def run(function: Any, inputs: list[Tensor]) -> list[Tensor]:
        inputs = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in inputs]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    exact = run(eager, [value.double() for value in given])
    theirs, ours = run(eager, given), run(lambda *a: ops.shuffle_unit(*a).out, given)
    epsilon = torch.finfo(dtype).eps
    for name, got, other, wanted in zip(("out", "x", "pw1", "dw", "pw2"), ours, theirs, exact, strict=True):
        # The floor: a share `epsilon` of the values may change sides, each an error as large as the value.
        floor = 4 * epsilon if name == "out" else 2 * epsilon**0.5
        assert error(got, wanted) <= max(2 * error(other, wanted), floor), name


def test_gradients() -> None:
    """Gradients of x, weights, gamma and beta against finite differences in double, sliced and in full."""
    for mid, affine in ((None, False), (3, True)):
        torch.manual_seed(0)
        given = [image(2, 6, 4, 3, dtype=torch.float64), *weights(3, 5, 4, 3, torch.float64)]
        size = 2 * (mid or 5) + 4
        given += [torch.rand(size).double() + 0.5, torch.randn(size).double()] if affine else []
        inputs = [value.requires_grad_() for value in given]

        def run(*values: Tensor, mid: int | None = mid) -> Tensor:
            return ops.shuffle_unit(*values, mid=mid).out

        assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", ["shuffle_unit", "shuffle_unit_backward"])
def test_double(name: str) -> None:
    """In double the kernel is the reference up to rounding, on every shape: both are off by that much."""
    op = OPS[name]
    for arguments in SAMPLES[name]():
        wide = tuple(v.double() if isinstance(v, Tensor) else v for v in arguments)
        for got, wanted in zip(op.overload(*wide), op.reference(*wide), strict=True):
            assert got.dtype == torch.float64
            assert got.numel() == 0 or (got - wanted).norm() <= 2e-14 * wanted.norm()


@pytest.mark.parametrize("name", ["shuffle_unit", "shuffle_unit_backward"])
def test_opcheck(name: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    op = getattr(torch.ops.spos_fast, name).default
    for arguments in SAMPLES[name]()[:4]:
        grads = (False, True) if name == "shuffle_unit" else (False,)
        for grad in grads:
            inputs = [
                value.detach().requires_grad_(grad) if isinstance(value, Tensor) else value for value in arguments
            ]
            torch.library.opcheck(op, tuple(inputs))


def test_slice_is_the_extracted_unit() -> None:
    """``mid`` of the stored channels, NaN in the others: the bits of a unit of only those; no gradient outside."""
    torch.manual_seed(0)
    for mid, stored in itertools.product((1, 7, 16, 33), (33, 40)):
        x = image(2, 12, 6, 5).requires_grad_()
        full = weights(6, stored, 10, 3)
        small = [full[0][:mid].clone(), full[1][:mid].clone(), full[2][:, :mid].clone()]
        full[0][mid:], full[1][mid:], full[2][:, mid:] = torch.nan, torch.nan, torch.nan
        for weight in (*full, *small):
            weight.requires_grad_()
        grad = image(2, 16, 6, 5)
        sliced, alone = ops.shuffle_unit(x, *full, mid=mid), ops.shuffle_unit(x, *small)
        assert all(torch.equal(a, b) for a, b in zip(sliced, alone, strict=True))
        got = torch.autograd.grad(sliced.out, [x, *full], grad)
        wanted = torch.autograd.grad(alone.out, [x, *small], grad)
        cut = [got[0], got[1][:mid], got[2][:mid], got[3][:, :mid]]
        assert all(torch.equal(a, b) for a, b in zip(cut, wanted, strict=True))
        assert not (got[1][mid:].any() or got[2][mid:].any() or got[3][:, mid:].any())


@pytest.mark.parametrize("size", [(8, 32, 28, 28, 24, 5), (5, 20, 9, 9, 70, 3), (1, 6, 90, 77, 5, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(size: tuple[int, ...]) -> None:
    """Outputs, statistics and gradients do not depend on how many threads torch has."""
    if OPS["shuffle_unit"].choices["cpu"].kernel == "reference":
        pytest.skip("no native kernel in this build; PyTorch's own sums depend on its threads")
    samples, half, height, width, mid, kernel = size
    x = image(samples, 2 * half, height, width).requires_grad_()
    given = [x, *(weight.requires_grad_() for weight in weights(half, mid, half, kernel))]
    grad = image(*x.shape)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            made = ops.shuffle_unit(*given)
            with torch.no_grad():
                alone = ops.shuffle_unit(*given)
            results.append([*made, *alone, *torch.autograd.grad(made.out, given, grad)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(results[0][:3], results[0][3:6], strict=True)
    )  # nothing kept: the same


def test_layouts() -> None:
    """NCHW, sliced and strided inputs give the values of the packed channels-last one, with one warning in all."""
    x = image(2, 8, 5, 6)
    unit = weights(4, 4, 4, 3)
    wanted = ops.shuffle_unit(x, *unit).out
    wide = torch.full((2, 20, 5, 6), torch.nan).contiguous(memory_format=LAST)
    wide[:, 4:12] = x
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    ops.units._warned_of_layout = False
    with pytest.warns(RuntimeWarning, match="not channels last") as caught:
        for value in (x.contiguous(), wide[:, 4:12], transposed):
            out = ops.shuffle_unit(value, *unit).out
            assert torch.equal(out, wanted) and out.is_contiguous(memory_format=LAST)
    assert len(caught) == 1
    flipped = [unit[0].transpose(0, 1).contiguous().transpose(0, 1), *unit[1:]]
    assert torch.equal(ops.shuffle_unit(x, *flipped).out, wanted)


def test_compile_fullgraph() -> None:
    """torch.compile takes the unit in one graph, forwards and backwards."""
    x, unit = image(2, 8, 5, 6).requires_grad_(), weights(4, 6, 4, 3)

    def loss(x: Tensor) -> Tensor:
        made = ops.shuffle_unit(x * 2, *unit, mid=5)
        return made.out.square().sum() + made.mean.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, wanted)


def test_autocast() -> None:
    """Under autocast the unit runs in its dtype, and statistics and the weights' gradients stay wide."""
    x, unit = image(2, 8, 5, 6), [weight.requires_grad_() for weight in weights(4, 4, 4, 3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = ops.shuffle_unit(x, *unit)
    assert made.out.dtype == torch.bfloat16 and made.mean.dtype == torch.float32
    made.out.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in unit)


def test_bad_values_show() -> None:
    """A NaN in a channel of the branch shows in its output (ReLU does not swallow it); a passing one only passes."""
    unit = weights(4, 4, 4, 3)
    for channel, spoiled in ((1, True), (2, False)):
        x = image(2, 8, 5, 6)
        x[0, channel, 2, 2] = torch.nan
        out = ops.shuffle_unit(x, *unit).out
        assert bool(out[:, 4:].isnan().any()) == spoiled


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(2, 7, 3, 3)}, InputError, "x must have an even number of channels"),
        ({"x": torch.zeros(1, 8, 1, 1)}, InputError, "at least two pixels"),
        ({"x": torch.zeros(2, 8, 3)}, InputError, "x must have 4 dimensions"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"pw1": torch.zeros(5, 3, 1, 1)}, InputError, r"pw1 must be \[5, 4, 1, 1\] .* got \[5, 3, 1, 1\]"),
        ({"dw": torch.zeros(5, 1, 2, 2)}, InputError, "odd kernel size, got 2"),
        ({"dw": torch.zeros(4, 1, 3, 3)}, InputError, r"dw must be \[5, 1, 3, 3\]"),
        ({"pw2": torch.zeros(4, 6, 1, 1)}, InputError, r"pw2 must be \[4, 5, 1, 1\]"),
        ({"pw2": torch.zeros(4, 5, 1, 1).double()}, TypeError, "pw2 must have the dtype of x"),
        ({"gamma": torch.zeros(13)}, InputError, r"gamma must be \[14\]"),
        ({"mid": 6}, InputError, "mid must be from 1 to 5"),
        ({"mid": 0}, InputError, "mid must be from 1 to 5"),
        ({"mid": 2.0}, TypeError, "mid must be an int, got float"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    pw1, dw, pw2 = weights(4, 5, 4, 3)
    with pytest.raises(kind, match=message) as caught:
        ops.shuffle_unit(**{"x": image(2, 8, 3, 3), "pw1": pw1, "dw": dw, "pw2": pw2, **change})
    assert "\n" not in str(caught.value)


def test_backward_needs_what_is_saved() -> None:
    """Backward after save=False is refused, not read from memory that is not there."""
    x, unit = image(2, 8, 3, 3), weights(4, 4, 4, 3)
    out, *saved = torch.ops.spos_fast.shuffle_unit(x, *unit, None, None, 4, 1e-5, False)
    with pytest.raises((RuntimeError, InputError), match="save"):
        torch.ops.spos_fast.shuffle_unit_backward(out, x, *saved, *unit, None, None, 4)
