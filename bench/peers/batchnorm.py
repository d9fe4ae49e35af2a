"""Batch-norm moments with what PyTorch has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def var_mean(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared distances per channel and group, ``torch.var_mean``."""
    var, mean = torch.var_mean(x.float().unflatten(0, (groups, -1)), dim=(1, 3, 4), correction=0)
    return mean, var * (x.numel() // x.shape[1] // groups)


def statistics_of_batch_norm(x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The kernel that eager batch normalisation itself uses: mean and biased variance, each ``[C]``.

    CPU: ``torch.batch_norm_update_stats``, which moves running statistics by the way. CUDA: ``torch.batch_norm_stats``
    gives 1 / sqrt(variance + epsilon) instead; epsilon is 0 here.
    """
    if x.is_cuda:
        return lambda: torch.batch_norm_stats(x, 0.0)
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    return lambda: torch.batch_norm_update_stats(x, *running, 0.1)


def moments_from(statistics: tuple[Tensor, Tensor], device: str, count: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared distances, each ``[1, C]``, from what :func:`statistics_of_batch_norm` gives."""
    mean, spread = statistics
    variance = spread.square().reciprocal() if device == "cuda" else spread
    return mean[None], variance[None] * count


def two_reads(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """As calibration hooks write it: ``mean``, then the mean of squared distances."""
    wide = x.float().unflatten(0, (groups, -1))
    mean = wide.mean((1, 3, 4), keepdim=True)
    m2 = (wide - mean).square().sum((1, 3, 4))
    return mean[:, 0, :, 0, 0], m2
