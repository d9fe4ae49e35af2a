"""Batch-norm moments with what PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor


def var_mean(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared distances per channel and group, ``torch.var_mean``."""
    var, mean = torch.var_mean(x.float().unflatten(0, (groups, -1)), dim=(1, 3, 4), correction=0)
    return mean, var * (x.numel() // x.shape[1] // groups)


def native_batch_norm_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.batch_norm_stats`` (CUDA only): what SyncBatchNorm calls. Returns mean and the second moment."""
    mean, inverse = torch.batch_norm_stats(x, 0.0)
    return mean[None], (inverse.square().reciprocal() * (x.numel() // x.shape[1]))[None]


def two_reads(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """As calibration hooks write it: ``mean``, then the mean of squared distances."""
    wide = x.float().unflatten(0, (groups, -1))
    mean = wide.mean((1, 3, 4), keepdim=True)
    m2 = (wide - mean).square().sum((1, 3, 4))
    return mean[:, 0, :, 0, 0], m2
