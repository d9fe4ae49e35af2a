"""Fake quantization as others compute it: composed PACT, DoReFa and LSQ, and the kernels that PyTorch has.

Formulas: PACT (Choi et al., arXiv 1805.06085), DoReFa (Zhou et al., arXiv 1606.06160), LSQ (Esser et al., arXiv
1902.08153). Rounding is to nearest even, with the straight-through gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.lru_cache
def _zero(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The zero point, made once."""
    return torch.zeros(shape, dtype=dtype, device=device)


def round_through(x: Tensor) -> Tensor:
    """Round forwards, identity backwards."""
    return x + (x.round() - x).detach()


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """PACT with ``relu`` and ``minimum`` (the fastest way to compose it): codes 0 .. 2^bits - 1 over [0, alpha]."""
    scale = (2**bits - 1) / alpha.detach()
    return round_through(torch.minimum(torch.relu(x), alpha) * scale) / scale


def dorefa_weights(weight: Tensor, bits: int) -> Tensor:
    """DoReFa's weight quantizer, 2 bits or more: tanh scaled by its maximum, to [-1, 1]."""
    levels = 2**bits - 1
    squashed = torch.tanh(weight)
    return 2 * round_through(levels * (squashed / (2 * squashed.abs().max()) + 0.5)) / levels - 1


def lsq(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """LSQ per tensor, gradient of the step scaled by 1 / sqrt(N Qp)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    factor = (x.numel() * high) ** -0.5
    step = (step - step * factor).detach() + step * factor
    return round_through((x / step).clamp(low, high)) * step


def aten_cachemask(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """``torch.fake_quantize_per_tensor_affine`` on unsigned codes: the step gets no gradient."""
    zero = _zero((), torch.int32, x.device)
    return torch.fake_quantize_per_tensor_affine(x, step.detach(), zero, 0, 2**bits - 1)


def aten_learnable(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """``torch._fake_quantize_learnable_per_tensor_affine`` on unsigned codes: PyTorch's own LSQ."""
    high = 2**bits - 1
    zero = _zero((1,), torch.float32, x.device)
    return torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, 0, high, (x.numel() * high) ** -0.5)


def with_moments(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, the mean of each channel, and the sum of squared deviations."""
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    return z, mean, var * (z.numel() // z.shape[1])


class OneDnnConvolution:
    """Quantization by PyTorch's functions, and oneDNN's convolution on codes with weights that it has ordered."""

    def __init__(self, weight: Tensor, step: float, weight_step: float, bits: int, size: tuple[int, ...]) -> None:
        codes = (weight / weight_step).to(torch.int8)
        self._settings = [1, 1], [1, 1], [1, 1], 1
        self._weight = torch.ops.onednn.qconv_prepack(codes, torch.ones(1), 1.0, 0, *self._settings, list(size))
        self._scales = torch.full((len(weight),), step * weight_step)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._step, self._high = step, float(2**bits - 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution of quantized x, and its moments."""
        codes = (x * (1 / self._step)).round_().clamp_(0, self._high).to(torch.uint8)
        result: Any = 1.0, 0, torch.float32, "none", [], ""
        z: Tensor = torch.ops.onednn.qconv2d_pointwise(
            codes, 1.0, 0, self._weight, self._scales, self._zeros, None, *self._settings, *result
        )
        return with_moments(z)
