"""The fused units as torch citizens: compilers, autocast, layouts, autograd, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.ops import layout
from tests.ops.samples import SAMPLES
from tests.ops.unit_samples import KINDS, LAST, SMALL, Sizes, image, normalised, unit

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("suffix", ["", "_backward", "_infer", "_infer_backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, suffix: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch, as torch itself checks them."""
    op = getattr(torch.ops.spos_fast, kind + suffix).default
    samples = SAMPLES[kind + suffix]()
    grouped = [] if "backward" in suffix else samples[-1:]
    for position, arguments in enumerate((*samples[:7:3], *grouped)):
        # The third has a width on the device; with save=False, for what is saved of absent channels is not specified.
        grad = "backward" not in suffix and position != 2
        inputs = [
            v.detach().requires_grad_(grad) if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments
        ]
        torch.library.opcheck(op, tuple(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str) -> None:
    """NCHW, sliced and strided inputs give the values of the packed channels-last one, with one warning in all."""
    x = image(2, 8, 5, 6)
    main, _ = unit(kind, SMALL)
    op = getattr(ops, kind)
    wanted = op(x, *main).out
    wide = torch.full((2, 20, 5, 6), torch.nan).contiguous(memory_format=LAST)
    wide[:, 4:12] = x
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    layout._warned.discard(kind)
    with pytest.warns(RuntimeWarning, match=f"{kind}: x is not channels last") as caught:
        for value in (x.contiguous(), wide[:, 4:12], transposed):
            out = op(value, *main).out
            assert torch.equal(out, wanted) and out.is_contiguous(memory_format=LAST)
    assert len(caught) == 1
    strided = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in main]
    assert torch.equal(op(x, *strided).out, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folded", [False, True])
def test_compile_and_export(kind: str, folded: bool) -> None:
    """torch.compile and torch.export take the unit in one graph, forwards and backwards."""
    size = Sizes(2, 8, 5, 6, 6, 5, 4, 3)
    main, _ = unit(kind, size)
    vectors = torch.rand(2, normalised(kind, size)) + 0.5
    x = image(2, 8, 5, 6).requires_grad_()

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if folded:
                return getattr(ops, f"{kind}_infer")(x * 2, *main, *vectors, mid=5).square().sum()
            made = getattr(ops, kind)(x * 2, *main, mid=5)
            return made.out.square().sum() + made.mean.sum()

    (wanted,) = torch.autograd.grad(Net()(x), x)
    (got,) = torch.autograd.grad(torch.compile(Net(), fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, wanted)
    exported = torch.export.export(Net(), (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), Net()(x.detach()))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, compiled: bool) -> None:
    """Under autocast the unit runs in its dtype, and statistics and the weights' gradients stay wide."""
    x, (main, _) = image(2, 8, 5, 6), unit(kind, SMALL)
    main = [weight.requires_grad_() for weight in main]

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = getattr(ops, kind)(x, *main)
            with torch.no_grad():
                folded = getattr(ops, f"{kind}_infer")(x, *main, None, torch.zeros_like(made.mean))
        return made.out, made.mean, folded

    out, mean, folded = torch.compile(run, fullgraph=True, backend="aot_eager")(x) if compiled else run(x)
    assert out.dtype == folded.dtype == torch.bfloat16 and mean.dtype == torch.float32
    out.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in main)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_show(kind: str) -> None:
    """A NaN in a channel of the branch shows in its output (ReLU does not swallow it); a passing one only passes."""
    main, _ = unit(kind, SMALL)
    vectors = torch.ones(2, normalised(kind, SMALL))
    for channel, spoils in ((1, True), (2, False)):
        x = image(2, 8, 5, 6)
        x[0, channel, 2, 2] = torch.nan
        for out in (getattr(ops, kind)(x, *main).out, getattr(ops, f"{kind}_infer")(x, *main, *vectors)):
            assert bool(out[:, 4:].isnan().any()) == spoils


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(2, 7, 3, 3)}, InputError, "x must have an even number of channels"),
        ({"x": torch.zeros(1, 8, 1, 1)}, InputError, "at least two pixels"),
        ({"x": torch.zeros(2, 8, 3)}, InputError, "x must have 4 dimensions"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"pw1": torch.zeros(5, 3, 1, 1)}, InputError, r"pw1 must be \[5, 4, 1, 1\] .* got \[5, 3, 1, 1\]"),
        ({"dw": torch.zeros(5, 1, 2, 2)}, InputError, "odd kernel size, got 2"),
        ({"dw": torch.zeros(4, 1, 3, 3)}, InputError, r"dw must be \[5, 1, 3, 3\]"),
        ({"pw2": torch.zeros(4, 6, 1, 1)}, InputError, r"pw2 must be \[4, 5, 1, 1\]"),
        ({"pw2": torch.zeros(4, 5, 1, 1).double()}, TypeError, "pw2 must have the dtype of x"),
        ({"gamma": torch.zeros(13)}, InputError, r"gamma must be \[14\]"),
        ({"mid": 6}, InputError, "mid must be from 1 to 5"),
        ({"mid": 0}, InputError, "mid must be from 1 to 5"),
        ({"mid": 2.0}, TypeError, "mid must be an int or an int32 tensor, got float"),
        ({"mid": torch.tensor(3)}, TypeError, r"mid must be .* got torch.int64 \[\]"),
        ({"stride": 2}, InputError, "stride must be 1 for a unit without projection"),
        ({"stride": 3}, InputError, "stride must be 1 or 2, got 3"),
        ({"projection": (torch.zeros(8, 1, 3, 3), torch.zeros(8, 4, 1, 1))}, InputError, "must be"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    pw1, dw, pw2 = unit("shuffle_unit", Sizes(2, 8, 3, 3, 5, 5, 4, 3))[0]
    with pytest.raises(kind, match=message) as caught:
        ops.shuffle_unit(**{"x": image(2, 8, 3, 3), "pw1": pw1, "dw": dw, "pw2": pw2, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_needs_what_is_saved(kind: str) -> None:
    """Backward after save=False is refused, not read from memory that is not there."""
    x, (main, _) = image(2, 8, 3, 3), unit(kind, SMALL)
    rest = (*main, None, None, None, None, 4, None, 1, 1e-5)
    out, *saved = getattr(torch.ops.spos_fast, kind)(x, *rest, False)
    with pytest.raises((RuntimeError, InputError), match="save"):
        getattr(torch.ops.spos_fast, f"{kind}_backward")(out, x, *saved, *rest)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_nobodys_views(kind: str) -> None:
    """Outputs small and large may be written to in place, as those of plain modules may."""
    for side in (5, 220):
        size = Sizes(2, 16, side, side, 8, 8, 8, 3)
        main, _ = unit(kind, size)
        x = image(2, 16, side, side).requires_grad_()
        out = getattr(ops, kind)(x, *main).out
        out += 1
        out.sum().backward()
        with torch.no_grad():
            folded = getattr(ops, f"{kind}_infer")(x, *main, None, torch.zeros(normalised(kind, size)))
        assert not folded._is_view()
        folded.mul_(torch.ones(1, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind: str) -> None:
    """An error, not a gradient that is silently zero."""
    main, _ = unit(kind, SMALL)
    x = image(2, 8, 5, 6).requires_grad_()
    (grad,) = torch.autograd.grad(getattr(ops, kind)(x, *main).out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{kind} is differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_of_what_is_cast_already(kind: str) -> None:
    """A unit behind a unit, under autocast: images come in its dtype, weights in float32."""
    main, _ = unit(kind, SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = getattr(ops, kind)(image(2, 8, 5, 6), *main).out
        assert getattr(ops, kind)(first, *main).out.dtype == torch.bfloat16
