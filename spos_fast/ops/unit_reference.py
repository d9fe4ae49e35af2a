"""What the fused units compute, in plain PyTorch: forwards, backwards, and with normalisation folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as convolution_grad

from spos_fast.ops.groups import joined, runs
from spos_fast.ops.unit_layers import Layer, Unit, statistics_dtype

_LAST = torch.channels_last


def forward(
    unit: Unit, used: Unit, gamma: Tensor | None, beta: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, the convolutions' outputs behind one another, batch means and variances.

    Args:
        unit: decides the sizes of what comes out.
        used: the same unit, or a narrower slice of it, which is computed; statistics of absent channels are zero.
    """
    if unit.groups > 1:
        pairs = zip(unit.runs(), used.runs(), strict=True)
        out, saved, mean, var = joined([forward(*pair, gamma, beta, eps, save) for pair in pairs])
        return out, saved, mean, var
    gammas, betas = _split(gamma, unit, used), _split(beta, unit, used)
    position = 0
    kept: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []

    def run(y: Tensor, chain: Sequence[Layer]) -> Tensor:
        nonlocal position
        for layer in chain:
            z = _convolve(y, layer)
            y, mean, var = _normalised(z, gammas[position], betas[position], eps)
            y = y if layer.depthwise else y.relu()
            kept.append(z)
            means.append(mean)
            variances.append(var)
            position += 1
        return y

    taken, beside = used.inputs()
    main = run(taken, used.main)
    out = torch.cat((run(beside, used.projection), main), 1).contiguous(memory_format=_LAST)
    saved = torch.cat([_pixels(_widened(z, size)) for z, size in zip(kept, unit.sizes, strict=True)])
    return out, saved if save else saved[:0].clone(), _joined(means, unit), _joined(variances, unit)


def backward(
    unit: Unit,
    used: Unit,
    grad: Tensor,
    saved: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of x, of the weights as stored (main branch, projection), of gamma and of beta."""
    parts = [_split(vector, unit, used) for vector in (mean, var, gamma, beta)]
    norms = [
        _Norm.on_batch(z[:, :size], [part[layer] for part in parts], eps)
        for layer, (z, size) in enumerate(zip(_unpacked(saved, unit), used.sizes, strict=True))
    ]
    return _backward(unit, used, grad, norms, on_batch=True)


def infer(unit: Unit, used: Unit, scale: Tensor | None, shift: Tensor) -> Tensor:
    """The unit with a scale and a shift behind every convolution in place of batch normalisation."""
    if unit.groups > 1:
        vectors = runs(unit.groups, (), (scale, shift))
        each = zip(unit.runs(), used.runs(), vectors, strict=True)
        return joined([(infer(run, narrow, *own),) for run, narrow, own in each])[0]
    return _infer(unit, used, scale, shift)[0]


def infer_backward(unit: Unit, used: Unit, grad: Tensor, scale: Tensor | None, shift: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, of the weights as stored, of scale and of shift; the forward pass is repeated."""
    return _backward(unit, used, grad, _infer(unit, used, scale, shift)[1], on_batch=False)


def _infer(unit: Unit, used: Unit, scale: Tensor | None, shift: Tensor) -> tuple[Tensor, list[_Norm]]:
    scales, shifts = iter(_split(scale, unit, used)), iter(_split(shift, unit, used))
    norms: list[_Norm] = []

    def run(y: Tensor, chain: Sequence[Layer]) -> Tensor:
        for layer in chain:
            norms.append(_Norm.folded(_convolve(y, layer), next(scales), next(shifts)))
            y = norms[-1].output(relu=not layer.depthwise)
        return y

    taken, beside = used.inputs()
    main = run(taken, used.main)
    return torch.cat((run(beside, used.projection), main), 1).contiguous(memory_format=_LAST), norms


class _Norm(NamedTuple):
    """One layer's normalisation for the backward pass: y = wide, of which the statistics' part is ``normal``."""

    dtype: torch.dtype
    normal: Tensor  # what gamma (scale) multiplies
    factor: Tensor  # what a gradient is multiplied with on its way to the convolution
    wide: Tensor

    @classmethod
    def on_batch(cls, z: Tensor, statistics: Sequence[Tensor | None], eps: float) -> _Norm:
        mean, var, gamma, beta = statistics
        assert mean is not None and var is not None
        rstd = _spread((var + eps).rsqrt(), mean.dtype)
        normal = (z.to(mean.dtype) - _spread(mean, mean.dtype)) * rstd
        factor, wide = rstd, normal
        if gamma is not None:
            factor, wide = rstd * _spread(gamma, mean.dtype), normal * _spread(gamma, mean.dtype)
        if beta is not None:
            wide = wide + _spread(beta, mean.dtype)
        return cls(z.dtype, normal, factor, wide)

    @classmethod
    def folded(cls, z: Tensor, scale: Tensor | None, shift: Tensor | None) -> _Norm:
        dtype = statistics_dtype(z)
        normal = z.to(dtype)
        factor = torch.ones_like(normal[:1, :, :1, :1]) if scale is None else _spread(scale, dtype)
        wide = normal * factor
        return cls(z.dtype, normal, factor, wide if shift is None else wide + _spread(shift, dtype))

    def output(self, relu: bool) -> Tensor:
        """What the layer gave."""
        y = self.wide.to(self.dtype)
        return y.relu() if relu else y

    def backward(self, grad: Tensor, relu: bool, on_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the convolution's output, of gamma (scale) and of beta (shift)."""
        grad = grad.to(self.normal.dtype)
        if relu:
            grad = grad * (self.wide > 0)
        grad_beta, grad_gamma = grad.sum((0, 2, 3)), (grad * self.normal).sum((0, 2, 3))
        if on_batch:
            count = grad.numel() // grad.shape[1]
            grad = grad - _spread(grad_beta, grad.dtype) / count
            grad = grad - self.normal * (_spread(grad_gamma, grad.dtype) / count)
        return (self.factor * grad).to(self.dtype), grad_gamma, grad_beta


def _backward(unit: Unit, used: Unit, grad: Tensor, norms: list[_Norm], on_batch: bool) -> tuple[Tensor, ...]:
    weights: list[Tensor] = []
    gammas: list[Tensor] = []
    betas: list[Tensor] = []

    def run(grad: Tensor, chain: Sequence[Layer], norms: Sequence[_Norm], x: Tensor) -> Tensor:
        found = []
        for position in reversed(range(len(chain))):
            layer, norm = chain[position], norms[position]
            y = norms[position - 1].output(relu=not chain[position - 1].depthwise) if position else x
            dz, grad_gamma, grad_beta = norm.backward(grad, not layer.depthwise, on_batch)
            y = y.contiguous(memory_format=_LAST)
            given = dict(stride=layer.stride, padding=layer.padding, groups=layer.groups)
            grad = convolution_grad.conv2d_input(list(y.shape), layer.slice, dz, **given)
            weight = convolution_grad.conv2d_weight(y, list(layer.slice.shape), dz, **given)
            found.append((_padded(weight, layer.weight), grad_gamma, grad_beta))
        for weight, grad_gamma, grad_beta in reversed(found):
            weights.append(weight)
            gammas.append(grad_gamma)
            betas.append(grad_beta)
        return grad

    taken, beside = used.inputs()
    split = len(used.main)
    dx = run(grad[:, used.beside :], used.main, norms[:split], taken)
    front = grad[:, : used.beside]
    if used.projection:
        dx = dx + run(front, used.projection, norms[split:], beside)
    else:
        dx = torch.stack((front, dx), 2).flatten(1, 2)
    absent = () if used.projection else (unit.x.new_empty(0), unit.x.new_empty(0))
    return dx.contiguous(memory_format=_LAST), *weights, *absent, _joined(gammas, unit), _joined(betas, unit)


def _convolve(y: Tensor, layer: Layer) -> Tensor:
    return functional.conv2d(y, layer.slice, stride=layer.stride, padding=layer.padding, groups=layer.groups)


def _normalised(z: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of z, and the mean and variance that it used."""
    dtype = statistics_dtype(z)
    wide = z.to(dtype)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.to(dtype)
    y = (wide - _spread(mean, dtype)) * _spread(scale, dtype)
    if beta is not None:
        y = y + _spread(beta, dtype)
    return y.to(z.dtype), mean, var


def _spread(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)[None, :, None, None]


def _split(value: Tensor | None, unit: Unit, used: Unit) -> list[Tensor | None]:
    """A vector's parts, one a layer, as far as their channels are used."""
    if value is None:
        return [None] * len(unit.sizes)
    return [part[:size] for part, size in zip(value.split(unit.sizes), used.sizes, strict=True)]


def _joined(parts: Sequence[Tensor], unit: Unit) -> Tensor:
    return torch.cat([functional.pad(p, (0, size - len(p))) for p, size in zip(parts, unit.sizes, strict=True)])


def _widened(z: Tensor, channels: int) -> Tensor:
    return functional.pad(z, (0, 0, 0, 0, 0, channels - z.shape[1]))


def _padded(part: Tensor, whole: Tensor) -> Tensor:
    """The part, zeros where nothing was used."""
    rows, columns = whole.shape[0] - part.shape[0], whole.shape[1] - part.shape[1]
    return functional.pad(part, (0, 0, 0, 0, 0, columns, 0, rows)).contiguous()


def _pixels(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1)


def _unpacked(saved: Tensor, unit: Unit) -> list[Tensor]:
    """The convolutions' outputs, [N, C, H, W], as views."""
    shapes = [(n, height, width, channels) for n, channels, height, width in unit.saved_shapes]
    sizes = [n * height * width * channels for n, height, width, channels in shapes]
    return [part.view(shape).permute(0, 3, 1, 2) for part, shape in zip(saved.split(sizes), shapes, strict=True)]
