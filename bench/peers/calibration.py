"""Normalisation with given statistics and running statistics with what PyTorch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[list[Tensor], list[Tensor]]


def batch_norm_relu(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, groups: int) -> Tensor:
    """``batch_norm`` of each group in eval mode, then ReLU; with statistics of 0 and 1, scale and shift are weights."""
    mean, var = torch.zeros_like(scale[0]), torch.ones_like(scale[0])
    parts = [
        functional.batch_norm(part, mean, var, scale[group], shift[group], eps=0.0)
        for group, part in enumerate(x.chunk(groups))
    ]
    out = parts[0] if groups == 1 else torch.cat(parts)
    return out.relu_() if relu else out


def merged_in_a_loop(*arguments: Any) -> Pair:
    """The cumulative average as ``BatchNorm2d`` takes it, layer by layer."""
    mean, var, _, batch_mean, batch_m2, count, _, batches, *_ = arguments
    weight = 1 / (batches + 1)
    means = [torch.lerp(m, b.double(), weight) for m, b in zip(mean, batch_mean, strict=True)]
    variances = [torch.lerp(v, b.double() / (n - 1), weight) for v, b, n in zip(var, batch_m2, count, strict=True)]
    return means, variances


def merged_by_foreach(*arguments: Any) -> Pair:
    """The same with ``torch._foreach_*``, a call an operation."""
    mean, var, _, batch_mean, batch_m2, count, _, batches, *_ = arguments
    weight = 1 / (batches + 1)
    means = torch._foreach_mul(mean, 1 - weight)
    torch._foreach_add_(means, batch_mean, alpha=weight)
    variances = torch._foreach_mul(var, 1 - weight)
    torch._foreach_add_(variances, torch._foreach_mul(batch_m2, [weight / (n - 1) for n in count]))
    return list(means), list(variances)
