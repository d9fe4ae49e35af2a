"""Batch-norm statistics.

bn_moments gives, for each channel, what every kind of batch statistics is made of: the mean and the sum of squared
distances from it. Divide the latter by the count for the biased variance, by the count minus one for the unbiased one;
merge several by the rule of Chan et al.
"""

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.dispatch import LIBRARY, define_op

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def bn_moments(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and centred second moment of each channel, in one read of x.

    Means and second moments are taken tile by tile about the tile's own mean and merged in a fixed order (Chan, Golub
    and LeVeque, 1979), so a large mean costs no precision and the same input gives the same bits, whatever the number
    of threads. A NaN stays in its channel. Differentiable, twice.

    Args:
        x: [N, C, H, W], not empty; float32, float64, float16 or bfloat16. Channels-last and contiguous tensors, and
            slices of their channels, are read where they lie; anything else is copied once.
        groups: splits the batch in this many equal runs of samples, each with statistics of its own; divides N.

    Returns:
        mean and m2, both [groups, C], float32 (float64 for float64). m2 is the sum of (x - mean)**2 over the group's
        N/groups * H * W values, not divided by their number.

    Raises:
        TypeError: x is no tensor, or of another dtype; groups is no int.
        InputError: x has other dimensions or is empty; groups does not divide N.
    """
    _check(x, groups)
    mean, m2 = _op(x, groups)
    return mean, m2


def bn_moments_reference(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """What bn_moments computes, in plain PyTorch; same arguments, results and errors."""
    _check(x, groups)
    wide = _grouped(x if x.dtype == torch.float64 else x.float(), groups)
    # Twice, as in the kernels: the second sum mends the rounding of the first.
    mean = wide.mean(dim=(1, 3, 4))
    residual = wide - mean[:, None, :, None, None]
    shift = residual.mean(dim=(1, 3, 4))
    m2 = (residual - shift[:, None, :, None, None]).square().sum(dim=(1, 3, 4))
    return mean + shift, m2


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[N, C, H, W] as [groups, N/groups, C, H, W]."""
    return x.unflatten(0, (groups, x.shape[0] // groups))


def _check(x: Tensor, groups: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise InputError(f"x must be [N, C, H, W], got shape {list(x.shape)}")
    if x.numel() == 0:
        raise InputError(f"x must hold at least one value in each channel, got shape {list(x.shape)}")
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1 or x.shape[0] % groups != 0:
        raise InputError(f"groups must divide the batch of {x.shape[0]} samples, got {groups}")


def _fake(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((groups, x.shape[1]), dtype=dtype), x.new_empty((groups, x.shape[1]), dtype=dtype)


_op = define_op(
    "bn_moments(Tensor x, int groups=1) -> (Tensor mean, Tensor m2)",
    reference=bn_moments_reference,
    fake=_fake,
    triton="spos_fast.kernels.batchnorm:bn_moments",
)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    x, groups = inputs
    ctx.save_for_backward(x, output[0])
    ctx.groups = groups


def _backward(ctx: Any, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Tensor, None]:
    # d mean / dx = 1/n; d m2 / dx = 2 (x - mean), for sum(x - mean) = 0 takes the mean's own share away.
    x, mean = ctx.saved_tensors
    wide = _grouped(x.to(mean.dtype), ctx.groups)
    count = wide[0, :, 0].numel()

    def spread(per_channel: Tensor) -> Tensor:
        return per_channel[:, None, :, None, None]

    grad = spread(grad_mean / count) + (wide - spread(mean)) * spread(2 * grad_m2)
    return grad.flatten(0, 1).to(x.dtype), None


torch.library.register_autograd("spos_fast::bn_moments", _backward, setup_context=_save_for_backward, lib=LIBRARY)
