"""bn_add_relu and its gradients against double precision, and as a torch citizen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.errors import InputError
from tests.ops.test_every_op import identical

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LAST = torch.channels_last
SHAPES = [(2, 64, 7, 7), (3, 5, 4, 9), (1, 1, 1, 1), (2, 33, 1, 6), (4, 160, 30, 30)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, groups: int = 1, projected: bool = True) -> list[Tensor]:
    """x, scale, shift, residual (and its scale and shift) as the op takes them."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    values = [torch.randn(groups, shape[1], generator=generator, dtype=wide) for _ in range(4)]
    return [x, values[0], values[1], residual, *(values[2:] if projected else ())]


def exact(given: list[Tensor], groups: int = 1) -> Tensor:
    """The formula in double precision."""
    x, residual = (given[place].double().unflatten(0, (groups, -1)) for place in (0, 3))
    scale, shift, *beside = (given[place].double()[:, None, :, None, None] for place in (1, 2, 4, 5)[: len(given) - 2])
    added = residual * beside[0] + beside[1] if beside else residual
    return (x * scale + shift + added).relu().flatten(0, 1)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, projected: bool) -> None:
    """The result is the formula's, rounded once; the sum before the ReLU may cancel."""
    given = arguments(shape, dtype, projected=projected)
    out = ops.bn_add_relu(*given)
    assert out.dtype == dtype and out.is_contiguous(memory_format=LAST)
    bound = torch.finfo(dtype).eps * exact(given).abs() + 32 * torch.finfo(given[1].dtype).eps
    assert ((out - exact(given)).abs() <= bound).all()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, ...], projected: bool) -> None:
    """Gradients of all arguments are those of the formula in double precision."""
    given = [value.requires_grad_() for value in arguments(shape, torch.float32, projected=projected)]
    out = ops.bn_add_relu(*given)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=LAST)
    got = torch.autograd.grad(out, given, grad)
    wide = [value.detach().double().requires_grad_() for value in given]
    # Where the sum is within a rounding of 0, the mask is the op's.
    mask = (out > 0).double()
    x, scale, shift, residual = wide[:4]
    added = residual * wide[4][0, :, None, None] + wide[5][0, :, None, None] if projected else residual
    y = (x * scale[0, :, None, None] + shift[0, :, None, None] + added) * mask
    for one, other in zip(got, torch.autograd.grad(y, wide, grad.double()), strict=True):
        assert (one - other).abs().max() <= 2e-6 * (1 + other.abs().max() + shape[0] * shape[2] * shape[3] ** 0.5)


def test_gradcheck() -> None:
    """Also with groups, in double precision."""
    given = [value.requires_grad_() for value in arguments((4, 3, 3, 2), torch.float64, groups=2)]
    torch.autograd.gradcheck(lambda *values: ops.bn_add_relu(*values, groups=2), given)


@pytest.mark.parametrize("projected", [False, True])
def test_a_group_has_the_bits_of_a_call_of_its_own(projected: bool) -> None:
    """Groups lie side by side and do not touch."""
    given = arguments((6, 40, 13, 13), torch.float32, 3, projected)
    out = ops.bn_add_relu(*given, groups=3)
    parts = [[*value.chunk(3)] for value in given]
    assert identical(out, torch.cat([ops.bn_add_relu(*few) for few in zip(*parts, strict=True)]))


def test_the_same_bits_for_any_number_of_threads() -> None:
    """Sums are added in an order that the shape fixes."""
    given = [value.requires_grad_() for value in arguments((8, 96, 28, 28), torch.float32)]
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = ops.bn_add_relu(*given)
            found.append([out, *torch.autograd.grad(out, given, torch.ones_like(out))])
    finally:
        torch.set_num_threads(threads)
    assert all(identical(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("place", [0, 3])
def test_bad_values_stay_where_they_are(place: int) -> None:
    """ReLU swallows no NaN."""
    given = arguments((2, 20, 5, 5), torch.float32)
    given[place][1, 7, 2, 3] = torch.nan
    out = ops.bn_add_relu(*given)
    assert out[1, 7, 2, 3].isnan() and out.isnan().sum() == 1


def test_mistakes_are_named() -> None:
    """Shapes and dtypes that do not fit are refused in one line."""
    x, scale, shift, residual, *beside = arguments((2, 8, 3, 3), torch.float32)
    with pytest.raises(InputError, match=r"residual must be \[2, 8, 3, 3\]"):
        ops.bn_add_relu(x, scale, shift, residual[:1])
    with pytest.raises(TypeError, match="residual must have the dtype of x"):
        ops.bn_add_relu(x, scale, shift, residual.double())
    with pytest.raises(InputError, match="together"):
        ops.bn_add_relu(x, scale, shift, residual, beside[0])
    with pytest.raises(InputError, match="groups must divide"):
        ops.bn_add_relu(x, scale, shift, residual, groups=3)
