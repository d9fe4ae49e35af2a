"""The fused units against double, sliced and in full. Shapes and dtypes: unit_samples.py, test_every_op.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from spos_fast import ops
from spos_fast.ops.dispatch import OPS
from tests.ops.samples import SAMPLES
from tests.ops.unit_samples import KINDS, LAST, SMALL, Sizes, image, normalised, unit

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def eager(kind: str, x: Tensor, main: list[Tensor], projection: list[Tensor], stride: int) -> Tensor:
    """The unit as one writes it with torch.nn.functional, without scale and shift."""

    def dw(y: Tensor, w: Tensor, stride: int = 1) -> Tensor:
        return norm(functional.conv2d(y, w, stride=stride, padding=w.shape[2] // 2, groups=w.shape[0]))

    def pw(y: Tensor, w: Tensor) -> Tensor:
        return norm(functional.conv2d(y, w)).relu()

    def norm(z: Tensor) -> Tensor:
        return functional.batch_norm(z, None, None, None, None, True)

    y = x if projection else x[:, 1::2]
    if kind == "shuffle_unit":
        y = pw(dw(pw(y, main[0]), main[1], stride), main[2])
    else:
        y = pw(dw(y, main[0], stride), main[1])
        y = pw(dw(pw(dw(y, main[2]), main[3]), main[4]), main[5])
    beside = pw(dw(x, projection[0], stride), projection[1]) if projection else x[:, ::2]
    return torch.cat((beside, y), 1)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, in the 2-norm; a NaN is infinite."""
    value = float((got.double() - wanted).norm() / wanted.norm())
    return value if value == value else float("inf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        Sizes(4, 64, 28, 28, 32, 32, 32, 3),
        Sizes(4, 160, 14, 14, 80, 80, 80, 5),
        Sizes(4, 320, 7, 7, 160, 160, 160, 7),
        Sizes(4, 36, 13, 13, 18, 18, 18, 3),
        Sizes(4, 24, 15, 14, 20, 20, 30, 5, stride=2, projects=True),
    ],
    ids=str,
)
def test_twice_eagers_error_at_most(kind: str, size: Sizes, dtype: torch.dtype) -> None:
    """Output and all gradients: error against double at most twice that of eager PyTorch in the same dtype.

    Where rounding moves a value across zero, ReLU's gradient is all or nothing, for eager as for the op: the floor.
    """
    torch.manual_seed(0)
    main, given = unit(kind, size, dtype)
    projection = list(given["projection"] or ())
    inputs = [image(size.samples, size.channels, size.height, size.width, dtype=dtype), *main, *projection]
    count = len(main)

    def theirs(x: Tensor, *stored: Tensor) -> Tensor:
        return eager(kind, x, list(stored[:count]), list(stored[count:]), size.stride)

    def ours(x: Tensor, *stored: Tensor) -> Tensor:
        beside = stored[count:] or None
        return getattr(ops, kind)(x, *stored[:count], projection=beside, stride=size.stride).out

    grad = torch.randn(theirs(*inputs).shape, dtype=dtype).contiguous(memory_format=LAST)

    def run(function: Any, inputs: list[Tensor]) -> list[Tensor]:
        inputs = [value.detach().clone(memory_format=torch.preserve_format).requires_grad_() for value in inputs]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    exact = run(theirs, [value.double() for value in inputs])
    epsilon = torch.finfo(dtype).eps
    for place, (got, other, wanted) in enumerate(zip(run(ours, inputs), run(theirs, inputs), exact, strict=True)):
        # A share `epsilon` of the values may change sides at a ReLU, each an error as large as the value.
        floor = 4 * epsilon if place == 0 else 2 * epsilon**0.5
        assert error(got, wanted) <= max(2 * error(other, wanted), floor), place


GRADIENTS = (
    Sizes(2, 6, 4, 3, 5, 5, 4, 3),
    Sizes(2, 6, 4, 3, 5, 3, 4, 3, affine=True),
    Sizes(2, 3, 5, 4, 4, 3, 3, 3, affine=True, stride=2, projects=True),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", GRADIENTS, ids=str)
def test_gradients(kind: str, size: Sizes) -> None:
    """Gradients of every input against finite differences in double: in training, and folded."""
    torch.manual_seed(0)
    main, given = unit(kind, size, torch.float64)
    count, vectors = len(main), normalised(kind, size)
    inputs = [image(size.samples, size.channels, size.height, size.width, dtype=torch.float64), *main]
    inputs += list(given["projection"] or ())
    affine = [torch.rand(vectors).double() + 0.5, torch.randn(vectors).double()]

    def run(op: Any, two: int, *values: Tensor) -> Tensor:
        x, stored, beside, pair = values[0], values[1 : count + 1], values[count + 1 : len(values) - two], values[-two:]
        return op(x, *stored, *(pair if two else ()), projection=beside or None, mid=size.mid, stride=size.stride)

    trained = [value.requires_grad_() for value in (inputs + affine if size.affine else inputs)]
    assert torch.autograd.gradcheck(lambda *v: run(getattr(ops, kind), 2 * size.affine, *v).out, trained)
    folded = [value.requires_grad_() for value in inputs + affine]
    assert torch.autograd.gradcheck(lambda *v: run(getattr(ops, f"{kind}_infer"), 2, *v), folded)


@pytest.mark.parametrize("suffix", ["", "_backward", "_infer"])
@pytest.mark.parametrize("kind", KINDS)
def test_double(kind: str, suffix: str) -> None:
    """In double the kernel is the reference up to rounding, on every shape: both are off by that much."""
    op = OPS[kind + suffix]
    for arguments in SAMPLES[kind + suffix]():
        wide = tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments)
        got, wanted = op.overload(*wide), op.reference(*wide)
        for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (got, wanted)), strict=True):
            assert a.dtype == torch.float64
            assert a.numel() == 0 or (a - b).norm() <= 2e-14 * b.norm().clamp_min(1e-30)


def extracted(kind: str, main: list[Tensor], mid: int) -> list[Tensor]:
    """The weights of the slice, as a unit of its own has them."""
    if kind == "shuffle_unit":
        return [main[0][:mid].clone(), main[1][:mid].clone(), main[2][:, :mid].clone()]
    return [
        main[0].clone(),
        main[1][:mid].clone(),
        main[2][:mid].clone(),
        main[3][:mid, :mid].clone(),
        main[4][:mid].clone(),
        main[5][:, :mid].clone(),
    ]


def spoiled(kind: str, main: list[Tensor], mid: int) -> list[Tensor]:
    """The stored weights with NaN outside of the slice."""
    found = []
    for small, weight in zip(extracted(kind, main, mid), main, strict=True):
        whole = torch.full_like(weight, torch.nan)
        whole[: small.shape[0], : small.shape[1]] = small
        found.append(whole)
    return found


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mid", "stored"), [(1, 40), (7, 33), (16, 33), (33, 40)])
def test_slice_is_the_extracted_unit(kind: str, projects: bool, mid: int, stored: int) -> None:
    """``mid`` of the stored channels, NaN in the others: the bits of a unit of only those; no gradient outside.

    As a tensor: the same values, zeros for what is absent, and one call serves every width.
    """
    torch.manual_seed(0)
    size = Sizes(2, 12, 6, 5, stored, mid, 10, 3, stride=1 + projects, projects=projects)
    main, given = unit(kind, size)
    x = image(2, 12, 6, 5).requires_grad_()
    full = [w.requires_grad_() for w in spoiled(kind, main, mid)]
    small = [w.requires_grad_() for w in extracted(kind, main, mid)]
    op, infer = getattr(ops, kind), getattr(ops, f"{kind}_infer")
    alone = op(x, *small, **given)
    grad = torch.randn(alone.out.shape).contiguous(memory_format=LAST)
    wanted = torch.autograd.grad(alone.out, [x, *small], grad)
    for width in (mid, torch.tensor(mid, dtype=torch.int32)):
        sliced = op(x, *full, mid=width, **given)
        assert torch.equal(sliced.out, alone.out)
        got = torch.autograd.grad(sliced.out, [x, *full], grad)
        assert torch.equal(got[0], wanted[0])
        for whole, part in zip(got[1:], wanted[1:], strict=True):
            assert torch.equal(whole[: part.shape[0], : part.shape[1]], part)
            outside = whole.clone()
            outside[: part.shape[0], : part.shape[1]] = 0
            assert not outside.any()  # exactly zero
        kept = sliced.var if isinstance(width, int) else sliced.var[sliced.var > 0]
        assert torch.equal(kept, alone.var)
        assert isinstance(width, int) or not sliced.mean[sliced.var == 0].any()
    vectors = torch.rand(2, normalised(kind, size)) + 0.5
    with torch.no_grad():
        assert torch.equal(infer(x, *full, *vectors, mid=mid, **given), infer(x, *small, *vectors, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_slice(kind: str) -> None:
    """Without scale and shift a mask over the 1x1 convolutions' outputs, full width, gives the slice's output."""
    torch.manual_seed(0)
    size = Sizes(2, 12, 6, 5, 20, 9, 10, 3)
    main, given = unit(kind, size)
    masked = [w.clone() for w in main]
    for weight in masked[:1] if kind == "shuffle_unit" else (masked[1], masked[3]):
        weight[size.mid :] = 0
    x = image(2, 12, 6, 5)
    op = getattr(ops, kind)
    torch.testing.assert_close(op(x, *masked, **given).out, op(x, *main, mid=size.mid, **given).out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [
        Sizes(8, 64, 28, 28, 24, 24, 32, 5),
        Sizes(5, 40, 9, 9, 70, 70, 20, 3),
        Sizes(1, 12, 90, 77, 5, 5, 6, 3),
        Sizes(3, 20, 41, 33, 30, 30, 24, 5, stride=2, projects=True),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(kind: str, size: Sizes) -> None:
    """Outputs, statistics and gradients do not depend on how many threads torch has, nor on what is kept."""
    if OPS[kind].choices["cpu"].kernel == "reference":
        pytest.skip("no native kernel in this build; PyTorch's own sums depend on its threads")
    main, given = unit(kind, size)
    x = image(size.samples, size.channels, size.height, size.width).requires_grad_()
    inputs = [x, *(w.requires_grad_() for w in main)]
    vectors = torch.rand(2, normalised(kind, size)) + 0.5
    op, infer = getattr(ops, kind), getattr(ops, f"{kind}_infer")
    grad = torch.randn(op(*inputs, **given).out.shape).contiguous(memory_format=LAST)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            made = op(*inputs, **given)
            with torch.no_grad():
                alone = op(*inputs, **given)
                folded = infer(*inputs, *vectors, **given)
            results.append([*made, *alone, folded, *torch.autograd.grad(made.out, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:3], results[0][3:6], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_all_widths(kind: str) -> None:
    """Captured once with a width on the device, replayed with others: the values of plain calls with an int."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.manual_seed(0)
    size = Sizes(4, 24, 14, 14, 20, 20, 12, 5)
    main, given = unit(kind, size)
    x, *main = (value.cuda().requires_grad_() for value in (image(4, 24, 14, 14), *main))
    width = torch.tensor(20, dtype=torch.int32, device="cuda")
    op = getattr(ops, kind)
    grad = torch.randn(4, 24, 14, 14, device="cuda").contiguous(memory_format=LAST)

    def run(mid: int | Tensor) -> list[Tensor]:
        out = op(x, *main, mid=mid, **given).out
        return [out.detach(), *torch.autograd.grad(out, [x, *main], grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(width)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(width)
    for mid in (1, 7, 20, 16):
        width.fill_(mid)
        graph.replay()
        for got, wanted in zip(outputs, run(mid), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pixel_is_enough_without_variances(kind: str) -> None:
    """Folded units take an image of one pixel, as plain modules in evaluation do."""
    main, _ = unit(kind, SMALL)
    vectors = torch.rand(2, normalised(kind, SMALL)) + 0.5
    x = image(1, 8, 1, 1)
    both = getattr(ops, f"{kind}_infer")(torch.cat((x, x)).contiguous(memory_format=LAST), *main, *vectors)
    torch.testing.assert_close(getattr(ops, f"{kind}_infer")(x, *main, *vectors), both[:1])


@pytest.mark.parametrize("width", [-3, 0, 9, 100])
def test_widths_out_of_range(width: int) -> None:
    """A width on the device counts from 1 to what is stored, in training as in inference."""
    main, _ = unit("shuffle_unit", SMALL)
    x, vectors = image(2, 8, 5, 6), torch.rand(2, normalised("shuffle_unit", SMALL)) + 0.5
    given, meant = (torch.tensor(value, dtype=torch.int32) for value in (width, min(max(width, 1), 4)))
    for op in (ops.shuffle_unit, lambda *a, **k: (ops.shuffle_unit_infer(*a, *vectors, **k),)):
        assert torch.equal(op(x, *main, mid=given)[0], op(x, *main, mid=meant)[0])
