"""Codes of activations and weights against the formulas in double, and against the fake-quantized values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.ops.quant_codes import dequantize_codes, quantize_codes, quantize_codes_backward, weight_codes
from tests.ops import quant_formulas
from tests.ops.test_batchnorm import DTYPES
from tests.ops.test_every_op import identical

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BITS = torch.arange(1, 9, dtype=torch.int32)
MODES = ["pact", "pact_residual", "lsq"]
LAST = torch.channels_last


def image(dtype: torch.dtype, shape: tuple[int, ...] = (3, 19, 4, 5)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, grad, scale and shift."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, grad, *torch.randn(2, shape[1], generator=generator, dtype=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prologue", [False, True])
def test_activation_formulas(prologue: bool, mode: str, dtype: torch.dtype) -> None:
    """Codes of scale * x + shift, and the four gradients, as the formulas give them in double, for every layout."""
    x, grad, scale, shift = image(dtype)
    affine = (scale, shift) if prologue else (None, None)
    y = x.double() * scale.double()[:, None, None] + shift.double()[:, None, None] if prologue else x.double()
    for bits in range(1, 9):
        parameter = 1.9123457 if mode.startswith("pact") else 2.7182818 / 2**bits
        step = torch.full((8,), parameter, dtype=scale.dtype)
        exact = quant_formulas.fake_quant(
            y.flatten().tolist(), grad.flatten().tolist(), float(step[0]), bits, mode, False
        )
        through = torch.tensor(exact.grad_x, dtype=torch.float64).view(x.shape)
        rest = (*affine, step, BITS, torch.tensor(bits - 1), mode)
        for laid_out in (x, x.contiguous(memory_format=LAST)):
            for forward, backward in (
                (quantize_codes, quantize_codes_backward),
                (ops.quantize_codes_reference, ops.quantize_codes_backward_reference),
            ):
                codes, used = forward(laid_out, *rest)
                assert codes.dtype == torch.uint8 and codes.is_contiguous(memory_format=LAST)
                assert codes.flatten().tolist() == exact.codes
                assert float(used) == pytest.approx(quant_formulas.step_of(float(step[0]), bits, mode), rel=2e-7)
                grad_x, grad_step, grad_scale, grad_shift = backward(grad, laid_out, *rest)
                assert grad_x.dtype == dtype and grad_x.is_contiguous(memory_format=LAST)
                eps = torch.finfo(dtype).eps
                wanted = through * scale.double()[:, None, None] if prologue else through
                torch.testing.assert_close(grad_x.double(), wanted, rtol=2 * eps, atol=1e-30)
                expected = torch.zeros(8, dtype=torch.float64)
                expected[bits - 1] = exact.grad_step
                size = float(grad.double().abs().sum()) * (2**bits if mode == "lsq" else 1)
                torch.testing.assert_close(grad_step.double(), expected, rtol=1e-6, atol=1e-7 * size)
                sums = ((through * x.double()).sum((0, 2, 3)), through.sum((0, 2, 3)))
                for got, total in zip((grad_scale, grad_shift), sums, strict=True):
                    torch.testing.assert_close(got.double(), total if prologue else total * 0, rtol=1e-5, atol=1e-5)


def test_nan_shows_in_the_step() -> None:
    """Codes cannot hold a NaN: it is code 0, and the step that every result is multiplied by is NaN."""
    x, _, scale, shift = image(torch.float32)
    rest = (torch.ones(1), BITS[3:4], torch.tensor(0), "pact")
    for bad in (x, scale, shift):
        whole = bad.flatten().clone()
        whole[7] = torch.nan
        given = [whole.view(bad.shape) if value is bad else value for value in (x, scale, shift)]
        for run in (quantize_codes, ops.quantize_codes_reference):
            codes, used = run(*given, *rest)
            wrong = (given[0] * given[1][:, None, None] + given[2][:, None, None]).isnan()
            assert used.isnan() and not codes[wrong].any()
            assert not run(x, scale, shift, *rest)[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", ["dorefa", "lsq"])
def test_weight_codes_are_the_quantized_weights(mode: str, per_channel: bool, dtype: torch.dtype) -> None:
    """Codes times scale are what quantize_weights gives, rounded to the dtype; of DoReFa with 8 bits, of whose codes
    int8 holds half of one less, codes and a half."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(18, 5, 3, 3, generator=generator) * 0.3).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for bits in range(1, 9):
        step = None
        if mode == "lsq":
            step = (torch.rand((1, 18) if per_channel else (1,), generator=generator, dtype=wide) + 0.1) * 2 / 2**bits
        given = (step, BITS[bits - 1 : bits], torch.tensor(0), mode, per_channel)
        for laid_out in (weight, weight.contiguous(memory_format=LAST)):
            values = ops.quantize_weights(laid_out, bits, mode=mode, step=step, per_channel=per_channel)
            for run in (weight_codes, ops.weight_codes_reference):
                codes, scale = run(laid_out, *given)
                assert codes.dtype == torch.int8 and codes.stride() == laid_out.stride()
                assert scale.shape == (18,) and scale.dtype == wide
                half = 0.5 if mode == "dorefa" and bits == 8 else 0.0
                got = ((codes + half) * scale[:, None, None, None]).to(dtype)
                assert torch.equal(codes, weight_codes(laid_out, *given)[0])
                assert torch.equal(got, values) if run is weight_codes else torch.allclose(got, values, rtol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_nan_shows_in_the_weights_scale(per_channel: bool) -> None:
    """A weight that is NaN makes its channel's scale NaN, and those of all that share its maximum or mean."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    weight[1, 17] = torch.nan
    for mode, bits in (("dorefa", 1), ("dorefa", 3), ("lsq", 1), ("lsq", 3)):
        step = torch.full((1, 3) if per_channel else (1,), 0.3) if mode == "lsq" else None
        for run in (weight_codes, ops.weight_codes_reference):
            codes, scale = run(weight, step, BITS[bits - 1 : bits], torch.tensor(0), mode, per_channel)
            shared = mode == "dorefa" and not per_channel
            assert scale.isnan().tolist() == [shared, True, shared] and codes[1, 17] == 0


@pytest.mark.parametrize("mode", MODES)
def test_codes_times_step_are_fake_quant(mode: str) -> None:
    """Codes times the step are fake_quant's values bit for bit, and the gradients are its gradients."""
    x, grad, _, _ = image(torch.float32, (2, 7, 9, 9))
    step = torch.tensor([0.7]).requires_grad_()
    leaf = x.clone().requires_grad_()
    values = ops.fake_quant(leaf, step, 3, mode=mode)
    wanted = torch.autograd.grad(values, (leaf, step), grad)
    rest = (None, None, step.detach(), BITS[2:3], torch.tensor(0), mode)
    codes, used = quantize_codes(x, *rest)
    assert torch.equal(codes * used, values)
    grad_x, grad_step, *_ = quantize_codes_backward(grad, x, *rest)
    assert torch.equal(grad_x, wanted[0])
    torch.testing.assert_close(grad_step, wanted[1], rtol=1e-5, atol=1e-5)


def test_differentiating_codes_is_an_error() -> None:
    """Codes have no gradient; torch would warn and take zero."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    _, used = quantize_codes(x, None, None, torch.ones(1, requires_grad=True), BITS[:1], torch.tensor(0), "lsq")
    with pytest.raises(RuntimeError, match="quantize_codes has no gradient of its own; use quant_conv2d"):
        used.backward()


def test_errors_of_the_raw_ops() -> None:
    """What does not fit is refused instead of read."""
    x, grad, scale, shift = image(torch.float32)
    step, bits, index = torch.ones(2), BITS[:2], torch.tensor(0)
    for given in (
        (x, scale, None, step, bits, index, "lsq"),
        (x, scale[:3], shift[:3], step, bits, index, "lsq"),
        (x, None, None, step[:1], bits, index, "lsq"),
        (x, None, None, step.double(), bits, index, "lsq"),
        (x, None, None, step, bits, index, "lsq+"),
        (x, None, None, step, bits.long(), index, "lsq"),
        (x[0], None, None, step, bits, index, "lsq"),
        (x[:0], None, None, step, bits, index, "lsq"),
        (x.int(), None, None, step, bits, index, "lsq"),
    ):
        for run in (quantize_codes, ops.quantize_codes_reference):
            with pytest.raises((RuntimeError, ValueError, TypeError), match="must"):
                run(*given)
        for run in (quantize_codes_backward, ops.quantize_codes_backward_reference):
            with pytest.raises((RuntimeError, ValueError, TypeError), match="must"):
                run(grad, *given)
    for weight, given_step, mode in (
        (x[0, 0, 0, 0], None, "dorefa"),
        (x, None, "lsq"),
        (x, step, "dorefa"),
        (x, step, "pact"),
    ):
        for run in (weight_codes, ops.weight_codes_reference):
            with pytest.raises((RuntimeError, ValueError, TypeError), match="must"):
                run(weight, given_step, bits, index, mode, False)


@pytest.mark.parametrize("shape", [(9, 40, 33, 31), (2, 700, 5, 5), (40, 3, 64, 63)], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Sums are taken in an order that the shape fixes, whatever torch's number of threads."""
    x, grad, scale, shift = image(torch.float32, shape)
    given = (x, scale, shift, torch.ones(1), BITS[2:3], torch.tensor(0), "lsq")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((*quantize_codes(*given), *quantize_codes_backward(grad, *given)))
        assert identical(results[1:], [results[0]] * 2)
    finally:
        torch.set_num_threads(threads)


def test_opcheck() -> None:
    """Schemas, fake tensors and AOT dispatch, as torch itself checks them."""
    x, grad, scale, shift = image(torch.float32)
    rest = (scale, shift, torch.ones(8), BITS, torch.tensor(3), "lsq")
    torch.library.opcheck(torch.ops.spos_fast.quantize_codes.default, (x, *rest))
    torch.library.opcheck(torch.ops.spos_fast.quantize_codes_backward.default, (grad, x, *rest))
    torch.library.opcheck(
        torch.ops.spos_fast.weight_codes.default, (x, torch.ones(8, 3), BITS, torch.tensor(3), "lsq", True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_codes(dtype: torch.dtype) -> None:
    """Every code times the step, rounded once to the dtype, in the layout of the codes; a NaN step makes all NaN."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:765].view(3, 5, 17, 3)
    step = torch.tensor(0.37, dtype=wide)
    for laid_out in (codes, codes.contiguous(memory_format=LAST), codes[:, ::2], codes[:0]):
        wanted = (laid_out.to(wide) * step).to(dtype)
        for run in (dequantize_codes, ops.dequantize_codes_reference):
            got = run(laid_out, step, dtype)
            assert torch.equal(got, wanted) and got.stride() == torch.empty_like(laid_out).stride()
            assert run(laid_out, step * torch.nan, dtype).isnan().all()
    torch.library.opcheck(torch.ops.spos_fast.dequantize_codes.default, (codes, step, dtype))
    for bad in ((codes.int(), step), (codes, step[None]), (codes, step.half())):
        for run in (dequantize_codes, ops.dequantize_codes_reference):
            with pytest.raises((RuntimeError, ValueError, TypeError), match="must"):
                run(*bad, dtype)
