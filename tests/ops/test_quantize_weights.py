"""quantize_weights against DoReFa's formulas in double, at the maximum, at zeros and at extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.errors import InputError
from tests.ops import quant_formulas
from tests.ops.test_batchnorm import DTYPES
from tests.ops.test_every_op import identical

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BITS = torch.arange(1, 9, dtype=torch.int32)


def run(weight: Tensor, bits: int, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The result and the gradient of the weights."""
    weight = weight.detach().requires_grad_()
    out = ops.quantize_weights(weight, bits, **options)
    return out.detach(), *torch.autograd.grad(out, weight, grad)


def reference(
    weight: Tensor, bits: int, grad: Tensor, per_channel: bool = False, detach_max: bool = False
) -> tuple[Tensor, Tensor]:
    """The same from the op's reference."""
    rest = BITS[bits - 1 : bits], torch.tensor(0), per_channel, detach_max
    out = ops.dorefa_weights_reference(weight, *rest)
    return out, ops.dorefa_weights_backward_reference(grad, weight, *rest)


def expected(
    weight: Tensor, bits: int, grad: Tensor, per_channel: bool = False, detach_max: bool = False
) -> tuple[Tensor, Tensor]:
    """The same from the formulas, in double."""
    rows = weight.shape[0] if per_channel else 1
    found = [
        quant_formulas.dorefa(w.tolist(), g.tolist(), bits, detach_max)
        for w, g in zip(weight.reshape(rows, -1), grad.reshape(rows, -1), strict=True)
    ]
    out, grads = (torch.tensor([row[part] for row in found], dtype=torch.float64) for part in (0, 2))
    return out.view(weight.shape), grads.view(weight.shape)


def assert_close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """A few roundings of float32 and one of the dtype; the gradient's also of the sum that reaches the maximum."""
    for a, b, size in zip(got, wanted, (0.0, float(wanted[1].abs().max())), strict=True):
        sums = torch.finfo(torch.float64 if a.dtype == torch.float64 else torch.float32).eps
        room = (torch.finfo(a.dtype).eps + 32 * sums) * b.abs() + 8 * sums * size
        bad = ~((a.double() - b).abs() <= room + torch.finfo(a.dtype).smallest_normal)
        assert not bad.any(), (a.double()[bad][:4], b[bad][:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_formulas(per_channel: bool, dtype: torch.dtype) -> None:
    """Every bit-width gives what the formulas give in double, the gradient at the greatest weight included, with the
    maximum held constant or not, in every layout."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = ((torch.randn(6, 5, 3, 3, generator=generator) * 0.4).to(dtype) for _ in range(2))
    sparse = torch.full((6, 5, 3, 6), torch.nan, dtype=dtype)[..., ::2].copy_(weight)
    for bits in range(1, 9):
        for detach in (False, True):
            exact = expected(weight, bits, grad, per_channel, detach)
            for laid_out in (weight, weight.contiguous(memory_format=torch.channels_last), sparse):
                got = run(laid_out, bits, grad, per_channel=per_channel, detach_max=detach)
                assert_close(got, exact)
                assert got[0].stride() == torch.empty_like(laid_out).stride() and got[0].dtype == dtype
                assert_close(reference(laid_out, bits, grad, per_channel, detach), exact)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 30.0])
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_sizes(scale: float, bits: int) -> None:
    """Weights of any size: tanh keeps its relative precision where it is nearly linear, and saturates where it does."""
    generator = torch.Generator().manual_seed(1)
    weight, grad = (torch.randn(333, generator=generator) for _ in range(2))
    weight *= scale
    exact = expected(weight, bits, grad)
    for got in (run(weight, bits, grad), reference(weight, bits, grad)):
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-6, atol=0)
        # 1 - t^2 of a saturated tanh is what is left of float32.
        torch.testing.assert_close(got[1].double(), exact[1], rtol=2e-5, atol=float(exact[1].abs().max()) * 3e-7)


def test_equal_maxima_share_the_gradient() -> None:
    """The gradient through the maximum is split evenly among equal maxima of both signs, as amax splits it; each
    channel among its own."""
    weight = torch.tensor([[0.5, -0.5, 0.1, 0.5], [0.2, -0.2, 0.1, 0.0]])
    grad = torch.tensor([[1.0, 2.0, -3.0, 4.0], [0.5, 0.25, 1.0, -1.0]])
    for per_channel in (False, True):
        exact = expected(weight, 3, grad, per_channel)
        for got in (run(weight, 3, grad, per_channel=per_channel), reference(weight, 3, grad, per_channel)):
            assert_close(got, exact)
    leaf = weight.double().requires_grad_()
    squashed = leaf.tanh()
    level = 7 * (squashed / (2 * squashed.abs().amax()) + 0.5)
    through = 2 * (level + (level.round() - level).detach()) / 7 - 1
    (wanted,) = torch.autograd.grad(through, leaf, grad.double())
    torch.testing.assert_close(run(weight, 3, grad)[1].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_zeros(per_channel: bool) -> None:
    """Weights that are all zero become 1 / n (0 with a single bit), and their gradient passes; so do subnormal ones."""
    grad = torch.arange(1.0, 7).view(2, 3)
    for weight in (torch.zeros(2, 3), torch.full((2, 3), 1e-45)):
        for bits in range(1, 9):
            for got in (run(weight, bits, grad, per_channel=per_channel), reference(weight, bits, grad, per_channel)):
                wanted = torch.full((2, 3), 1 / (2**bits - 1) if bits > 1 else float(weight[0, 0]))
                torch.testing.assert_close(got[0], wanted, rtol=1e-6, atol=0)
                assert torch.equal(got[1], grad)
    weight = torch.tensor([[0.0, -0.0, 0.3]])
    assert torch.equal(run(weight, 1, grad[:1])[0], torch.full((1, 3), 0.1))  # the sign of zero is +1


def test_nan_and_infinity() -> None:
    """A NaN makes all that shares its maximum NaN; infinite weights are as good as saturated ones."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    weight[1, 17] = torch.nan
    for bits in (1, 3):
        for per_channel in (False, True):
            for got in (
                run(weight, bits, weight, per_channel=per_channel),
                reference(weight, bits, weight, per_channel),
            ):
                assert got[0].isnan().all(1).tolist() == [not per_channel, True, not per_channel]
                assert got[0].isnan().any(1).tolist() == [not per_channel, True, not per_channel]
    weight[1, 17] = torch.inf
    out, grad = run(weight, 3, torch.ones_like(weight))
    assert out.isfinite().all() and grad.isfinite().all() and out[1, 17] == 1 and grad[1, 17] == 0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    """Nothing to quantize gives nothing."""
    for bits in (1, 2):
        for per_channel in (False, True):
            weight = torch.empty(shape)
            assert [value.shape for value in run(weight, bits, weight, per_channel=per_channel)] == [shape, shape]


@pytest.mark.parametrize("per_channel", [False, True])
def test_lsq_is_fake_quant(per_channel: bool) -> None:
    """LSQ of weights is fake_quant of signed codes, with a step for all or for each output channel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=generator)
    step = torch.rand((2, 5) if per_channel else (2,), generator=generator) + 0.1
    bits = torch.tensor([2, 4], dtype=torch.int32)
    got = ops.quantize_weights(weight, bits, index=1, mode="lsq", step=step, per_channel=per_channel)
    wanted = ops.fake_quant(weight, step, bits, index=1, signed=True, axis=0 if per_channel else None)
    assert identical(got, wanted)


WEIGHT = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("given", "options", "kind", "message"),
    [
        (([1.0], 2), {}, TypeError, "weight must be a tensor, got list"),
        ((WEIGHT.int(), 2), {}, TypeError, "weight must be float32, .* got torch.int32"),
        ((WEIGHT, 9), {}, InputError, "bits must be from 1 to 8, got 9"),
        ((WEIGHT, 2.0), {}, TypeError, "bits must be an int or an integer tensor, got float"),
        ((WEIGHT, BITS), {"index": 8}, InputError, "index must be from 0 to 7, got 8"),
        ((WEIGHT, BITS.long()), {}, TypeError, "bits must be int32, got torch.int64"),
        ((WEIGHT, 2), {"mode": "pact"}, InputError, "mode must be dorefa or lsq, got 'pact'"),
        ((WEIGHT, 2), {"mode": "lsq"}, InputError, "step must be given for lsq and for nothing else, got mode 'lsq'"),
        ((WEIGHT, 2), {"step": torch.ones(1)}, InputError, "step must be given for lsq .*, got mode 'dorefa'"),
        ((WEIGHT[0, 0], 2), {"per_channel": True}, InputError, "weight must have output channels"),
        (
            (WEIGHT, 2),
            {"mode": "lsq", "step": torch.ones(1, 2), "per_channel": True},
            InputError,
            r"step must be \[1, 3\]",
        ),
    ],
)
def test_errors(given: tuple, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(kind, match=message) as caught:
        ops.quantize_weights(*given, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("per_channel", [False, True])
def test_same_bits_for_any_number_of_threads(per_channel: bool) -> None:
    """Sums are taken in an order that the shape fixes, whatever torch's number of threads."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(70, 300, 3, 3, generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        for bits in (1, 3):
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run(weight, bits, grad, per_channel=per_channel))
            assert identical(results[1:], [results[0]] * 2)
    finally:
        torch.set_num_threads(threads)


def test_opcheck() -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    weight = torch.randn(3, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.spos_fast.dorefa_weights.default, (weight, BITS, torch.tensor(2), True, False))
    (grad,) = torch.autograd.grad(ops.quantize_weights(weight, 3).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="quantize_weights is differentiable once"):
        grad.sum().backward()
