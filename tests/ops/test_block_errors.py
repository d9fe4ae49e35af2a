"""What the ops that units are made of say to arguments that do not fit: one line that names the mistake."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spos_fast import ops
from spos_fast.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.* has no kernel on cpu:RuntimeWarning")

SCALE, SHIFT = torch.rand(4), torch.rand(4)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 4, 3)}, InputError, r"x must be \[N, C, H, W\], got shape \[2, 4, 3\]"),
        ({"x": torch.zeros(0, 4, 3, 3)}, InputError, r"at least one value .* got shape \[0, 4, 3, 3\]"),
        ({"x": torch.zeros(2, 4, 3, 3).int()}, TypeError, "x must be float32, .* got torch.int32"),
        ({"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
        ({"weight": torch.zeros(3, 4, 1, 1).double()}, TypeError, "weight must have the dtype of x"),
        ({"weight": torch.zeros(3, 4)}, InputError, "weight must have 4 dimensions"),
        ({"weight": torch.zeros(3, 4, 3, 3)}, InputError, r"weight must be \[out, in, 1, 1\]"),
        ({"scale": SCALE}, InputError, "scale and shift must be given both or not at all"),
        ({"scale": SCALE[:3], "shift": SHIFT}, InputError, r"scale must be \[4\], .* got shape \[3\]"),
        ({"scale": SCALE.double(), "shift": SHIFT}, TypeError, "scale must be torch.float32 for x of torch.float32"),
        ({"channels_in": 5}, InputError, "channels_in must be from 1 to 4, .* got 5"),
        ({"channels_out": 0}, InputError, "channels_out must be from 1 to 3, .* got 0"),
        ({"channels_out": 2.0}, TypeError, "channels_out must be an int or an int32 tensor"),
        ({"channels_out": torch.tensor(2)}, TypeError, "channels_out must be an int or an int32 tensor"),
        ({"channels_in": torch.ones(1).int()}, InputError, r"channels_in must be .* got shape \[1\]"),
        ({"first": 1}, InputError, r"channels 1, 2, \.\.\. of x must be there, 4 in all; x has 4"),
        ({"step": 0}, InputError, "must be there"),
    ],
)
def test_errors_of_pw_bnstats(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(kind, match=message) as caught:
        ops.pw_bnstats(**{"x": torch.zeros(2, 4, 3, 3), "weight": torch.zeros(3, 4, 1, 1), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weight": torch.zeros(4, 1, 2, 2)}, InputError, "with an odd k, got shape"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, InputError, r"weight must be \[channels, 1, k, k\]"),
        ({"channels": 5}, InputError, "channels must be from 1 to 4, what weight and x have, got 5"),
        ({"channels": True}, TypeError, "channels must be an int or an int32 tensor"),
        ({"stride": 0}, InputError, "stride must be 1 or more, got 0"),
        ({"shift": SHIFT}, InputError, "scale and shift must be given both"),
    ],
)
def test_errors_of_dw_bnstats(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(kind, match=message) as caught:
        ops.dw_bnstats(**{"x": torch.zeros(2, 4, 3, 3), "weight": torch.zeros(4, 1, 3, 3), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"z": None}, TypeError, "z must be a tensor, got NoneType"),
        ({"scale": SCALE[:2]}, InputError, r"scale must be \[4\]"),
        ({"shift": None}, TypeError, "shift must be a tensor, got NoneType"),
        ({"other": torch.zeros(2, 4, 3, 3).double()}, TypeError, "other must have the dtype of z"),
        ({"other": torch.zeros(2, 4, 3, 2)}, InputError, "other must have the images of z"),
        ({"other_scale": SCALE}, InputError, "must be left out where there is no other"),
        (
            {"other": torch.zeros(2, 4, 3, 3), "other_scale": SCALE},
            InputError,
            "other_scale and other_shift must be given both",
        ),
    ],
)
def test_errors_of_bn_act_cat(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A mistake is named in one line."""
    with pytest.raises(kind, match=message) as caught:
        ops.bn_act_cat(**{"z": torch.zeros(2, 4, 3, 3), "scale": SCALE, "shift": SHIFT, **change})
    assert "\n" not in str(caught.value)


def test_errors_of_the_backward_ops() -> None:
    """Gradients and statistics of other sizes are refused, not read past their end."""
    x, pw, dw, norm = torch.zeros(2, 4, 3, 3), torch.zeros(3, 4, 1, 1), torch.zeros(4, 1, 3, 3), torch.zeros(5, 3)
    raw = torch.ops.spos_fast
    plain = x, pw, None, None, None, False, 0, 1, 4, 3, None, None
    for grad, z, rows in ((x, x[:, :3], norm), (x[:, :3], x, norm), (x[:, :3], x[:, :3], norm[:4])):
        with pytest.raises((RuntimeError, InputError), match="must"):
            raw.pw_bnstats_backward(grad, z, rows, False, *plain)
    with pytest.raises((RuntimeError, InputError), match="must"):
        raw.dw_bnstats_backward(x, x, norm, False, x, dw, None, None, None, False, 1, 4, None)
    for first in (-1, 1):
        with pytest.raises((RuntimeError, InputError), match="must"):
            raw.bn_act_cat_backward(x, first, x, SCALE, SHIFT, SHIFT, True)
