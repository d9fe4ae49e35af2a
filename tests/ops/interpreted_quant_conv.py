"""The Triton launcher of quant_conv2d under Triton's interpreter. Run by test_triton_quant_conv.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.kernels import matrix, quant_conv
from spos_fast.kernels.merging import merge_moments
from spos_fast.ops.dispatch import OPS
from tests.ops.interpreter import NoWordToTheHost
from tests.ops.samples import SAMPLES
from tests.ops.test_every_op import excess, identical

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[512, 1], ids=["a chunk a tile", "one chunk"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the rows are spread over programs: each its own tile, or one program that merges all tiles."""
    monkeypatch.setattr(matrix, "PROGRAMS", request.param)


# The interpreter cuts bfloat16 off where a GPU rounds to nearest.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_twice_eagers_error_at_most(dtype: torch.dtype) -> None:
    """The error rule of every kernel: every mode, groups, strides, padding, dilation, statistics; and the layout."""
    op = OPS["quant_conv2d"]
    found = [given for given in SAMPLES["quant_conv2d"]() if given[0].dtype == dtype]
    assert found
    for given in found:
        assert not excess(op, quant_conv.quant_conv2d, given, "cpu", 1)
        made, wanted = quant_conv.quant_conv2d(*given), op.reference(*given)
        assert [value.stride() for value in made] == [value.stride() for value in wanted]
        assert [value.dtype for value in made] == [value.dtype for value in wanted]


def codes(*size: int, bits: int) -> Tensor:
    """Random ones, with the ends among them."""
    made = torch.randint(0, 2**bits, size, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    made[0, 0, 0, :2] = torch.tensor([0, 2**bits - 1], dtype=torch.uint8)
    return made


def convolved(a: Tensor, w: Tensor, act_bits: int, weight_bits: int, mode: str, *settings: Any) -> Any:
    """convolve with steps of one, in double."""
    bits = torch.tensor([3, act_bits], dtype=torch.int32), torch.tensor([weight_bits, 2], dtype=torch.int32)
    one, unit = torch.tensor(1.0, dtype=torch.float64), torch.ones(len(w), dtype=torch.float64)
    return quant_conv.convolve(
        a, w, one, unit, None, bits[0], torch.tensor(1), bits[1], torch.tensor(0, dtype=torch.int32), mode,
        torch.float64, *settings, True
    )  # fmt: skip


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("mode", "weight_bits"), [("lsq", 4), ("lsq", 8), ("dorefa", 7), ("dorefa", 8)])
def test_sums_are_exact(act_bits: int, mode: str, weight_bits: int, programs: None) -> None:
    """Every bit of every sum, at borders too, with channels that fill no block and ones that fill several; DoReFa's 8
    bits have codes and a half. Statistics are those of the result."""
    torch.manual_seed(0)
    for size, out, kernel, settings in (
        ((2, 5, 7, 6), 9, (3, 3), ([1, 1], [1, 1], [1, 1])),
        ((1, 48, 5, 9), 80, (1, 3), ([2, 1], [0, 2], [1, 2])),
        ((2, 70, 4, 4), 16, (1, 1), ([2, 2], [0, 0], [1, 1])),
    ):
        a = codes(*size, bits=act_bits)
        w = torch.randint(-128 if weight_bits == 8 else -127, 128, (out, size[1], *kernel), dtype=torch.int8)
        made, found = convolved(a, w, act_bits, weight_bits, mode, *settings)
        half = 0.5 if (mode, weight_bits) == ("dorefa", 8) else 0.0
        wanted = functional.conv2d(a.double(), w.double() + half, None, *settings)
        assert torch.equal(made, wanted)
        mean, m2 = merge_moments(found, out, None)
        torch.testing.assert_close(mean, wanted.mean((0, 2, 3)), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(m2, wanted.var((0, 2, 3), correction=0) * wanted[:, 0].numel(), rtol=1e-12, atol=0)


def test_bits_are_read_on_the_device() -> None:
    """Nothing waits for the device, whichever the bits are, and the same call gives the same bits."""
    given = list(SAMPLES["quant_conv2d"]()[0])
    for index in (0, 4):
        given[7] = given[11] = torch.tensor(index)
        with NoWordToTheHost():
            first = quant_conv.quant_conv2d(*given)
        assert identical(first, quant_conv.quant_conv2d(*given))


@pytest.mark.parametrize("groups", [1, 3])
def test_nan_is_not_hidden(groups: int) -> None:
    """A NaN in the input makes all of the result NaN, as the step is; one in a weight its channel, with LSQ."""
    x, weight = torch.randn(1, 6, 5, 5), torch.randn(6, 6 // groups, 3, 3)
    bits, index = torch.tensor([8], dtype=torch.int32), torch.tensor(0)
    act = (torch.tensor([2.0]), bits, index, "pact")
    filters = (torch.tensor([0.05]), bits, index, "lsq", False)
    settings = ([1, 1], [1, 1], [1, 1], groups, False)
    weight[4, 1, 2, 0] = torch.nan
    out = quant_conv.quant_conv2d(x, weight, None, None, None, *act, *filters, *settings)[0]
    assert out.isnan().all((0, 2, 3)).tolist() == out.isnan().any((0, 2, 3)).tolist() == [c == 4 for c in range(6)]
    x[0, 3, 4, 4] = torch.nan
    assert quant_conv.quant_conv2d(x, weight, None, None, None, *act, *filters, *settings)[0].isnan().all()
