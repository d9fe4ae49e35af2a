"""The fused units' Triton launchers under Triton's interpreter. Run by test_triton_units.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from spos_fast.errors import InputError
from spos_fast.kernels import units
from spos_fast.ops.dispatch import OPS, Choice
from tests.ops.interpreter import (
    Arguments,
    NoWordToTheHost,
    assert_equal_in_double,
    assert_twice_eagers_error_at_most,
    image,
)
from tests.ops.test_every_op import identical, tensors
from tests.ops.unit_samples import Sizes, normalised, weights

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KINDS = ["shuffle_unit", "xception_unit"]
# Passing channels and projections, strides, kernels, widths by int and by tensor; odd numbers throughout. Small: the
# interpreter is slow.
SPLIT = Sizes(2, 10, 4, 3, 9, 7, 6, 3)
AFFINE = Sizes(1, 6, 5, 4, 8, 8, 3, 3, affine=True)
STRIDED = Sizes(2, 5, 5, 4, 9, 7, 6, 3, affine=True, stride=2, projects=True)
PROJECTED = Sizes(1, 3, 3, 3, 6, 6, 7, 5, projects=True)
ON_DEVICE = Sizes(2, 8, 3, 4, 11, 9, 5, 3, affine=True, device_width=6)
SIZES = [SPLIT, AFFINE, STRIDED, PROJECTED, ON_DEVICE]
LARGER = Sizes(2, 36, 7, 6, 40, 33, 20, 3, affine=True)  # enough values for rounding errors to average


@pytest.fixture(params=["triton", "native"])
def depthwise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which depthwise kernels the launchers find: Triton's, or native ones, for which the reference stands in."""
    return use_depthwise(request.param, monkeypatch)


@pytest.fixture
def triton_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's depthwise kernels."""
    use_depthwise("triton", monkeypatch)


def use_depthwise(kernel: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the launchers find this kind of depthwise kernel."""
    for name in ("dw_bnstats", "dw_bnstats_backward"):
        choices = {"cpu": Choice(kernel, "set by the test")}
        monkeypatch.setitem(OPS, name, replace(OPS[name], overload=OPS[name].reference, choices=choices))
    return kernel


def given(kind: str, size: Sizes, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of the training op, up to the stride."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.samples, size.channels, size.height, size.width, generator=generator) + 0.5
    stored = [None if w is None else w.to(dtype) for w in weights(kind, size, generator)]
    count = normalised(kind, size)
    gamma = 0.5 + torch.rand(count, generator=generator) if size.affine else None
    beta = torch.randn(count, generator=generator) if size.affine else None
    width = None if size.device_width is None else torch.tensor(size.device_width, dtype=torch.int32)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return x, *stored, gamma, beta, size.mid, width, size.stride


def given_backward(kind: str, size: Sizes, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of the backward op."""
    x, *rest = given(kind, size, dtype)
    out, *saved = OPS[kind].reference(x, *rest)
    torch.manual_seed(1)
    return image(*out.shape, dtype=dtype), x, *saved, *rest


def given_infer(kind: str, size: Sizes, dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments of the inference op; a scale only where the unit is affine."""
    x, *stored, gamma, _, mid, width, stride = given(kind, size, dtype)
    torch.manual_seed(2)
    return x, *stored, gamma, torch.randn(normalised(kind, size)), mid, width, stride


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_double(kind: str, size: Sizes, depthwise: str) -> None:
    """In double the launchers are the reference up to rounding, forwards, backwards and in inference."""
    # What is saved of channels beyond a device's width is not specified.
    forward = (*given(kind, size), 1e-3, size.device_width is None)
    assert_equal_in_double(getattr(units, kind), OPS[kind].reference, forward)
    backward = given_backward(kind, size, torch.float64)
    assert_equal_in_double(getattr(units, f"{kind}_backward"), OPS[f"{kind}_backward"].reference, backward)
    if depthwise == "triton":
        infer = given_infer(kind, size)
        assert_equal_in_double(getattr(units, f"{kind}_infer"), OPS[f"{kind}_infer"].reference, infer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_twice_eagers_error_at_most(kind: str, dtype: torch.dtype, triton_only: None) -> None:
    """The error rule, in the dtypes that the interpreter multiplies correctly."""
    for suffix, arguments in (("", given), ("_backward", given_backward), ("_infer", given_infer)):
        name = kind + suffix
        assert_twice_eagers_error_at_most(getattr(units, name), OPS[name].reference, arguments(kind, LARGER, dtype))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("shuffle_unit", replace(SPLIT, mid=4)), ("shuffle_unit", ON_DEVICE), ("xception_unit", ON_DEVICE)],
    ids=str,
)
def test_nothing_outside_of_the_slice(kind: str, size: Sizes, triton_only: None) -> None:
    """NaN in all weights that are not used changes no bit; their gradients are exactly zero, absent statistics too."""
    used = size.device_width or size.mid
    x, *rest = given(kind, size)
    count = 3 if kind == "shuffle_unit" else 6
    spoiled = [weight.clone() for weight in rest[:count]]
    for weight in spoiled:
        for dim in (0, 1):
            if weight.shape[dim] == size.stored:
                weight.narrow(dim, used, size.stored - used).fill_(torch.nan)
    clean = getattr(units, kind)(x, *rest)
    made = getattr(units, kind)(x, *spoiled, *rest[count:])
    assert identical((clean[0], *clean[2:]), (made[0], *made[2:]))
    if size.device_width is not None:
        assert all((vector == 0).sum() >= 2 * (size.mid - used) for vector in made[2:])
    grad = image(*clean[0].shape)
    wanted = getattr(units, f"{kind}_backward")(grad, x, *clean[1:], *rest)
    got = getattr(units, f"{kind}_backward")(grad, x, *made[1:], *spoiled, *rest[count:])
    assert identical(wanted, got)
    assert all(gradient.isfinite().all() for gradient in got)
    for weight, gradient in zip(spoiled, got[1:], strict=False):
        assert not gradient[weight.isnan()].any()
    shift = torch.randn(normalised(kind, size))
    infer = getattr(units, f"{kind}_infer")
    late = (None, shift, *rest[-3:])
    assert identical(infer(x, *rest[: count + 2], *late), infer(x, *spoiled, *rest[count : count + 2], *late))


@pytest.mark.parametrize(
    ("kind", "size"), [("shuffle_unit", replace(STRIDED, device_width=3)), ("xception_unit", SPLIT)], ids=str
)
def test_same_bits_and_no_word_to_the_host(kind: str, size: Sizes, triton_only: None) -> None:
    """Repeated calls give the same bits, with or without saving, and nothing waits for the device."""
    forward = given(kind, size)
    with NoWordToTheHost():
        first, alone = getattr(units, kind)(*forward), getattr(units, kind)(*forward, 1e-5, False)
    assert identical((first[0], *first[2:]), (alone[0], *alone[2:])) and alone[1].numel() == 0
    arguments: dict[str, Any] = {"_backward": given_backward(kind, size), "_infer": given_infer(kind, size)}
    for suffix, values in arguments.items():
        kernel = getattr(units, kind + suffix)
        with NoWordToTheHost():
            first = kernel(*values)
        assert all(value.isfinite().all() for value in tensors(first))
        assert identical(first, kernel(*values))


@pytest.mark.parametrize(
    ("kind", "size", "save", "kernel"),
    [
        ("shuffle_unit", ON_DEVICE, False, "native"),
        ("shuffle_unit", AFFINE, True, "triton"),
        ("xception_unit", STRIDED, False, "triton"),
    ],
    ids=str,
)
def test_groups(kind: str, size: Sizes, save: bool, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group has the bits of a call of its own, with or without saving, and folded; NaN reaches no other."""
    use_depthwise(kernel, monkeypatch)
    x, *rest = given(kind, replace(size, samples=2 * size.samples))
    x[-1, -1, 0, 0] = torch.nan
    parts, (*stored, _, _), late = x.chunk(2), rest[:-3], rest[-3:]
    train, infer = getattr(units, kind), getattr(units, f"{kind}_infer")
    with NoWordToTheHost():
        made = train(x, *rest, 1e-3, save, 2)
    scales, shifts = torch.randn(2, 2, normalised(kind, size)).unbind()
    folded = infer(x, *stored, scales, shifts, *late, 2)
    for group, part in enumerate(parts):
        out, saved, mean, var = train(part, *rest, 1e-3, save)
        assert identical((made[0].chunk(2)[group], made[2][group], made[3][group]), (out, mean, var))
        assert made[1][group].shape == saved.shape
        assert bool(out.isnan().any()) == (group == 1)
        alone = infer(part, *stored, scales[group], shifts[group], *late)
        assert identical(folded.chunk(2)[group], alone)


def test_layouts(triton_only: None) -> None:
    """An image in NCHW, weights of another layout and a strided gradient give the bits of the packed ones."""
    x, *rest = given("shuffle_unit", SPLIT)
    turned = [rest[0].transpose(0, 1).contiguous().transpose(0, 1), *rest[1:]]
    wanted = units.shuffle_unit(x, *rest)
    assert identical(wanted, units.shuffle_unit(x.contiguous(), *turned))
    grad = image(*wanted[0].shape)
    assert identical(
        units.shuffle_unit_backward(grad, x, *wanted[1:], *rest),
        units.shuffle_unit_backward(grad.contiguous(), x.contiguous(), *wanted[1:], *turned),
    )


def test_mistakes_of_the_raw_ops_users() -> None:
    """Past the public functions too, nothing is read that is not there."""
    x, *rest = given("shuffle_unit", AFFINE)
    out, saved, mean, var = units.shuffle_unit(x, *rest, 1e-5, False)
    with pytest.raises(InputError, match="save"):
        units.shuffle_unit_backward(out, x, saved, mean, var, *rest)
    with pytest.raises(InputError, match="gamma must be"):
        units.shuffle_unit(x, *rest[:5], rest[5][1:], *rest[6:])
    with pytest.raises(InputError, match="shift must be"):
        units.shuffle_unit_infer(x, *rest[:5], None, rest[6][1:], *rest[7:])
