"""fake_quant against the formulas in double, at ties, bounds and extremes, and as a torch citizen."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spos_fast import ops
from spos_fast.errors import InputError
from tests.ops import quant_formulas
from tests.ops.test_batchnorm import DTYPES
from tests.ops.test_every_op import identical

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODES = ["pact", "pact_residual", "lsq", "lsq+"]
KINDS = [(mode, False) for mode in MODES] + [("lsq", True), ("lsq+", True)]
BITS = torch.arange(1, 9, dtype=torch.int32)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(x: Tensor, step: Tensor, bits: int, grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The result, and the gradients of x, the step and the offset if there is one."""
    given = [value.detach().requires_grad_() for value in (x, step, options.pop("offset", None)) if value is not None]
    extra = {"offset": given[2]} if len(given) > 2 else {}
    out = ops.fake_quant(*given[:2], bits, **options, **extra)
    return out.detach(), *torch.autograd.grad(out, given, grad)


def reference(
    x: Tensor, step: Tensor, bits: int, grad: Tensor, mode: str, signed: bool, offset: Tensor | None, axis: int = -1
) -> tuple[Tensor, ...]:
    """The same from the op's reference."""
    rest = (step[None], offset if offset is None else offset[None], BITS[bits - 1 : bits], torch.tensor(0), mode)
    grads = ops.fake_quant_backward_reference(grad, x, *rest, signed, axis)
    return ops.fake_quant_reference(x, *rest, signed, axis), *(grads[:2] if offset is None else grads)


def expected(
    x: Tensor, step: float, bits: int, grad: Tensor, mode: str, signed: bool, offset: float | None
) -> tuple[Tensor, ...]:
    """The same from the formulas, in double."""
    found = quant_formulas.fake_quant(
        x.flatten().tolist(), grad.flatten().tolist(), step, bits, mode, signed, offset or 0.0
    )
    shaped = [torch.tensor(values, dtype=torch.float64).view(x.shape) for values in (found.out, found.grad_x)]
    sums = [found.grad_step, found.grad_offset][: 1 if offset is None else 2]
    return *shaped, *(torch.tensor(value, dtype=torch.float64) for value in sums)


def assert_close(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], size: float, offset: float = 0.0) -> None:
    """A few roundings of the dtype for values, and of float32 for sums of terms that are ``size`` large together."""
    for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
        epsilon = torch.finfo(a.dtype).eps
        b = b.double()
        room = 4 * epsilon * (b.abs() + (size if place > 1 else abs(offset)))
        bad = ~((a.double() - b).abs() <= room + torch.finfo(a.dtype).smallest_normal) & ~(a.isnan() & b.isnan())
        assert not bad.any(), (place, a.double()[bad][:4], b[bad][:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "signed"), KINDS)
def test_formulas(mode: str, signed: bool, dtype: torch.dtype) -> None:
    """Every quantizer at every bit-width gives what the formulas give in double, forwards and backwards."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 5, 7, 3, generator=generator).to(dtype) for _ in range(2))
    for bits in range(1, 9):
        size = 1.9123457 if mode.startswith("pact") else 3.1234567 / 2**bits  # no ties among halves
        for parameter in (size, -0.7 * size):
            step = torch.tensor(parameter, dtype=wide(dtype))
            offset = torch.tensor(-0.13, dtype=wide(dtype)) if mode == "lsq+" else None
            exact = expected(x, float(step), bits, grad, mode, signed, None if offset is None else float(offset))
            terms = float(grad.double().abs().sum()) * 2.0**bits
            assert_close(run(x, step, bits, grad, mode=mode, signed=signed, offset=offset), exact, terms, -0.13)
            assert_close(reference(x, step, bits, grad, mode, signed, offset), exact, terms, -0.13)


@pytest.mark.parametrize(("mode", "signed"), KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_ties_bounds_and_zeros(mode: str, signed: bool, bits: int) -> None:
    """Ties go to the even code; at a bound the value counts as outside; zero of a single signed bit is +1. On steps of
    powers of two, where all of this is exact, all are compared bit for bit."""
    levels = torch.arange(-(2.0 ** (bits - 1)) - 3, 2.0**bits + 3.5, 0.25)
    step = torch.tensor(0.5)
    x, grad = levels * 0.5, torch.ones_like(levels)
    parameter = step * (2**bits - 1) if mode.startswith("pact") else step
    offset = torch.tensor(0.25) if mode == "lsq+" else None
    exact = expected(x, float(parameter), bits, grad, mode, signed, None if offset is None else 0.25)
    for got in (
        run(x, parameter, bits, grad, mode=mode, signed=signed, offset=offset),
        reference(x, parameter, bits, grad, mode, signed, offset),
    ):
        assert torch.equal(got[0].double(), exact[0]) and torch.equal(got[1].double(), exact[1])
        torch.testing.assert_close(got[2].double().view(()), exact[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_extremes(mode: str) -> None:
    """Huge and infinite values clip, a NaN stays one, and steps that are zero, negative or too small to divide by act
    as the least step or their magnitude."""
    x = torch.tensor([0.0, 1e-7, -3e38, 3e38, torch.inf, -torch.inf, 65504.0, 2.0])
    grad = torch.ones_like(x)
    for parameter in (0.0, -0.0, 1e-45, -1e-30, -0.25, 1e30):
        step = torch.tensor(parameter)
        offset = torch.tensor(0.0) if mode == "lsq+" else None
        exact = expected(x, float(step), 4, grad, mode, False, 0.0 if mode == "lsq+" else None)
        got = run(x, step, 4, grad, mode=mode, offset=offset)
        assert got[0].isfinite().all() and got[2].isfinite()
        assert_close(got, exact, 8 * 15.0)
        assert_close(reference(x, step, 4, grad, mode, False, offset), exact, 8 * 15.0)


@pytest.mark.parametrize(("mode", "signed"), KINDS)
@pytest.mark.parametrize("bits", [1, 4])
def test_nan_stays(mode: str, signed: bool, bits: int) -> None:
    """A NaN stays one in the result and shows in the step's gradient; a NaN step makes all NaN."""
    x = torch.randn(70, generator=torch.Generator().manual_seed(0))
    x[33] = torch.nan
    step, offset = torch.tensor(0.7), torch.tensor(0.1) if mode == "lsq+" else None
    for give in (
        lambda step: run(x, step, bits, torch.ones(70), mode=mode, signed=signed, offset=offset),
        lambda step: reference(x, step, bits, torch.ones(70), mode, signed, offset),
    ):
        out, grad_x, grad_step, *_ = give(step)
        assert out.isnan().nonzero().tolist() == [[33]]
        assert grad_x[33] == 0 and grad_x.isfinite().all() and grad_step.isnan()
        assert give(torch.tensor(torch.nan))[0].isnan().all()


@pytest.mark.parametrize("axis", [0, 1, 3, -1])
@pytest.mark.parametrize(("mode", "signed"), [("pact", False), ("lsq", True), ("lsq+", False)])
def test_steps_a_channel(mode: str, signed: bool, axis: int) -> None:
    """Each channel has the bits of a call of its own, whatever the axis and the layout; only the entry of the index
    gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 18, 5, 3)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    step = torch.rand(2, shape[axis], generator=generator) + 0.2
    offset = torch.randn(2, shape[axis], generator=generator) / 4 if mode == "lsq+" else None
    bits = torch.tensor([2, 3], dtype=torch.int32)
    options: dict[str, Any] = {"mode": mode, "signed": signed}
    for laid_out in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    ):
        out, grad_x, grad_step, *grad_offset = run(
            laid_out, step, bits, grad, offset=offset, axis=axis, index=1, **options
        )
        assert out.stride() == laid_out.stride() and grad_x.stride() == laid_out.stride()
        assert not grad_step[0].any()
        for channel in range(shape[axis]):
            pick = [value.select(axis, channel) for value in (x, grad, out, grad_x)]
            own = None if offset is None else offset[1, channel]
            wanted = run(pick[0].contiguous(), step[1, channel], 3, pick[1].contiguous(), offset=own, **options)
            assert torch.equal(pick[2], wanted[0]) and torch.equal(pick[3], wanted[1])
            torch.testing.assert_close(grad_step[1, channel], wanted[2], rtol=1e-5, atol=1e-5)
            if grad_offset:
                torch.testing.assert_close(grad_offset[0][1, channel], wanted[3], rtol=1e-5, atol=1e-5)


def test_layouts_and_gradients_of_any_stride() -> None:
    """Whatever the strides of x and of the gradient that arrives, an expanded one too, results are the same."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 6, 5, 7, generator=generator) for _ in range(2))
    step = torch.tensor(0.3)
    wanted = run(x, step, 3, grad)
    sparse = torch.full((4, 6, 5, 14), torch.nan)[..., ::2].copy_(x)
    for laid_out in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(1, 3).contiguous().transpose(1, 3),
        sparse,
    ):
        for arriving in (grad, grad.contiguous(memory_format=torch.channels_last)):
            got = run(laid_out, step, 3, arriving)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
            torch.testing.assert_close(got[2], wanted[2], rtol=1e-5, atol=1e-5)
    ones = torch.tensor(1.0).expand(x.shape)
    assert all(map(torch.equal, run(x, step, 3, ones), run(x, step, 3, ones.contiguous())))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Nothing to quantize gives nothing, and a gradient of zero for the step."""
    for mode in ("pact", "lsq"):
        x = torch.empty(shape)
        out, grad_x, grad_step = run(x, torch.tensor(0.3), 3, x, mode=mode)
        assert out.shape == grad_x.shape == shape and grad_step == 0
        if len(shape) == 4:
            steps = torch.full((shape[1],), 0.3)
            assert not run(x, steps, 3, x, mode=mode, axis=1)[2].any()
    assert run(torch.tensor(0.7), torch.tensor(0.5), 2, torch.tensor(1.0))[0] == 0.5  # without dimensions


@pytest.mark.parametrize(("mode", "signed"), [("pact_residual", False), ("lsq", False), ("lsq", True), ("lsq+", True)])
@pytest.mark.parametrize("bits", [1, 3])
def test_gradient_of_the_step_is_a_derivative(mode: str, signed: bool, bits: int) -> None:
    """That of the straight-through function, where rounding adds a constant: against finite differences in double."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, generator=generator, dtype=torch.float64) * 2
    parameter, eps = 0.61, 1e-6
    low, high = quant_formulas.bounds(bits, signed)
    offset = 0.05 if mode == "lsq+" else 0.0

    base = (x - offset) / quant_formulas.step_of(parameter, bits, mode)
    inside, bound = (base > low) & (base < high), base.clamp(low, high)
    shift = (base.sign() if signed and bits == 1 else base.round()) - base

    def through(parameter: float) -> float:
        """Sum of the results with rounding replaced by a shift that is constant, and the same values clipped."""
        step = quant_formulas.step_of(parameter, bits, mode)
        return float((torch.where(inside, (x - offset) / step + shift, bound) * step + offset).sum())

    numeric = (through(parameter + eps) - through(parameter - eps)) / (2 * eps)
    factor = 1.0 if mode == "pact_residual" else (x.numel() * high) ** -0.5
    step = torch.tensor(parameter, dtype=torch.float64)
    given = {"offset": torch.tensor(offset, dtype=torch.float64)} if mode == "lsq+" else {}
    _, _, grad_step, *_ = run(x, step, bits, torch.ones_like(x), mode=mode, signed=signed, **given)
    torch.testing.assert_close(float(grad_step), numeric * factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [-1, 1])
def test_opcheck(axis: int) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    step = torch.rand((2,) if axis < 0 else (2, 3)).add(0.1).requires_grad_()
    offset = torch.zeros_like(step).requires_grad_()
    rest = torch.tensor([2, 3], dtype=torch.int32), torch.tensor(1)
    torch.library.opcheck(torch.ops.spos_fast.fake_quant.default, (x, step, offset, *rest, "lsq+", True, axis))
    torch.library.opcheck(torch.ops.spos_fast.fake_quant.default, (x, step, None, *rest, "pact", False, axis))


def test_second_derivatives_are_refused() -> None:
    """Differentiating the gradient is an error, not a silent zero."""
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.fake_quant(x, torch.tensor(0.3), 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fake_quant is differentiable once"):
        grad.sum().backward()


X, STEP = torch.zeros(2, 3), torch.ones(1)


@pytest.mark.parametrize(
    ("given", "options", "kind", "message"),
    [
        (([1.0], STEP, 2), {}, TypeError, "x must be a tensor, got list"),
        ((X.int(), STEP, 2), {}, TypeError, "x must be float32, .* got torch.int32"),
        ((X, 1.0, 2), {}, TypeError, "step must be a tensor, got float"),
        (
            (X, STEP.double(), 2),
            {},
            TypeError,
            "step must be torch.float32 for values of torch.float32, got torch.float64",
        ),
        (
            (X, torch.ones(2, 3), 2),
            {},
            InputError,
            r"step must be \[2\] \(\[K\], one entry a bit-width\), got shape \[2, 3\]",
        ),
        ((X, torch.ones(2), 2), {"axis": 1}, InputError, r"step must be \[1, 3\] .* got shape \[1, 2\]"),
        ((X, STEP, 0), {}, InputError, "bits must be from 1 to 8, got 0"),
        ((X, STEP, 2.0), {}, TypeError, "bits must be an int or an integer tensor, got float"),
        ((X, STEP, BITS), {}, InputError, r"step must be \[8\]"),
        ((X, STEP, BITS[:1, None]), {}, InputError, r"bits must be \[K\], one entry a bit-width, got shape \[1, 1\]"),
        ((X, STEP, 2), {"index": 1}, InputError, "index must be from 0 to 0, got 1"),
        (
            (X, STEP, 2),
            {"index": torch.tensor([0])},
            InputError,
            r"index must be .* without dimensions, got shape \[1\]",
        ),
        ((X, STEP, 2), {"index": torch.tensor(0.0)}, TypeError, "index must be int32 or int64, got torch.float32"),
        ((X, STEP, 2), {"mode": "sawb"}, InputError, "mode must be pact, pact_residual, lsq or lsq.*, got 'sawb'"),
        ((X, STEP, 2), {"mode": "pact", "signed": True}, InputError, "signed must be False for pact"),
        ((X, STEP, 2), {"mode": "lsq+"}, InputError, r"offset must be given for lsq\+ and for nothing else"),
        ((X, STEP, 2), {"offset": STEP}, InputError, r"offset must be given for lsq\+ and for nothing else"),
        ((X, STEP, 2), {"axis": 2}, InputError, "axis must be a dimension of x, which has 2, got 2"),
    ],
)
def test_errors(given: tuple, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(kind, match=message) as caught:
        ops.fake_quant(*given, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("drawn", "graphs"), [("tensor index", 1), ("int index", 2), ("int bits", 2)])
def test_random_bits_need_few_graphs(drawn: str, graphs: int) -> None:
    """A hundred steps with a bit-width drawn each time compile once where the index is a tensor, twice where it or the
    bit-width is an int; results and gradients are those of eager."""
    torch._dynamo.reset()

    def step(x: Tensor, steps: Tensor, weight: Tensor, k: int | Tensor) -> Tensor:
        if drawn == "int bits":
            return ops.fake_quant(x, steps[0], k + 1, mode="pact").sum() + ops.quantize_weights(weight, k + 1).sum()
        return (
            ops.fake_quant(x, steps, BITS, index=k, mode="pact").sum()
            + ops.quantize_weights(weight, BITS, index=k).sum()
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    draw = random.Random(0)
    given = [value.requires_grad_() for value in (torch.randn(4, 5), torch.rand(8) + 1, torch.randn(3, 4))]
    for _ in range(100):
        k = draw.randrange(8)
        got = compiled(*given, torch.tensor(k) if drawn == "tensor index" else k)
        wanted = step(*given, k)
        assert identical(torch.autograd.grad(got, given), torch.autograd.grad(wanted, given))
    assert counter.frame_count <= graphs
    torch._dynamo.reset()


def test_export() -> None:
    """torch.export takes the ops, with the index as an input."""

    class Quantize(torch.nn.Module):
        def forward(self, x: Tensor, step: Tensor, index: Tensor) -> Tensor:
            return ops.fake_quant(x, step, BITS, index=index) + ops.quantize_weights(x, BITS, index=index)

    given = torch.randn(3, 4), torch.rand(8) + 0.1, torch.tensor(3)
    program = torch.export.export(Quantize(), given).module()
    for index in (given[2], torch.tensor(0)):
        assert identical(program(*given[:2], index), Quantize()(*given[:2], index))


@pytest.mark.parametrize("axis", [-1, 1])
def test_same_bits_for_any_number_of_threads(axis: int) -> None:
    """Sums are taken in an order that the shape fixes, whatever torch's number of threads and the layout's tasks."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(9, 40, 33, 31, generator=generator) for _ in range(2))
    step = torch.rand(() if axis < 0 else (40,), generator=generator) + 0.1
    threads = torch.get_num_threads()
    try:
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(
                    run(laid_out, step, 3, torch.empty_like(laid_out).copy_(grad), axis=None if axis < 0 else axis)
                )
            assert identical(results[1:], [results[0]] * 2)
    finally:
        torch.set_num_threads(threads)


def test_autocast_leaves_the_dtype() -> None:
    """Under autocast values keep their dtype and steps theirs: halves need float32 steps."""
    step = torch.tensor(0.3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            out = ops.fake_quant(torch.randn(4).to(dtype), step, 2)
            (grad,) = torch.autograd.grad(out.float().sum(), step)
            assert out.dtype == dtype and grad.dtype == torch.float32


def test_kernels_refuse_what_tensors_hold() -> None:
    """A bit-width or an index out of range in a tensor is an error on the CPU, not a read of what is not there."""
    x, step = torch.randn(5), torch.ones(2)
    bits = torch.tensor([2, 9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="index must be from 0 to 1, got 2"):
        ops.fake_quant(x, step, bits, index=torch.tensor(2))
    with pytest.raises(RuntimeError, match="bits must be from 1 to 8, got 9"):
        ops.fake_quant(x, step, bits, index=1)


def test_the_schemas_are_what_the_docs_say() -> None:
    """The ops' schemas are public: a change of them breaks exported graphs."""
    assert str(torch.ops.spos_fast.fake_quant.default._schema) == (
        "spos_fast::fake_quant(Tensor x, Tensor step, Tensor? offset, Tensor bits, Tensor index, str mode, "
        "bool signed, int axis) -> Tensor"
    )
    assert str(torch.ops.spos_fast.dorefa_weights.default._schema) == (
        "spos_fast::dorefa_weights(Tensor weight, Tensor bits, Tensor index, bool per_channel, bool detach_max) "
        "-> Tensor"
    )
