"""Small arguments for the quantization ops.

Random values, so that none lies within a rounding error of a tie: there the codes of float and double may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
LAST = torch.channels_last
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BITS = torch.tensor([1, 2, 3, 4, 8], dtype=torch.int32)
# mode, signed, axis, index
_QUANTIZERS = (
    ("pact", False, -1, 3),
    ("pact", False, 1, 0),
    ("pact_residual", False, -1, 1),
    ("lsq", False, 1, 2),
    ("lsq", True, 0, 3),
    ("lsq", True, -1, 0),
    ("lsq+", False, -1, 4),
    ("lsq+", True, 1, 1),
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layouts(x: Tensor) -> list[Tensor]:
    """Contiguous, channels last, and a slice that is neither."""
    apart = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype).fill_(torch.nan)[..., ::2].copy_(x)
    return [x, x.contiguous(memory_format=LAST), apart]


def _fake_quant() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(10)
    for dtype in DTYPES:
        for position, (mode, signed, axis, index) in enumerate(_QUANTIZERS):
            shape = ((3, 5, 7, 9), (2, 40, 3, 3), (4, 17, 5, 1))[position % 3]
            x = (torch.randn(shape, generator=generator) + 0.4).to(dtype)
            entries = (5,) if axis < 0 else (5, shape[axis])
            high = 2.0 if mode.startswith("pact") else 0.3
            step = high * (0.7 + torch.rand(entries, generator=generator).to(_wide(dtype)))
            step[-1] *= -1
            offset = torch.randn(entries, generator=generator).to(step.dtype) / 4 if mode == "lsq+" else None
            where = torch.tensor(index, dtype=torch.int32 if position % 2 else torch.int64)
            laid_out = _layouts(x)[(position + DTYPES.index(dtype)) % 3]
            found.append((laid_out, step, offset, BITS, where, mode, signed, axis))
    x = torch.randn(70000, generator=generator)  # several tasks
    found.append((x, torch.tensor([0.21]), None, BITS[3:4], torch.tensor(0), "lsq", True, -1))
    return found


def _fake_quant_backward() -> list[Arguments]:
    generator = torch.Generator().manual_seed(11)
    found = []
    for position, (x, *rest) in enumerate(_fake_quant()):
        grad = (torch.rand(x.shape, generator=generator) + 0.1).to(x.dtype)  # sums of one sign, which cancel nothing
        found.append((torch.empty_like(x).copy_(grad) if position % 2 else grad, x, *rest))
    return found


def _dorefa_weights() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(12)
    for dtype in DTYPES:
        for position, shape in enumerate(((6, 5, 3, 3), (17, 1, 5, 5), (3, 40), (8, 8, 1, 1), (40, 200, 3, 3))):
            weight = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
            if position == 0:
                weight = weight.contiguous(memory_format=LAST)
            if position == 1:
                weight = weight.transpose(2, 3)[:, :, ::2]
            where = torch.tensor((position + DTYPES.index(dtype)) % 5)
            found.append((weight, BITS, where, position % 2 == 1, position == 4))
    return found


def _dorefa_weights_backward() -> list[Arguments]:
    generator = torch.Generator().manual_seed(13)
    return [(torch.randn(w.shape, generator=generator).to(w.dtype), w, *rest) for w, *rest in _dorefa_weights()]


def _quantize_codes() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(14)
    modes = ("pact", "pact_residual", "lsq")
    for dtype in DTYPES:
        for position, shape in enumerate(((3, 5, 7, 9), (2, 66, 4, 3), (1, 16, 5, 5), (2, 40, 33, 30))):
            x = torch.randn(shape, generator=generator).to(dtype)
            scale, shift = torch.randn(2, shape[1], generator=generator, dtype=_wide(dtype))
            mode, index = modes[position % 3], torch.tensor(position)
            step = torch.full((5,), 0.31 if mode == "lsq" else 2.1, dtype=_wide(dtype))
            laid_out = _layouts(x)[(position + 1 + DTYPES.index(dtype)) % 3]
            given = (scale, shift) if position != 2 else (None, None)
            found.append((laid_out, *given, step, BITS, index, mode))
    return found


def _quantize_codes_backward() -> list[Arguments]:
    generator = torch.Generator().manual_seed(15)
    found = []
    for position, (x, *rest) in enumerate(_quantize_codes()):
        grad = (torch.rand(x.shape, generator=generator) + 0.1).to(x.dtype)
        found.append((grad.contiguous(memory_format=LAST) if position % 3 else grad, x, *rest))
    return found


def _weight_codes() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(16)
    for weight, bits, index, per_channel, detach in _dorefa_weights():
        wide = _wide(weight.dtype)
        step = 0.1 + torch.rand((5, weight.shape[0]) if per_channel else (5,), generator=generator, dtype=wide)
        found.append((weight, step, bits, index, "lsq", per_channel))
        if not detach:
            found.append((weight, None, bits, index, "dorefa", per_channel))
    return found


def _pack_codes() -> list[Arguments]:
    generator = torch.Generator().manual_seed(17)
    shapes = ((16, 4, 1, 1), (48, 20, 3, 2), (32, 64, 3, 3))
    return [(torch.randint(-128, 128, shape, generator=generator).to(torch.int8),) for shape in shapes]


def _integer_conv2d() -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(18)
    # N, C, H, W, O, kernel, stride, padding
    shapes = (
        (3, 20, 7, 9, 48, (3, 3), (1, 1), (1, 1)),
        (1, 4, 9, 6, 16, (1, 1), (2, 2), (0, 0)),
        (2, 16, 31, 30, 32, (2, 5), (2, 1), (0, 2)),  # several bands
        (2, 32, 57, 57, 96, (3, 3), (1, 1), (1, 1)),  # past the caches
    )
    modes = ("pact", "pact_residual", "lsq")
    for dtype in DTYPES[:3]:
        for position, (n, c, h, w, out, kernel, stride, padding) in enumerate(shapes):
            x = torch.randn(n, c, h, w, generator=generator).to(dtype)
            affine = torch.randn(2, c, generator=generator) if position % 2 else (None, None)
            codes = torch.randint(-128, 128, (out, c, *kernel), generator=generator).to(torch.int8)
            packed = codes.unflatten(1, (-1, 4)).unflatten(0, (-1, 16)).permute(0, 4, 5, 2, 1, 3).contiguous()
            step = torch.full((5,), 0.31 if modes[position % 3] == "lsq" else 2.1)
            scale, shift = 0.01 * torch.rand(out, generator=generator), torch.randn(out, generator=generator)
            flags = (position == 1, position != 1, position != 2)  # relu, statistics, keep_codes
            laid_out = _layouts(x)[(position + DTYPES.index(dtype)) % 3]
            given = (*affine, step, BITS, torch.tensor((position + 2) % 5), modes[position % 3], packed, scale)
            found.append((laid_out, *given, shift if position else None, stride, padding, *flags))
    return found


QUANT_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "dorefa_weights": _dorefa_weights,
    "dorefa_weights_backward": _dorefa_weights_backward,
    "fake_quant": _fake_quant,
    "fake_quant_backward": _fake_quant_backward,
    "integer_conv2d": _integer_conv2d,
    "pack_codes": _pack_codes,
    "quantize_codes": _quantize_codes,
    "quantize_codes_backward": _quantize_codes_backward,
    "weight_codes": _weight_codes,
}
