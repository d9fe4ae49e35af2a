"""Fake quantization in plain PyTorch, until the ops are there."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_STEP = 2.0**-24


def _through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


def fake_quant(
    x: Tensor,
    step: Tensor,
    bits: Tensor,
    *,
    index: int | Tensor = 0,
    mode: str = "lsq",
    signed: bool = False,
    offset: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """See the contract: LSQ, LSQ+, PACT; composed."""
    k = bits[index].float()
    high = torch.exp2(k - 1) - 1 if signed else torch.exp2(k) - 1
    low = -torch.exp2(k - 1) if signed else torch.zeros_like(k)
    if signed:
        high, low = torch.where(k == 1, 1.0, high), torch.where(k == 1, -1.0, low)
    along = [-1 if dim == axis else 1 for dim in range(x.dim())] if axis is not None else []
    s = step[index].view(along)
    s = s + (s.abs().clamp_min(MIN_STEP) - s).detach() * 1.0
    values = x.numel() if axis is None else x.numel() // x.shape[axis]
    factor = (values * high) ** -0.5 if mode.startswith("lsq") else torch.ones_like(high)
    if mode.startswith("pact"):
        s = s / high
    s = s * factor + (s - s * factor).detach()
    beta = 0.0
    if offset is not None:
        b = offset[index].view(along)
        beta = b * factor + (b - b * factor).detach()
    v = (x - beta) / (s.detach() if mode == "pact" else s)
    inside = v.clamp(low, high)
    code = inside.round()
    if signed:
        code = torch.where(k == 1, torch.where(v >= 0, 1.0, -1.0), code)
    code = _through(inside, code)
    if mode == "pact":
        s = torch.where(v >= high, s, s.detach())
    return code * s + beta


def quantize_weights(
    weight: Tensor,
    bits: Tensor,
    *,
    index: int | Tensor = 0,
    mode: str = "dorefa",
    step: Tensor | None = None,
    per_channel: bool = False,
    detach_max: bool = False,
) -> Tensor:
    """See the contract: DoReFa or LSQ; composed."""
    if mode == "lsq":
        assert step is not None
        return fake_quant(weight, step, bits, index=index, signed=True, axis=0 if per_channel else None)
    k = bits[index].float()
    n = torch.exp2(k) - 1
    dims = list(range(1, weight.dim())) if per_channel else list(range(weight.dim()))
    squashed = torch.tanh(weight)
    greatest = squashed.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    if detach_max:
        greatest = greatest.detach()
    unit = squashed / (2 * greatest) + 0.5
    many = 2 * _through(unit, (unit * n).round() / n) - 1
    mean = weight.abs().mean(dims, keepdim=True)
    one = _through(weight, torch.where(weight >= 0, mean, -mean))
    return torch.where(k == 1, one, many)
