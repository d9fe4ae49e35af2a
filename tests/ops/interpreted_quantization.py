"""The quantization ops' Triton launchers under Triton's interpreter. Run by test_triton_quantization.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spos_fast.kernels import matrix, quantization, quantize_codes
from spos_fast.ops.dispatch import OPS
from tests.ops.interpreter import Arguments, NoWordToTheHost
from tests.ops.samples import SAMPLES
from tests.ops.test_every_op import errors, excess, identical, tensors, widened

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAUNCHERS = {
    "fake_quant": quantization.fake_quant,
    "fake_quant_backward": quantization.fake_quant_backward,
    "quantize_codes": quantize_codes.quantize_codes,
    "quantize_codes_backward": quantize_codes.quantize_codes_backward,
}
NAMES = list(LAUNCHERS)
BITS = torch.tensor([1, 2, 3, 4, 8], dtype=torch.int32)


def samples(name: str, dtype: torch.dtype) -> list[Arguments]:
    """Those of a dtype; the interpreter is slow, so not the large one."""
    found = [given for given in SAMPLES[name]() if given[0].dtype == dtype and given[0].numel() < 10000]
    assert found
    return found


@pytest.fixture(params=[512, 1], ids=["a chunk a tile", "one chunk"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the items are spread over programs: each its own tile, or one program that takes all."""
    monkeypatch.setattr(matrix, "PROGRAMS", request.param)


@pytest.mark.parametrize("name", NAMES)
def test_double(name: str, programs: None) -> None:
    """In double every launcher is the reference up to rounding, in values and layout: every mode, layout and axis."""
    for given in map(widened, samples(name, torch.float32)):
        made, wanted = LAUNCHERS[name](*given), OPS[name].reference(*given)
        assert max(errors(made, wanted)) <= 1e-12
        for value, like in zip(tensors(made), tensors(wanted), strict=True):
            assert value.dtype == like.dtype and value.stride() == like.stride()


# The interpreter cuts bfloat16 off where a GPU rounds to nearest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fake_quant", "fake_quant_backward", "quantize_codes_backward"])
def test_twice_eagers_error_at_most(name: str, dtype: torch.dtype) -> None:
    """The error rule of every kernel; over several draws where one alone decides against it."""
    kernel = LAUNCHERS[name]
    for given in samples(name, dtype):
        assert not excess(OPS[name], kernel, given, "cpu", 1) or not excess(OPS[name], kernel, given, "cpu", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes(dtype: torch.dtype) -> None:
    """Codes are those of the reference in the same dtype, but for rare ones a rounding error from a tie."""
    for given in samples("quantize_codes", dtype):
        (codes, step), (wanted, like) = quantize_codes.quantize_codes(*given), OPS["quantize_codes"].reference(*given)
        distance = (codes.int() - wanted.int()).abs()
        assert distance.max() <= 1 and distance.count_nonzero() <= 1 + distance.numel() // 10000
        assert torch.equal(step, like) and codes.stride() == wanted.stride()


@pytest.mark.parametrize("name", NAMES)
def test_no_word_to_the_host(name: str) -> None:
    """Nothing waits for the device, whichever the bits are; and the same call gives the same bits."""
    given = samples(name, torch.float32)[0]
    kernel = LAUNCHERS[name]
    with NoWordToTheHost():
        first = kernel(*given)
    assert identical(first, kernel(*given))


def single(values: list[float], bits: int, signed: bool) -> Tensor:
    """LSQ with a step of a quarter."""
    x = torch.tensor(values)
    return quantization.fake_quant(x, torch.tensor([-0.25]), None, torch.tensor([bits], dtype=torch.int32),
                                   torch.tensor(0), "lsq", signed, -1)  # fmt: skip


def test_ties_zeros_and_nan() -> None:
    """Ties go to the even code, a single signed bit gives zero the sign of a positive number, NaN stays one."""
    assert single([0.125, 0.375, 0.625, -0.125, 9.0], 2, False).tolist() == [0.0, 0.5, 0.5, 0.0, 0.75]
    assert single([0.125, -0.125, -0.375, 9.0, -9.0], 3, True).tolist() == [0.0, 0.0, -0.5, 0.75, -1.0]
    assert single([0.0, -0.0, -1e-9, 2.0], 1, True).tolist() == [0.25, 0.25, -0.25, 0.25]
    for bits, signed in ((1, True), (4, True), (4, False)):
        assert single([1.0, torch.nan, -1.0], bits, signed).isnan().tolist() == [False, True, False]


def test_nan_shows_in_the_step() -> None:
    """The code of a NaN is 0 and the step becomes NaN; without one it is the step, whatever lies beside the slice."""
    x = torch.full((2, 8, 5, 3), torch.nan).contiguous(memory_format=torch.channels_last)
    x[:, :5] = 1
    given = (None, None, torch.full((5,), 1.75), BITS, torch.tensor(2, dtype=torch.int32), "pact")
    codes, step = quantize_codes.quantize_codes(x[:, :5], *given)
    assert (codes == 4).all() and step == 0.25
    x[1, 2, 3, 1] = torch.nan
    codes, step = quantize_codes.quantize_codes(x[:, :5], *given)
    assert codes[1, 2, 3, 1] == 0 and step.isnan() and (codes == 4).sum() == codes.numel() - 1


@pytest.mark.parametrize("mode", ["pact", "pact_residual", "lsq", "lsq+"])
def test_nan_is_outside(mode: str) -> None:
    """No gradient passes a NaN and the step's becomes NaN, as the reference has it; other channels do not see it."""
    x, grad = torch.randn(2, 2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    x[1, 2, 0, 1] = torch.nan
    size, shift = torch.full((5, 5), 0.3), torch.full((5, 5), 0.1)
    channels = (size, shift if mode == "lsq+" else None, BITS, torch.tensor(2), mode, mode == "lsq", 1)
    codes = (1 + size[0], shift[0], size[0], BITS, torch.tensor(2), mode.removesuffix("+"))
    for name, given in (("fake_quant_backward", channels), ("quantize_codes_backward", codes)):
        made, wanted = LAUNCHERS[name](grad, x, *given), OPS[name].reference(grad, x, *given)
        assert made[0][1, 2, 0, 1] == 0 and made[0].isfinite().all() and made[1][2].isnan().sum() == 1
        for value, like in zip(made, wanted, strict=True):
            torch.testing.assert_close(value, like, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_empty() -> None:
    """No values: no launch, and gradients that are zero."""
    x, step = torch.empty(0, 3), torch.ones(5)
    given = (step, None, BITS, torch.tensor(0), "lsq", True, -1)
    assert quantization.fake_quant(x, *given).shape == x.shape
    _, grad_step, grad_offset = quantization.fake_quant_backward(x, x, *given)
    assert not grad_step.any() and not grad_offset.any()
