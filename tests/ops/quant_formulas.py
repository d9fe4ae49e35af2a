"""The quantizers' formulas, value by value in Python's floats, which are double: what every implementation is held to.

Written from the papers (PACT, LSQ, LSQ+, DoReFa) and the conventions in spos_fast/ops/quantizers.py; nothing is shared
with the ops. ``round`` is to nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Values = Sequence[float]


class Quantized(NamedTuple):
    """Of a list of values that share a step: results, codes and gradients."""

    out: list[float]
    codes: list[float]
    grad_x: list[float]
    grad_step: float
    grad_offset: float


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    """Least and greatest code."""
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def step_of(parameter: float, bits: int, mode: str) -> float:
    """The step that a parameter stands for."""
    return max(abs(parameter) / (2**bits - 1 if mode.startswith("pact") else 1), 2.0**-24)


def fake_quant(
    x: Values, g: Values, parameter: float, bits: int, mode: str, signed: bool = False, offset: float = 0.0
) -> Quantized:
    """Results and gradients of values that share a step."""
    low, high = bounds(bits, signed)
    step = step_of(parameter, bits, mode)
    out, codes, grad_x = [], [], []
    grad_step = grad_offset = 0.0
    for value, gradient in zip(x, g, strict=True):
        v = (value - offset) / step
        below, above = v <= low, v >= high
        if math.isnan(v):
            code = v
        elif signed and bits == 1:
            code = 1.0 if v >= 0 else -1.0
        else:
            code = float(low if below else high if above else round(v))
        codes.append(code)
        out.append(code * step + offset)
        inside = low < v < high
        grad_x.append(gradient if inside else 0.0)
        grad_offset += 0.0 if inside else gradient
        if math.isnan(v):
            grad_step = v
        elif mode == "pact":
            grad_step += gradient if above else 0.0
        elif mode == "pact_residual":
            grad_step += gradient if above else 0.0 if below else gradient * (code - v) / high
        else:
            grad_step += gradient * (high if above else low if below else code - v)
    factor = 1.0 if mode.startswith("pact") else 1 / math.sqrt(max(len(x), 1) * high)
    return Quantized(out, codes, grad_x, grad_step * factor * (-1 if parameter < 0 else 1), grad_offset * factor)


def dorefa(w: Values, g: Values, bits: int, detach_max: bool = False) -> tuple[list[float], list[float], list[float]]:
    """Quantized weights, their codes and the gradient, of weights that share a maximum."""
    if bits == 1:
        mean = sum(map(abs, w)) / max(len(w), 1)
        codes = [1.0 if value >= 0 else -1.0 for value in w]
        return [mean * code for code in codes], codes, list(g)
    n, greatest = 2**bits - 1, max(map(abs, w))
    m = math.tanh(greatest)
    constant = m < 2.0**-126
    m = 1.0 if constant else m
    codes = [2.0 * round(n * (math.tanh(value) / (2 * m) + 0.5)) - n for value in w]
    slopes = [(1 - math.tanh(value) ** 2) / m for value in w]
    grads = [gradient * slope for gradient, slope in zip(g, slopes, strict=True)]
    if not detach_max and not constant:
        maxima = [place for place, value in enumerate(w) if abs(value) == greatest]
        total = sum(gradient * math.tanh(value) for gradient, value in zip(g, w, strict=True))
        for place in maxima:
            grads[place] -= math.copysign(1, w[place]) * slopes[place] / m * total / len(maxima)
    return [code / n for code in codes], codes, grads
