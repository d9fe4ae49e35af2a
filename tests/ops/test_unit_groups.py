"""Groups of the fused units: runs that stand one behind the other in a batch, each as a call of its own would be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.ops.dispatch import OPS
from tests.ops.unit_samples import KINDS, LAST, SMALL, Sizes, image, normalised, unit

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Samples are those of one group. The second and the fourth are small enough to go one group to a thread, the last one
# is not.
SIZES = (
    Sizes(3, 12, 9, 7, 20, 13, 10, 5),
    Sizes(2, 24, 3, 3, 24, 24, 12, 3, affine=True),
    Sizes(1, 6, 1, 3, 5, 5, 4, 7),
    Sizes(2, 7, 11, 5, 10, 7, 9, 3, affine=True, stride=2, projects=True),
    Sizes(2, 8, 6, 7, 9, 9, 4, 3, device_width=5),
    Sizes(2, 36, 72, 70, 20, 20, 18, 3),
)


def given(kind: str, size: Sizes, groups: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any, Any, Any]:
    """Images of all groups, the main branch's weights, the keywords, and scale and shift of every group."""
    torch.manual_seed(0)
    main, keywords = unit(kind, size, dtype)
    width = size.mid if size.device_width is None else torch.tensor(size.device_width, dtype=torch.int32)
    x = image(groups * size.samples, size.channels, size.height, size.width, dtype=dtype)
    count = normalised(kind, replace(size, mid=size.stored) if size.device_width else size)
    keywords |= {"mid": width}
    return x, main, keywords, torch.rand(2, groups, count) + 0.5


def affine(size: Sizes, vectors: Tensor) -> dict[str, Tensor]:
    """gamma and beta, of all groups, where the unit has them."""
    return {"gamma": vectors[0, 0], "beta": vectors[1, 0] - 1} if size.affine else {}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_of_a_call_of_its_own(kind: str, size: Sizes, threads: int) -> None:
    """Output, statistics and x's gradient of every group, trained and folded, with any number of threads.

    Gradients of what all groups share are the sums of theirs.
    """
    groups = 3 if size.height < 70 else 2
    x, main, keywords, vectors = given(kind, size, groups)
    keywords |= affine(size, vectors)
    inputs = [x.requires_grad_(), *(weight.requires_grad_() for weight in main)]
    train, infer = getattr(ops, kind), getattr(ops, f"{kind}_infer")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = train(*inputs, **keywords, groups=groups)
        grad = torch.randn(made.out.shape).contiguous(memory_format=LAST)
        dx, *gradients = torch.autograd.grad(made.out, inputs, grad)
        with torch.no_grad():
            plain = {name: keywords[name] for name in ("projection", "stride", "mid")}
            alone = train(*inputs, **keywords, groups=groups)
            folded = [infer(*inputs, scale, vectors[1], **plain, groups=groups) for scale in (vectors[0], None)]
        assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))
        total = [torch.zeros_like(value) for value in gradients]
        for group in range(groups):
            here = slice(group * size.samples, (group + 1) * size.samples)
            own = [x[here].detach().requires_grad_(), *inputs[1:]]
            wanted = train(*own, **keywords)
            assert torch.equal(made.out[here], wanted.out)
            assert torch.equal(made.mean[group], wanted.mean) and torch.equal(made.var[group], wanted.var)
            own_dx, *own_gradients = torch.autograd.grad(wanted.out, own, grad[here])
            assert torch.equal(dx[here], own_dx)
            total = [a + b for a, b in zip(total, own_gradients, strict=True)]
            with torch.no_grad():
                for scale, got in zip((vectors[0], None), folded, strict=True):
                    pair = None if scale is None else scale[group], vectors[1, group]
                    assert torch.equal(got[here], infer(*own, *pair, **plain))
        assert all(torch.equal(a, b) for a, b in zip(gradients, total, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    """Gradients of every input against finite differences in double: in training, and folded."""
    size = Sizes(2, 2, 2, 3, 2, 2, 2, 3)
    x, main, _, vectors = given(kind, size, 2, torch.float64)
    vectors, count = vectors.double(), len(main)
    train, infer = getattr(ops, kind), getattr(ops, f"{kind}_infer")
    inputs = [value.requires_grad_() for value in (x, *main, vectors[0, 0].clone(), vectors[1, 0].clone())]
    assert torch.autograd.gradcheck(lambda *v: train(*v, groups=2).out, inputs)
    inputs = [*inputs[: count + 1], *(value.clone().requires_grad_() for value in vectors)]
    assert torch.autograd.gradcheck(lambda *v: infer(*v, groups=2), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_group(kind: str) -> None:
    """An image with NaN, or a scale of NaN, changes no bit of the other groups, and shows in its own."""
    x, main, keywords, vectors = given(kind, SMALL, 4)
    spoiled = x.clone(memory_format=torch.preserve_format)
    spoiled[3, 1, 0, 0] = torch.nan
    train, infer = getattr(ops, kind), getattr(ops, f"{kind}_infer")
    scales = vectors[0].clone()
    scales[1] = torch.nan
    pairs = [
        (train(x, *main, **keywords, groups=4), train(spoiled, *main, **keywords, groups=4)),
        [(infer(value, *main, *vectors, **keywords, groups=4),) for value in (x, spoiled)],
        [(infer(x, *main, scale, vectors[1], **keywords, groups=4),) for scale in (vectors[0], scales)],
    ]
    for clean, got in pairs:
        for a, b in zip(clean, got, strict=True):
            a, b = a.unflatten(0, (4, -1)), b.unflatten(0, (4, -1))
            assert b[1].isnan().any()
            assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """The groups' shares of every tensor are found whatever the size of an element."""
    x, main, keywords, vectors = given("shuffle_unit", SIZES[0], 2, dtype)
    made = ops.shuffle_unit(x, *main, **keywords, groups=2)
    folded = ops.shuffle_unit_infer(x, *main, *vectors, **keywords, groups=2)
    for group, part in enumerate(x.chunk(2)):
        wanted = ops.shuffle_unit(part, *main, **keywords)
        assert torch.equal(made.out.chunk(2)[group], wanted.out) and torch.equal(made.var[group], wanted.var)
        assert torch.equal(folded.chunk(2)[group], ops.shuffle_unit_infer(part, *main, *vectors[:, group], **keywords))


def test_depthwise_pass() -> None:
    """The raw op behind the units on a GPU: every group's bits, and gradients through output, mean and m2."""
    torch.manual_seed(0)
    op = torch.ops.spos_fast.dw_bnstats
    x, weight = image(6, 5, 4, 3).requires_grad_(), torch.randn(6, 1, 3, 3, requires_grad=True)
    scale, shift = (vector.requires_grad_() for vector in torch.randn(2, 3, 5).unbind())
    made = op(x, weight, scale, shift, True, 2, 5, None, 3)
    parts = zip(x.chunk(3), scale, shift, strict=True)
    alone = [
        torch.stack(value) for value in zip(*(op(a, weight, *b, True, 2, 5, None) for a, *b in parts), strict=True)
    ]
    alone[0] = alone[0].flatten(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))
    grads = [torch.randn_like(value) for value in made]
    inputs = (x, weight, scale, shift)
    for got, wanted in zip(
        torch.autograd.grad(made, inputs, grads), torch.autograd.grad(alone, inputs, grads), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    with pytest.raises((RuntimeError, InputError), match="groups must divide"):
        op(x, weight, None, None, True, 2, 5, None, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind: str) -> None:
    """torch.compile takes grouped units in one graph, forwards and backwards, trained and folded."""
    x, main, keywords, vectors = given(kind, SMALL, 2)
    x.requires_grad_()

    def run(x: Tensor) -> Tensor:
        made = getattr(ops, kind)(x * 2, *main, **keywords, groups=2)
        folded = getattr(ops, f"{kind}_infer")(made.out, *main, *vectors, **keywords, groups=2)
        return folded.square().sum() + made.mean.sum()

    (wanted,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", [kind + suffix for kind in KINDS for suffix in ("", "_infer")])
def test_groups_that_do_not_divide(name: str) -> None:
    """Named before anything is computed."""
    x, main, keywords, vectors = given(name.removesuffix("_infer"), SMALL, 3)
    late = (*vectors[:, 0],) if name.endswith("_infer") else ()
    for groups in (0, -1, 4):
        with pytest.raises(InputError, match=f"groups must divide the 6 images of x into equal runs, got {groups}"):
            getattr(ops, name)(x, *main, *late, **keywords, groups=groups)
    for groups, kind in ((2.0, "float"), (True, "bool")):
        with pytest.raises(TypeError, match=f"groups must be an int, got {kind}"):
            getattr(ops, name)(x, *main, *late, **keywords, groups=groups)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_another_shape(kind: str) -> None:
    """Every group has a scale and a shift; gamma and beta belong to all; one group has flat vectors."""
    x, main, keywords, vectors = given(kind, SMALL, 2)
    count = vectors.shape[-1]
    infer, train = getattr(ops, f"{kind}_infer"), getattr(ops, kind)
    for scale, shift in ((vectors[0, 0], vectors[1]), (vectors[0], vectors[1].flatten()), (vectors[0, :1], vectors[1])):
        with pytest.raises(InputError, match=rf"(scale|shift) must be \[2, {count}\]"):
            infer(x, *main, scale, shift, **keywords, groups=2)
    with pytest.raises(InputError, match=rf"scale must be \[{count}\]"):
        infer(x, *main, *vectors[:, :1], **keywords)
    with pytest.raises(InputError, match=rf"gamma must be \[{count}\]"):
        train(x, *main, vectors[0], **keywords, groups=2)


def test_one_pixel_a_group() -> None:
    """As many pixels as groups: no group has a variance."""
    x, main, keywords, _ = given("shuffle_unit", replace(SMALL, samples=1, height=1, width=1), 3)
    with pytest.raises(InputError, match=r"at least two pixels.* for 3 groups"):
        ops.shuffle_unit(x, *main, **keywords, groups=3)


def test_raw_op_checks_too() -> None:
    """Past the public functions nothing is read that is not there."""
    x, main, _, vectors = given("shuffle_unit", SMALL, 2)
    rest = (*main, None, None)
    train, infer = OPS["shuffle_unit"].overload, OPS["shuffle_unit_infer"].overload
    with pytest.raises((RuntimeError, InputError), match="groups must divide"):
        train(x, *rest, None, None, 4, None, 1, 1e-5, True, 3)
    with pytest.raises((RuntimeError, InputError), match="scale must be"):
        infer(x, *rest, vectors[0, 0], vectors[1], 4, None, 1, 2)
