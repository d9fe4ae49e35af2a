"""A quantized convolution composed of PyTorch's elementwise functions and its autograd, as other projects write it.

Straight-through gradients by ``detach``; nothing is shared with the ops. What they are compared with, in double.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def through(x: Tensor, value: Tensor) -> Tensor:
    """The value forwards, x backwards."""
    return x + (value - x).detach()


def away_from_ties(values: Tensor, in_steps: Callable[[Tensor], Tensor]) -> Tensor:
    """Moves those that lie within a rounding error of a tie or of a bound, where float and double may differ.

    Args:
        values: float32 or less.
        in_steps: gives them in steps, of double values.
    """
    for _ in range(20):
        distance = (in_steps(values.double()) * 2).frac().abs()  # codes and the ties between them, at 0 and 1
        values = torch.where((distance < 1e-3) | (distance > 1 - 1e-3), values * 1.0078125 + 0.001, values)
    return values


def activation(x: Tensor, step: Tensor, bits: int, mode: str) -> Tensor:
    """Unsigned values; pact, pact_residual or lsq."""
    high = 2**bits - 1
    if mode == "lsq":
        factor = (x.numel() * high) ** -0.5
        size = step * factor + (step - step * factor).detach()
        return through((x / size).clamp(0, high), (x / size).clamp(0, high).round()) * size
    size = step / high
    v = x / (size.detach() if mode == "pact" else size)
    code = through(v.clamp(0, high), v.clamp(0, high).round())
    return code * (torch.where(v >= high, size, size.detach()) if mode == "pact" else size)


def dorefa_unit(weight: Tensor) -> Tensor:
    """DoReFa's weights in [0, 1] before they are rounded."""
    t = torch.tanh(weight)
    return t / (2 * t.abs().max()) + 0.5


def weights(weight: Tensor, step: Tensor | None, bits: int) -> Tensor:
    """LSQ with a step ([] or [C_out, 1, 1, 1]), DoReFa per tensor without."""
    if step is None:
        if bits == 1:
            return through(weight, torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype) * weight.abs().mean())
        n, unit = 2**bits - 1, dorefa_unit(weight)
        return 2 * through(unit, (unit * n).round() / n) - 1
    values = weight.numel() // step.numel()
    low, high = (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    factor = (values * high) ** -0.5
    size = step * factor + (step - step * factor).detach()
    v = (weight / size).clamp(low, high)
    code = torch.where(weight >= 0, 1.0, -1.0).to(v.dtype) if bits == 1 else v.round()
    return through(v, code) * size


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act_step: Tensor,
    act_bits: int,
    act_mode: str,
    weight_step: Tensor | None,
    weight_bits: int,
    **settings: int,
) -> Tensor:
    """All of it."""
    y = x if scale is None or shift is None else x * scale[:, None, None] + shift[:, None, None]
    values = activation(y, act_step, act_bits, act_mode)
    return functional.conv2d(values, weights(weight, weight_step, weight_bits), bias, **settings)
