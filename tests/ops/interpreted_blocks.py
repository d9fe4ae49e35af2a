"""The building blocks' Triton launchers under Triton's interpreter. Run by test_triton_blocks.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from spos_fast.kernels import batchnorm, blocks, bn_add_relu, matrix
from spos_fast.ops.dispatch import OPS
from tests.ops.interpreter import (
    Arguments,
    NoWordToTheHost,
    assert_equal_in_double,
    assert_twice_eagers_error_at_most,
    image,
)
from tests.ops.samples import SAMPLES
from tests.ops.test_every_op import identical, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = sorted(
    ["bn_act_cat", "bn_act_cat_backward", "dw_bnstats", "dw_bnstats_backward", "pw_bnstats", "pw_bnstats_backward"]
)


def samples(name: str, dtype: torch.dtype, cost: int) -> list[Arguments]:
    """The samples of a dtype with at most ``cost`` pixels times filter taps: the interpreter is slow."""
    found = []
    for given in SAMPLES[name]():
        images = [value for value in given if isinstance(value, Tensor) and value.dim() == 4]
        pixels, taps = (max(value.shape[2] * value.shape[3] for value in part) for part in (images, images[-1:]))
        if images[0].dtype == dtype and (pixels if name.startswith(("bn", "pw")) else pixels * taps) <= cost:
            found.append(given)
    assert found
    return found


@pytest.fixture(params=[512, 1], ids=["a chunk a tile", "one chunk"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the rows are spread over programs: each its own tile, or one program that merges all tiles."""
    monkeypatch.setattr(matrix, "PROGRAMS", request.param)


@pytest.mark.parametrize("name", NAMES)
def test_double(name: str, programs: None) -> None:
    """In double every launcher is the reference up to rounding: odd sizes, slices, widths, strided gradients."""
    for given in samples(name, torch.float32, 400):
        assert_equal_in_double(getattr(blocks, name), OPS[name].reference, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_twice_eagers_error_at_most(name: str, dtype: torch.dtype) -> None:
    """The error rule of every kernel, in the dtypes that the interpreter multiplies correctly."""
    for given in samples(name, dtype, 400):
        assert_twice_eagers_error_at_most(getattr(blocks, name), OPS[name].reference, given)


@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product((3, 5, 7), (1, 2))))
def test_depthwise_kernels_and_strides(kernel: int, stride: int) -> None:
    """Every kernel size and stride, forwards and backwards, on sides that the stride does not divide."""
    torch.manual_seed(0)
    x, weight = image(1, 5, 6, 5), torch.randn(7, 1, kernel, kernel)
    scale, shift, centre = torch.rand(5) + 0.5, torch.randn(5), torch.randn(5)
    forward = (x, weight, scale, shift, True, stride, 5, None)
    assert_equal_in_double(blocks.dw_bnstats, OPS["dw_bnstats"].reference, forward)
    z = OPS["dw_bnstats"].reference(*forward)[0]
    norm = torch.randn(5, 5)
    backward = (image(*z.shape), z, norm, True, x, weight, scale, shift, centre, True, stride, 5, None)
    assert_equal_in_double(blocks.dw_bnstats_backward, OPS["dw_bnstats_backward"].reference, backward)


def test_more_channels_than_a_block() -> None:
    """Several blocks of rows, columns and depth, none of them full."""
    torch.manual_seed(0)
    x, weight = image(1, 145, 11, 7), torch.randn(80, 72, 1, 1) / 8
    forward = (x, weight, torch.rand(70) + 0.5, torch.randn(70), True, 1, 2, 70, 67, None, None)
    assert_equal_in_double(blocks.pw_bnstats, OPS["pw_bnstats"].reference, forward)
    assert_twice_eagers_error_at_most(blocks.pw_bnstats, OPS["pw_bnstats"].reference, forward)
    z, *_ = OPS["pw_bnstats"].reference(*forward)
    backward = (image(*z.shape), z, torch.randn(5, 67), True, x, weight, *forward[2:4], torch.randn(70), *forward[4:])
    assert_equal_in_double(blocks.pw_bnstats_backward, OPS["pw_bnstats_backward"].reference, backward)
    assert_twice_eagers_error_at_most(blocks.pw_bnstats_backward, OPS["pw_bnstats_backward"].reference, backward)


def poisoned(value: Tensor, *keep: slice) -> Tensor:
    """The value where it is kept, NaN elsewhere."""
    spoiled = torch.full_like(value, torch.nan)
    spoiled[keep] = value[keep]
    return spoiled


def test_nothing_outside_of_the_slice() -> None:
    """NaN in every channel that is not used, by int or by device width, changes no bit; gradients there are zero."""
    torch.manual_seed(0)
    used_in, used_out = 5, 6
    widths = torch.tensor(used_in, dtype=torch.int32), torch.tensor(used_out, dtype=torch.int32)
    x, weight = image(2, 17, 4, 3), torch.randn(9, 8, 1, 1)
    spoiled = poisoned(x, slice(None), slice(1, 1 + 2 * used_in, 2)), poisoned(weight, slice(used_out), slice(used_in))
    vectors = torch.rand(2, 8)
    scale, shift = vectors[:, :7]
    for ints, device in (((used_in, used_out), (None, None)), ((7, 8), widths)):
        affine = scale[: ints[0]], shift[: ints[0]]
        clean = blocks.pw_bnstats(x, weight, *affine, True, 1, 2, *ints, *device)
        made = blocks.pw_bnstats(*spoiled, *(poisoned(v, slice(used_in)) for v in affine), True, 1, 2, *ints, *device)
        assert identical(clean, made)
        assert not made[1][used_out:].any() and not made[2][used_out:].any()
        z, norm = made[0], torch.randn(5, ints[1])
        grad = image(*z.shape)
        kept = slice(None), slice(used_out)
        given = [grad, z, norm, True, x, weight, *affine, affine[0], True, 1, 2, *ints, *device]
        wanted = blocks.pw_bnstats_backward(*given)
        given[:3] = (poisoned(value, *kept) for value in (grad, z, norm))
        given[4:6] = spoiled
        made = blocks.pw_bnstats_backward(*given)
        assert identical(wanted, made)
        assert not made[0][:, used_in:].any() and not made[1][used_out:].any() and not made[1][:, used_in:].any()


def test_nothing_outside_of_the_depthwise_slice() -> None:
    """The same for depthwise convolutions."""
    torch.manual_seed(0)
    used, width = 4, torch.tensor(4, dtype=torch.int32)
    x, weight, scale, shift = image(1, 9, 4, 3), torch.randn(8, 1, 3, 3), torch.rand(7), torch.rand(7)
    columns = slice(None), slice(used)
    spoiled = poisoned(x, *columns), poisoned(weight, slice(used))
    for channels, device in ((used, None), (7, width)):
        affine = scale[:channels], shift[:channels]
        clean = blocks.dw_bnstats(x, weight, *affine, True, 1, channels, device)
        made = blocks.dw_bnstats(*spoiled, *(poisoned(v, slice(used)) for v in affine), True, 1, channels, device)
        assert identical(clean, made)
        assert not made[1][used:].any() and not made[2][used:].any()
        z, norm = made[0], torch.randn(5, channels)
        given: list[Any] = [image(*z.shape), z, norm, True, x, weight, *affine, affine[0], True, 1, channels, device]
        wanted = blocks.dw_bnstats_backward(*given)
        given[:3] = (poisoned(value, *columns) for value in given[:3])
        given[4:6] = spoiled
        made = blocks.dw_bnstats_backward(*given)
        assert identical(wanted, made)
        assert not made[0][:, used:].any() and not made[1][used:].any()


@pytest.mark.parametrize("ratio", [1, 100, 1000])
def test_large_means(ratio: int, programs: None) -> None:
    """|mean| / std up to 1000: statistics at most twice as far from those of z in double as eager's var_mean."""
    torch.manual_seed(0)
    x, weight = image(4, 3, 20, 16) * torch.tensor([1.0, 0.0, 0.0])[:, None, None] + 1, torch.zeros(2, 3, 1, 1)
    weight[:, 0, 0, 0], weight[:, 1, 0, 0] = 1, ratio - 1
    z, mean, m2 = blocks.pw_bnstats(x, weight, None, None, False, 0, 1, 3, 2, None, None)
    count = z.numel() // 2
    var, centre = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    eager_var, eager_mean = torch.var_mean(z, (0, 2, 3), correction=0)
    for got, eager, exact in ((mean, eager_mean, centre), (m2 / count, eager_var, var)):
        allowed = 2 * ((eager - exact) / exact).abs().max()
        assert ((got - exact) / exact).abs().max() <= max(float(allowed), 2e-7)


def test_bad_values_show() -> None:
    """ReLU on load does not swallow a NaN."""
    x = image(1, 3, 3, 3)
    x[0, 1, 1, 1] = torch.nan
    z, mean, _ = blocks.pw_bnstats(x, torch.ones(2, 3, 1, 1), None, None, True, 0, 1, 3, 2, None, None)
    assert mean.isnan().all() and z.isnan().sum() == 2
    z, mean, _ = blocks.dw_bnstats(x, torch.ones(3, 1, 3, 3), None, None, True, 1, 3, None)
    assert mean.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_and_no_word_to_the_host(name: str) -> None:
    """Repeated calls give the same bits, out of memory full of NaN, and nothing waits for the device."""
    for given in samples(name, torch.float16, 400):
        first = getattr(blocks, name)(*given)
        assert all(value.isfinite().all() for value in tensors(first))
        with NoWordToTheHost():
            again = getattr(blocks, name)(*given)
        assert identical(first, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_normalize(dtype: torch.dtype) -> None:
    """Every layout that the launcher treats by itself, with groups: the error rule, the layout, and the same bits."""
    reference = OPS["bn_normalize"].reference
    for given in samples("bn_normalize", dtype, 400):
        assert_twice_eagers_error_at_most(batchnorm.bn_normalize, reference, given)
        with NoWordToTheHost():
            made = batchnorm.bn_normalize(*given)
        wanted = reference(*given)
        assert identical(made, batchnorm.bn_normalize(*given))
        for layout in (torch.contiguous_format, torch.channels_last):
            assert made.is_contiguous(memory_format=layout) == wanted.is_contiguous(memory_format=layout)


ADD_RELU = {"bn_add_relu": bn_add_relu.bn_add_relu, "bn_add_relu_backward": bn_add_relu.bn_add_relu_backward}


@pytest.mark.parametrize("name", list(ADD_RELU))
def test_add_relu_in_double(name: str, programs: None) -> None:
    """The end of a residual block, with groups, with and without a batch norm in the shortcut, and its sums over
    chunks of any size."""
    for given in samples(name, torch.float32, 400):
        assert_equal_in_double(ADD_RELU[name], OPS[name].reference, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(ADD_RELU))
def test_add_relu(name: str, dtype: torch.dtype) -> None:
    """The error rule, no word to the host, and the same bits again."""
    for given in samples(name, dtype, 400):
        assert_twice_eagers_error_at_most(ADD_RELU[name], OPS[name].reference, given)
        with NoWordToTheHost():
            made = ADD_RELU[name](*given)
        assert identical(made, ADD_RELU[name](*given))


@pytest.mark.parametrize("projected", [False, True])
def test_add_relu_groups_and_nan(projected: bool) -> None:
    """A group has the bits of a call of its own; ReLU swallows no NaN, and a gradient passes where one is."""
    given = next(given for given in samples("bn_add_relu", torch.float32, 400) if given[-1] == 2)
    x, scale, shift, residual, _, _, groups = given
    beside = (scale + 1, shift) if projected else (None, None)
    x = x.clone(memory_format=torch.channels_last)
    x[-1, 3, 2, 1] = torch.nan
    given = (x, scale, shift, residual, *beside)
    out = bn_add_relu.bn_add_relu(*given, groups)
    assert out.isnan().nonzero().tolist() == [[x.shape[0] - 1, 3, 2, 1]]
    grad = image(*x.shape)
    made = bn_add_relu.bn_add_relu_backward(grad, out, x, scale, residual, beside[0], groups)
    assert made[0][-1, 3, 2, 1] == grad[-1, 3, 2, 1] * scale[-1, 3]

    def halves(values: Any) -> list[Any]:
        return list(values.chunk(groups)) if isinstance(values, Tensor) else [values] * groups

    for group, few in enumerate(zip(*map(halves, given), strict=True)):
        assert identical(halves(out)[group], bn_add_relu.bn_add_relu(*few))
        few = [halves(value)[group] for value in (grad, out, x, scale, residual, beside[0])]
        found = bn_add_relu.bn_add_relu_backward(*few, 1)
        assert identical([halves(value)[group] for value in made if value.numel()], [v for v in found if v.numel()])
