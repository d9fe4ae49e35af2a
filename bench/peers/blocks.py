"""The building blocks of the fused units with what PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def activation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """ReLU of the scaled and shifted channels."""
    return torch.relu(x * scale[:, None, None] + shift[:, None, None])


def pw_bnstats(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution of what ``activation`` gives; mean and sum of squared deviations of its output."""
    return with_moments(functional.conv2d(activation(x, scale, shift), weight))


def dw_bnstats(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution, likewise."""
    y = activation(x, scale, shift)
    return with_moments(functional.conv2d(y, weight, padding=weight.shape[2] // 2, groups=weight.shape[0]))


def bn_act_cat(z: Tensor, scale: Tensor, shift: Tensor, other: Tensor) -> Tensor:
    """Even channels of ``other`` and behind them what ``activation`` gives."""
    return torch.cat((other[:, ::2], activation(z, scale, shift)), 1)


def bn_add_relu(
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> Tensor:
    """ReLU of the scaled and shifted channels plus the residual, which may be scaled and shifted too.

    By batch_norm with neutral statistics, which is faster than products that broadcast; the rest in place.
    """
    y = scaled(x, scale, shift)
    y += residual if residual_scale is None else scaled(residual, residual_scale, residual_shift)
    return y.relu_()


def scaled(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """The channels of x times a scale plus a shift."""
    return functional.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=0.0)


def with_moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image, the mean of each channel and its sum of squared deviations."""
    var, mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)
    return z, mean, var * (z.numel() // z.shape[1])
