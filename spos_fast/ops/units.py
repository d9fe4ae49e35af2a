"""The ShuffleNetV2 unit of stride 1, in training, as one op.

Half of the channels pass; the others go through 1x1 convolution, BN, ReLU; depthwise convolution, BN; 1x1 convolution,
BN, ReLU. Batch statistics need a convolution's whole output before the next layer can start, so the kernels make four
passes forwards and four backwards, and normalise and clip where the next pass loads. The outputs of the convolutions
are what they keep for the backward pass.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as convolution_grad

from spos_fast.errors import InputError
from spos_fast.ops.batchnorm import DTYPES
from spos_fast.ops.dispatch import LIBRARY, define_op

_LAST = torch.channels_last
_warned_of_layout = False


class UnitOutput(NamedTuple):
    """What a unit makes in training.

    Attributes:
        out: [N, half + out, H, W], channels last: the even channels of x, then what the branch made.
        mean: [2 * mid + out], float32 (float64 for float64): batch means in front of the three BN layers, one behind
            the other. Not differentiable.
        var: likewise, the batch variances, divided by N * H * W. Not differentiable.
    """

    out: Tensor
    mean: Tensor
    var: Tensor


def shuffle_unit(
    x: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    mid: int | None = None,
    eps: float = 1e-5,
) -> UnitOutput:
    """ShuffleNetV2 unit of stride 1 with batch statistics (arXiv 1807.11164, figure 3c, as in arXiv 1904.00420).

    Even channels pass, odd channels go through the branch, and both are concatenated: the channel shuffle of the
    published code. The result is differentiable once, the same for any number of threads, and channels last.

    Args:
        x: [N, 2 * half, H, W], channels last (anything else is copied, with one warning); float32, float64, float16
            or bfloat16. Under autocast, x and the convolutions' weights are cast to its dtype.
        pw1: [M, half, 1, 1], the first 1x1 convolution; dtype of x, like all weights.
        dw: [M, 1, k, k], the depthwise convolution, k odd, padded by k // 2.
        pw2: [out, M, 1, 1], the second 1x1 convolution.
        gamma: [2 * mid + out], the scales of the three BN layers one behind the other; None for ones.
        beta: their shifts; None for zeros.
        mid: how many of the M stored channels are used, the first ones; None for all. No other is read, and the
            gradients of the others are exactly zero.
        eps: added to the variances.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        InputError: shapes that do not fit together, ``mid`` out of range, or a batch of a single pixel, which has no
            variance.
    """
    global _warned_of_layout
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, pw1, dw, pw2 = x.to(dtype), pw1.to(dtype), dw.to(dtype), pw2.to(dtype)
    mid = _mid(pw1, mid)
    _check(x, pw1, dw, pw2, gamma, beta, mid)
    if not x.is_contiguous(memory_format=_LAST):
        if not _warned_of_layout and not torch.compiler.is_compiling():
            _warned_of_layout = True
            warnings.warn("shuffle_unit: x is not channels last and is copied; convert the model and its input once "
                          "with .to(memory_format=torch.channels_last)", RuntimeWarning, stacklevel=2)  # fmt: skip
        x = x.contiguous(memory_format=_LAST)
    differentiated = (x, pw1, dw, pw2, gamma, beta)
    save = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in differentiated)
    out, _, _, _, mean, var = _op(x, pw1, dw, pw2, gamma, beta, mid, eps, save)
    return UnitOutput(out, mean, var)


def shuffle_unit_reference(
    x: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mid: int,
    eps: float = 1e-5,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op computes, in plain PyTorch: out, the convolutions' outputs, and their batch means and variances.

    With ``save=False`` the convolutions' outputs are empty: nothing that only the backward pass reads is kept.
    """
    _check(x, pw1, dw, pw2, gamma, beta, mid)
    sizes = _sizes(pw2, mid)
    gammas, betas = _split(gamma, sizes), _split(beta, sizes)
    z1 = functional.conv2d(x[:, 1::2], pw1[:mid])
    y, mean1, var1 = _normalised(z1, gammas[0], betas[0], eps)
    z2 = functional.conv2d(y.relu(), dw[:mid], padding=dw.shape[2] // 2, groups=mid)
    y, mean2, var2 = _normalised(z2, gammas[1], betas[1], eps)
    z3 = functional.conv2d(y, pw2[:, :mid])
    y, mean3, var3 = _normalised(z3, gammas[2], betas[2], eps)
    out = torch.cat((x[:, ::2], y.relu()), 1)
    kept = (z1, z2, z3) if save else (z1[:0], z2[:0], z3[:0])
    mean, var = torch.cat((mean1, mean2, mean3)), torch.cat((var1, var2, var3))
    return (*(value.contiguous(memory_format=_LAST) for value in (out, *kept)), mean, var)  # type: ignore[return-value]


def shuffle_unit_backward_reference(
    grad: Tensor,
    x: Tensor,
    z1: Tensor,
    z2: Tensor,
    z3: Tensor,
    mean: Tensor,
    var: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mid: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, pw1, dw, pw2, gamma and beta for the gradient of ``out``, in plain PyTorch."""
    _check_saved(grad, x, z1, z2, z3)
    sizes = _sizes(pw2, mid)
    half, padding = x.shape[1] // 2, dw.shape[2] // 2
    layers = [
        _Layer(z, layer_mean, layer_var, layer_gamma, layer_beta, eps)
        for z, layer_mean, layer_var, layer_gamma, layer_beta in zip(
            (z1, z2, z3), mean.split(sizes), var.split(sizes), _split(gamma, sizes), _split(beta, sizes), strict=True
        )
    ]
    w1, wd, w2 = pw1[:mid], dw[:mid], pw2[:, :mid]
    y1, y2 = layers[0].output().relu(), layers[1].output()

    dz3, gamma3, beta3 = layers[2].backward(grad[:, half:], relu=True)
    dy2 = convolution_grad.conv2d_input(list(z2.shape), w2, dz3)
    dw2 = convolution_grad.conv2d_weight(y2, list(w2.shape), dz3)
    dz2, gamma2, beta2 = layers[1].backward(dy2, relu=False)
    dy1 = convolution_grad.conv2d_input(list(z1.shape), wd, dz2, padding=padding, groups=mid)
    dwd = convolution_grad.conv2d_weight(y1, list(wd.shape), dz2, padding=padding, groups=mid)
    dz1, gamma1, beta1 = layers[0].backward(dy1, relu=True)
    odd = x[:, 1::2].contiguous(memory_format=_LAST)
    dx = convolution_grad.conv2d_input(list(odd.shape), w1, dz1)
    dw1 = convolution_grad.conv2d_weight(odd, list(w1.shape), dz1)

    grad_x = torch.stack((grad[:, :half], dx), 2).flatten(1, 2).contiguous(memory_format=_LAST)
    absent = pw1.shape[0] - mid
    return (
        grad_x,
        functional.pad(dw1, (0, 0, 0, 0, 0, 0, 0, absent)).contiguous(),
        functional.pad(dwd, (0, 0, 0, 0, 0, 0, 0, absent)).contiguous(),
        functional.pad(dw2, (0, 0, 0, 0, 0, absent)).contiguous(),
        torch.cat((gamma1, gamma2, gamma3)),
        torch.cat((beta1, beta2, beta3)),
    )


class _Layer:
    """One BN layer backwards, from the batch statistics that the forward pass left."""

    def __init__(
        self, z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> None:
        def spread(value: Tensor) -> Tensor:
            return value.to(mean.dtype)[None, :, None, None]

        self.dtype = z.dtype
        rstd = spread((var + eps).rsqrt())
        self.normal = (z.to(mean.dtype) - spread(mean)) * rstd
        self.scale = rstd if gamma is None else rstd * spread(gamma)
        self.wide = self.normal if gamma is None else self.normal * spread(gamma)
        if beta is not None:
            self.wide = self.wide + spread(beta)

    def output(self) -> Tensor:
        """What the layer gave, without ReLU."""
        return self.wide.to(self.dtype)

    def backward(self, grad: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the convolution's output, of gamma and of beta."""
        grad = grad.to(self.normal.dtype)
        if relu:
            grad = grad * (self.wide > 0)
        count = grad.numel() // grad.shape[1]
        grad_beta, grad_gamma = grad.sum((0, 2, 3)), (grad * self.normal).sum((0, 2, 3))
        centred = grad - grad_beta[None, :, None, None] / count
        dz = self.scale * (centred - self.normal * (grad_gamma[None, :, None, None] / count))
        return dz.to(self.dtype), grad_gamma, grad_beta


def _normalised(z: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of z, and the mean and variance that it used, in float32 (float64)."""
    wide = z if z.dtype == torch.float64 else z.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.to(scale.dtype)
    y = (wide - mean[None, :, None, None]) * scale[None, :, None, None]
    if beta is not None:
        y = y + beta.to(scale.dtype)[None, :, None, None]
    return y.to(z.dtype), mean, var


def _sizes(pw2: Tensor, mid: int) -> list[int]:
    """Channels of the three BN layers."""
    return [mid, mid, pw2.shape[0]]


def _split(value: Tensor | None, sizes: list[int]) -> tuple[Tensor | None, ...]:
    return (None,) * len(sizes) if value is None else value.split(sizes)


def _mid(pw1: Tensor, mid: int | None) -> int:
    if mid is None:
        return pw1.shape[0] if isinstance(pw1, Tensor) and pw1.dim() > 0 else 0
    if not isinstance(mid, (int, torch.SymInt)) or isinstance(mid, bool):
        raise TypeError(f"mid must be an int, got {type(mid).__name__}")
    return mid


def _check(
    x: Tensor, pw1: Tensor, dw: Tensor, pw2: Tensor, gamma: Tensor | None, beta: Tensor | None, mid: int
) -> None:
    for name, value in (("x", x), ("pw1", pw1), ("dw", dw), ("pw2", pw2)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
        if value.dim() != 4:
            raise InputError(f"{name} must have 4 dimensions, got shape {list(value.shape)}")
    if x.shape[1] % 2:
        raise InputError(f"x must have an even number of channels, got shape {list(x.shape)}")
    stored, half, k = pw1.shape[0], x.shape[1] // 2, dw.shape[2]
    if x.numel() == 0 or x.numel() == x.shape[1]:
        raise InputError(f"x must hold at least two pixels, which a variance needs, got shape {list(x.shape)}")
    for name, value, wanted in (
        ("pw1", pw1, [stored, half, 1, 1]),
        ("dw", dw, [stored, 1, k, k]),
        ("pw2", pw2, [pw2.shape[0], stored, 1, 1]),
    ):
        if list(value.shape) != wanted:
            raise InputError(f"{name} must be {wanted} to fit x and pw1, got {list(value.shape)}")
    if k % 2 == 0:
        raise InputError(f"dw must have an odd kernel size, got {k}")
    if not 1 <= mid <= stored:
        raise InputError(f"mid must be from 1 to {stored}, the channels that pw1 stores, got {mid}")
    normalised = 2 * mid + pw2.shape[0]
    for name, affine in (("gamma", gamma), ("beta", beta)):
        if affine is not None and list(affine.shape) != [normalised]:
            raise InputError(f"{name} must be [{normalised}], 2 * mid + out, got {list(affine.shape)}")


def _check_saved(grad: Tensor, x: Tensor, z1: Tensor, z2: Tensor, z3: Tensor) -> None:
    if not z1.shape[0] == z2.shape[0] == z3.shape[0] == grad.shape[0] == x.shape[0]:
        raise InputError("shuffle_unit_backward needs what shuffle_unit saves; it was called with save=False")


def _statistics(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _image(x: Tensor, samples: int, channels: int) -> Tensor:
    size = (samples, channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_LAST)


def _fake(
    x: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mid: int,
    eps: float = 1e-5,
    save: bool = True,
) -> tuple[Tensor, ...]:
    kept, size = x.shape[0] if save else 0, sum(_sizes(pw2, mid))
    out = _image(x, x.shape[0], x.shape[1] // 2 + pw2.shape[0])
    saved = (_image(x, kept, mid), _image(x, kept, mid), _image(x, kept, pw2.shape[0]))
    return (out, *saved, _statistics(x, size), _statistics(x, size))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    z1: Tensor,
    z2: Tensor,
    z3: Tensor,
    mean: Tensor,
    var: Tensor,
    pw1: Tensor,
    dw: Tensor,
    pw2: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mid: int,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    size = sum(_sizes(pw2, mid))
    weights = (weight.new_empty(weight.shape) for weight in (pw1, dw, pw2))
    return (_image(x, x.shape[0], x.shape[1]), *weights, _statistics(x, size), _statistics(x, size))


_op = define_op(
    "shuffle_unit(Tensor x, Tensor pw1, Tensor dw, Tensor pw2, Tensor? gamma, Tensor? beta, SymInt mid, "
    "float eps=1e-05, bool save=True) "
    "-> (Tensor out, Tensor z1, Tensor z2, Tensor z3, Tensor mean, Tensor var)",
    reference=shuffle_unit_reference,
    fake=_fake,
)
_backward_op = define_op(
    "shuffle_unit_backward(Tensor grad, Tensor x, Tensor z1, Tensor z2, Tensor z3, Tensor mean, Tensor var, "
    "Tensor pw1, Tensor dw, Tensor pw2, Tensor? gamma, Tensor? beta, SymInt mid, float eps=1e-05) "
    "-> (Tensor x, Tensor pw1, Tensor dw, Tensor pw2, Tensor gamma, Tensor beta)",
    reference=shuffle_unit_backward_reference,
    fake=_fake_backward,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, pw1, dw, pw2, gamma, beta, ctx.mid, ctx.eps, _ = inputs
    ctx.save_for_backward(x, *output[1:], pw1, dw, pw2, gamma, beta)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    *saved, gamma, beta = ctx.saved_tensors
    grad = grad.contiguous(memory_format=_LAST)
    *grads, grad_gamma, grad_beta = _backward_op(grad, *saved, gamma, beta, ctx.mid, ctx.eps)
    return (
        *grads,
        None if gamma is None else grad_gamma.to(gamma.dtype),
        None if beta is None else grad_beta.to(beta.dtype),
        None,
        None,
        None,
    )


torch.library.register_autograd("spos_fast::shuffle_unit", _backward, setup_context=_save_for_backward, lib=LIBRARY)
