"""bn_normalize against double precision, and as a torch citizen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.errors import InputError
from tests.ops.test_batchnorm import DTYPES, SHAPES, layouts
from tests.ops.test_every_op import identical

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FORMATS = [torch.contiguous_format, torch.channels_last]


def affine(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """A scale and a shift for x, of both signs."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = torch.randn(2, groups, x.shape[1], generator=generator, dtype=dtype)
    return scale + 1, shift


def assert_exact(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, got: Tensor, groups: int = 1) -> None:
    """One rounding of the result, and of the sums a few."""
    wide, factor, offset = (
        value.double().unflatten(0, (groups, -1)) if value is x else value.double()[:, None, :, None, None]
        for value in (x, scale, shift)
    )
    exact = (wide * factor + offset).flatten(0, 1)
    size = ((wide * factor).abs() + offset.abs()).flatten(0, 1)
    exact = exact.relu() if relu else exact
    epsilon, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).smallest_normal
    assert got.dtype == x.dtype and got.shape == x.shape
    assert ((got - exact).abs() <= epsilon * exact.abs() + 4 * torch.finfo(scale.dtype).eps * size + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Any shape, dtype and layout gives what double precision gives, laid out as the docs say; NaN outside of a slice
    shows nowhere."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(dtype)
    scale, shift = affine(x)
    for relu in (False, True):
        for laid_out in layouts(x).values():
            last = shape[1] > 1 and laid_out.stride(1) == 1
            for got in (
                ops.bn_normalize(laid_out, scale, shift, relu=relu),
                ops.bn_normalize_reference(laid_out, scale, shift, relu),
            ):
                assert_exact(x, scale, shift, relu, got)
                assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(("groups", "shape"), [(2, (6, 10, 9, 9)), (6, (6, 3, 2, 5)), (4, (8, 58, 28, 28))])
def test_groups(groups: int, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Each run of samples has a scale and a shift of its own, and the bits of a call of its own; the last shape is
    large enough to be written past the caches."""
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    scale, shift = affine(x, groups)
    got = ops.bn_normalize(x, scale, shift, relu=True, groups=groups)
    assert_exact(x, scale, shift, True, got, groups)
    parts = zip(x.chunk(groups), scale[:, None], shift[:, None], strict=True)
    assert identical(got, torch.cat([ops.bn_normalize(part, a, b, relu=True) for part, a, b in parts]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_stay_where_they_are(bad: float) -> None:
    """ReLU swallows no NaN, and a bad value, or a candidate's bad scale, touches nothing else."""
    x = torch.randn(4, 20, 5, 5)
    scale, shift = affine(x, 2)
    scale[1, 7] = torch.nan
    x[1, 2, 3, 4] = bad
    for laid_out in layouts(x).values():
        got = ops.bn_normalize(laid_out, scale.abs(), shift, relu=True, groups=2)
        wrong = ~got.isfinite()
        assert wrong[1, 2, 3, 4] and got[2:, 7].isnan().all() and wrong.sum() == 1 + got[2:, 7].numel()


@pytest.mark.parametrize("shape", [(64, 24, 14, 14), (2, 700, 5, 5), (8, 3, 64, 64)], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Results do not depend on how many threads torch has."""
    threads = torch.get_num_threads()
    try:
        for x in layouts(torch.randn(shape)).values():
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(ops.bn_normalize(x, *affine(x, 2), relu=True, groups=2))
            assert identical(results[1:], [results[0]] * 2)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "dtype"), [("contiguous", torch.bfloat16), ("channels_last slice", torch.float32)], ids=str
)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    x = layouts(torch.randn(4, 3, 5, 6).to(dtype))[name].detach().requires_grad_(dtype == torch.float32)
    torch.library.opcheck(torch.ops.spos_fast.bn_normalize.default, (x, *affine(x, 2), True, 2))


@pytest.mark.parametrize("relu", [False, True])
def test_gradients(relu: bool) -> None:
    """First and second derivatives of everything against finite differences in double."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    given = x, *(value.requires_grad_() for value in affine(x, 2))

    def run(*given: Tensor) -> Tensor:
        return ops.bn_normalize(*given, relu=relu, groups=2)

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_gradients_of_halves() -> None:
    """Gradients have the dtypes of what they belong to and agree with the reference's."""
    x = torch.randn(4, 6, 5, 5).bfloat16()
    grads = []
    for run in (
        lambda *a: ops.bn_normalize(*a, relu=True, groups=2),
        lambda *a: ops.bn_normalize_reference(*a, True, 2),
    ):
        given = [value.detach().requires_grad_() for value in (x, *affine(x, 2))]
        (run(*given) * torch.arange(6)[:, None, None]).sum().backward()
        grads.append([value.grad for value in given])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


def test_compile_and_export() -> None:
    """torch.compile and torch.export take the op in one graph, in both layouts."""

    class Normalize(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return ops.bn_normalize(x * 2, scale, shift, relu=True, groups=2) + 1

    module = Normalize()
    for memory_format in FORMATS:
        x = torch.randn(4, 6, 5, 5).contiguous(memory_format=memory_format)
        given = x, *affine(x, 2)
        wanted = module(*given)
        assert identical(torch.compile(module, fullgraph=True, backend="aot_eager")(*given), wanted)
        assert identical(torch.export.export(module, given).module()(*given), wanted)


def test_autocast_leaves_the_dtype() -> None:
    """Under autocast an image keeps its dtype, as in torch's batch norm."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, 4, 4).to(dtype)
            assert ops.bn_normalize(x, *affine(x), relu=True).dtype == dtype


IMAGE, ROW = torch.zeros(4, 3, 2, 2), torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (([1.0], ROW, ROW, 1), TypeError, "x must be a tensor, got list"),
        ((IMAGE.int(), ROW, ROW, 1), TypeError, "x must be float32, .* got torch.int32"),
        ((IMAGE[0], ROW, ROW, 1), InputError, r"x must be \[N, C, H, W\], got shape \[3, 2, 2\]"),
        ((IMAGE[:0], ROW, ROW, 1), InputError, r"at least one value .* got shape \[0, 3, 2, 2\]"),
        ((IMAGE, ROW, ROW, 3), InputError, "groups must divide the batch of 4 samples, got 3"),
        ((IMAGE, ROW, ROW, 1.0), TypeError, "groups must be an int, got float"),
        ((IMAGE, ROW, ROW, 2), InputError, r"scale must be \[2, 3\], .* got shape \[1, 3\]"),
        ((IMAGE, ROW, ROW[0], 1), InputError, r"shift must be \[1, 3\], .* got shape \[3\]"),
        ((IMAGE, ROW.double(), ROW, 1), TypeError, "scale must be torch.float32 for x of torch.float32, got torch.fl"),
    ],
)
def test_errors(given: tuple, kind: type[Exception], message: str) -> None:
    """A mistake is named in one line, by the public function and by the reference alike."""
    *tensors, groups = given
    for run in (
        lambda: ops.bn_normalize(*tensors, relu=True, groups=groups),
        lambda: ops.bn_normalize_reference(*tensors, True, groups),
    ):
        with pytest.raises(kind, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)


def test_errors_of_the_raw_op() -> None:
    """Called past the public function, the kernel still refuses instead of reading what is not there."""
    for x, scale, groups in ((IMAGE, ROW, 3), (IMAGE, ROW, 2), (IMAGE, ROW[:, :2], 1), (IMAGE, ROW.double(), 1)):
        with pytest.raises((RuntimeError, InputError, TypeError), match="must"):
            torch.ops.spos_fast.bn_normalize(x, scale, scale, True, groups)


def test_the_schema_is_what_the_docs_say() -> None:
    """The op's schema is public: a change of it breaks exported graphs."""
    schema = str(torch.ops.spos_fast.bn_normalize.default._schema)
    assert schema == "spos_fast::bn_normalize(Tensor x, Tensor scale, Tensor shift, bool relu, int groups=1) -> Tensor"
