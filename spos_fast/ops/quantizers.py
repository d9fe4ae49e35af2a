"""What the quantization ops have in common: codes, steps, straight-through gradients and the checks of their arguments.

With k bits unsigned codes are 0 .. 2^k - 1, signed ones -2^(k-1) .. 2^(k-1) - 1. With v = (x - offset) / s the code is
v, clipped to [low, high] and rounded to nearest, ties to even; x becomes s * code + offset. A single signed bit has the
codes -1 and +1 only: the sign of v, +1 for zero. s = max(|p|, MIN_STEP) for LSQ and max(|p| / n, MIN_STEP) with
n = 2^k - 1 for PACT, whose parameter p is the clipping level: positive by construction. Gradients of the loss, from g,
that of the result:

============== ==================================================================================================
of x           g inside, that is, where low < v < high; 0 outside
of p, pact     sum of g where v >= high
of p, residual sum of g (code - v) / n inside and of g where v >= high (as composed PACT has it)
of p, lsq      r times the sum of g (code - v) inside and g code outside, r = 1 / sqrt(N high), N values of one step
of the offset  r times the sum of g outside
============== ==================================================================================================

Those of p take p's sign. A NaN is its own code and is outside: it shows in the result and in the gradient of p. Steps,
their gradients and sums are float32 (float64 for float64).

Sources: PACT (Choi et al., arXiv 1805.06085), LSQ (Esser et al., arXiv 1902.08153), LSQ+ (Bhalgat et al., arXiv
2004.09576); that the offset's gradient has LSQ's r too is our choice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import DTYPES
from spos_fast.ops.unit_layers import statistics_dtype

MODES = ("pact", "pact_residual", "lsq", "lsq+")
MIN_STEP = 2.0**-24
MOST_BITS = 8


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Least and greatest code; a single signed bit has these two only."""
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class Codes(NamedTuple):
    """What quantizing gives on the way, in the dtype of the steps.

    Attributes:
        v: values in steps.
        code: clipped and rounded, of v's shape.
        outside: where v is clipped (at the bounds too) or NaN, of v's shape.
        high: greatest code, [].
    """

    v: Tensor
    code: Tensor
    outside: Tensor
    high: Tensor


def effective_step(step: Tensor, bits: Tensor, index: Tensor, mode: str) -> Tensor:
    """S of the entry: [], or [C] of a step a channel."""
    size = step[index].abs()
    if mode.startswith("pact"):
        size = size / (torch.exp2(bits[index].to(step.dtype)) - 1)
    return size.clamp_min(MIN_STEP)


def quantized(values: Tensor, size: Tensor, bits: Tensor, index: Tensor, signed: bool) -> Codes:
    """The codes of values (less the offset) in steps that broadcast against them."""
    k = bits[index]
    v = values / size
    levels = torch.exp2(k.to(v.dtype))
    if not signed:
        low, high = torch.zeros_like(levels), levels - 1
        code = v.clamp(low, high).round()
    else:
        single = k == 1
        low, high = -levels / 2, torch.where(single, 1.0, levels / 2 - 1)
        sign = torch.where(v >= 0, 1.0, torch.where(v < 0, -1.0, v))
        code = torch.where(single, sign, v.clamp(low, high).round())
    return Codes(v, code, ~((v > low) & (v < high)), high)


def step_terms(codes: Codes, mode: str) -> Tensor:
    """What g is multiplied by in the gradient of the step, before the sum and its factor."""
    if mode == "pact":
        return torch.where(codes.outside, codes.code, 0)
    return torch.where(codes.outside, codes.code, codes.code - codes.v)


def step_factor(high: Tensor, mode: str, values: int) -> Tensor:
    """What the sum is multiplied by, [].

    Args:
        high: greatest code.
        mode: of the quantizer.
        values: how many share the step.
    """
    return 1 / high if mode.startswith("pact") else (max(values, 1) * high) ** -0.5


def at_index(total: Tensor, like: Tensor, index: Tensor) -> Tensor:
    """Zeros of the step vector's shape, with ``total`` in the entry of the index."""
    picked = torch.arange(like.shape[0], device=like.device) == index
    return torch.where(picked.view([-1] + [1] * (like.dim() - 1)), total, torch.zeros_like(like))


def sign_of(step: Tensor, index: Tensor) -> Tensor:
    """Derivative of the step's magnitude; 1 for zero."""
    return torch.where(step[index] < 0, -1.0, 1.0).to(step.dtype)


def bits_and_index(x: Any, bits: int | Tensor, index: int | Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """A user's bit-widths and index as the ops take them, int32 [K] and an integer [], on x's device.

    Raises:
        TypeError: x is no tensor; bits or index neither an int nor a tensor.
        InputError: an int out of range.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not isinstance(bits, Tensor):
        bits = torch.full((entries,), _integer("bits", bits, 1, MOST_BITS), dtype=torch.int32, device=x.device)
    if not isinstance(index, Tensor):
        entries = bits.shape[0] if bits.dim() else 1
        index = torch.full((), _integer("index", index, 0, entries - 1), dtype=torch.int32, device=x.device)
    return bits, index


def _integer(name: str, value: Any, least: int, most: int) -> Any:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or an integer tensor, got {type(value).__name__}")
    if not least <= value <= most:
        raise InputError(f"{name} must be from {least} to {most}, got {value}")
    return value


def check_values(name: str, x: Any) -> None:
    """Refuse what is no tensor of a floating-point dtype that the kernels take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def check_selection(bits: Any, index: Any, x: Tensor) -> None:
    """Refuse what are no bit-widths [K] and index [] on x's device. What they hold is not looked at."""
    for name, value in (("bits", bits), ("index", index)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be an int or an integer tensor, got {type(value).__name__}")
    if bits.dtype != torch.int32:
        raise TypeError(f"bits must be int32, got {bits.dtype}")
    if bits.dim() != 1 or bits.shape[0] == 0:
        raise InputError(f"bits must be [K], one entry a bit-width, got shape {list(bits.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.dim() != 0:
        raise InputError(f"index must be a tensor without dimensions, got shape {list(index.shape)}")
    for name, value in (("bits", bits), ("index", index)):
        if value.device != x.device:
            raise InputError(f"{name} must be on {x.device} as the values are, got one on {value.device}")


def check_steps(name: str, step: Any, shape: list[int], x: Tensor) -> None:
    """Refuse what is no vector of steps of this shape for x."""
    if not isinstance(step, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(step).__name__}")
    if step.dtype != statistics_dtype(x):
        raise TypeError(f"{name} must be {statistics_dtype(x)} for values of {x.dtype}, got {step.dtype}")
    if list(step.shape) != shape:
        what = "[K], one entry a bit-width" if len(shape) == 1 else "[K, C], one entry a bit-width and channel"
        raise InputError(f"{name} must be {shape} ({what}), got shape {list(step.shape)}")
    if step.device != x.device:
        raise InputError(f"{name} must be on {x.device} as the values are, got one on {step.device}")


def check_mode(mode: str, modes: tuple[str, ...]) -> None:
    """Refuse a quantizer that is not among these."""
    if mode not in modes:
        raise InputError(f"mode must be {', '.join(modes[:-1])} or {modes[-1]}, got {mode!r}")
