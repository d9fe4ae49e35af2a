"""Small arguments for the ops that units are made of; samples.py takes them in.

Widths given as tensors leave no output unspecified here: those of the channels that are made are the stored ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spos_fast.ops import dw_bnstats_reference, pw_bnstats_reference

Arguments = tuple[Any, ...]
LAST = torch.channels_last
HALVES_TOO = (torch.float32, torch.float16, torch.bfloat16)

# N, channels of x, H, W, stored in and out, first, step, channels in and out, scale and shift, relu, width in: widths 1
# and 3, odd channels of an even and an odd number, counts that no vector width divides, more rows than a task takes.
_POINTWISE = (
    (3, 16, 9, 7, 8, 20, 1, 2, 8, 12, False, False, None),
    (1, 5, 1, 3, 9, 4, 0, 1, 5, 3, True, True, None),
    (2, 40, 5, 1, 33, 18, 4, 1, 33, 18, True, True, 20),
    (1, 7, 70, 65, 3, 6, 1, 2, 3, 1, True, False, None),
    (2, 32, 15, 16, 32, 48, 0, 1, 32, 32, False, True, None),
)
# N, channels of x, H, W, stored, kernel, stride, channels, scale and shift, relu
_DEPTHWISE = (
    (3, 12, 9, 7, 20, 5, 1, 12, True, True),
    (1, 6, 1, 3, 5, 7, 1, 5, False, False),
    (2, 33, 8, 5, 33, 3, 2, 33, True, False),
    (2, 40, 15, 16, 48, 7, 2, 32, False, True),
    (1, 3, 70, 65, 17, 9, 1, 3, True, True),
)
# N, channels of z, H, W, channels of the other (0: none), it has a scale and a shift, relu
_ENDS = (
    (3, 12, 9, 7, 0, False, True),
    (1, 3, 1, 3, 6, False, True),
    (2, 33, 8, 5, 7, False, False),
    (2, 40, 15, 16, 16, True, True),
    (1, 4, 70, 65, 3, True, False),
)


class _Draw:
    """Random tensors of one dtype, always the same."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def image(self, *size: int) -> Tensor:
        return (self.normal(*size) + 0.3).to(self.dtype).contiguous(memory_format=LAST)

    def weight(self, *size: int) -> Tensor:
        return (self.normal(*size) / (size[1] * size[2] * size[3]) ** 0.5).to(self.dtype)

    def affine(self, channels: int) -> tuple[Tensor, Tensor]:
        return 0.5 + torch.rand(channels, generator=self.generator), self.normal(channels)


def _pw_bnstats() -> list[Arguments]:
    found: list[Arguments] = []
    for dtype in HALVES_TOO:
        draw = _Draw(dtype, 0)
        for n, c, h, w, stored_in, stored_out, first, step, used_in, used_out, affine, relu, width in _POINTWISE:
            image, weight = draw.image(n, c, h, w), draw.weight(stored_out, stored_in, 1, 1)
            scale, shift = draw.affine(used_in) if affine else (None, None)
            widths = (
                None if width is None else torch.tensor(width, dtype=torch.int32),
                None if width is None else torch.tensor(used_out, dtype=torch.int32),
            )
            found.append((image, weight, scale, shift, relu, first, step, used_in, used_out, *widths))
    return found


def _dw_bnstats() -> list[Arguments]:
    found: list[Arguments] = []
    for dtype in HALVES_TOO:
        draw = _Draw(dtype, 1)
        for n, c, h, w, stored, k, stride, used, affine, relu in _DEPTHWISE:
            image, weight = draw.image(n, c, h, w), draw.weight(stored, 1, k, k)
            scale, shift = draw.affine(used) if affine else (None, None)
            width = torch.tensor(used, dtype=torch.int32) if stride == 2 else None
            found.append((image, weight, scale, shift, relu, stride, used, width))
    return found


def _dw_bnstats_in_groups() -> list[Arguments]:
    found: list[Arguments] = []
    for dtype in HALVES_TOO:
        draw = _Draw(dtype, 6)
        for groups, (n, c, h, w, stored, k, stride, used, affine, relu) in zip((3, 2), _DEPTHWISE[::2], strict=False):
            image, weight = draw.image(groups * n, c, h, w), draw.weight(stored, 1, k, k)
            pairs = [draw.affine(used) for _ in range(groups)]
            scale, shift = map(torch.stack, zip(*pairs, strict=True)) if affine else (None, None)
            width = torch.tensor(used, dtype=torch.int32) if stride == 2 else None
            found.append((image, weight, scale, shift, relu, stride, used, width, groups))
    return found


def _bn_act_cat() -> list[Arguments]:
    found: list[Arguments] = []
    for dtype in HALVES_TOO:
        draw = _Draw(dtype, 2)
        for n, c, h, w, others, affine, relu in _ENDS:
            z, scale_and_shift = draw.image(n, c, h, w), draw.affine(c)
            other = draw.image(n, others, h, w) if others else None
            found.append((z, *scale_and_shift, other, *(draw.affine(others) if affine else (None, None)), relu))
    return found


def _front(draw: _Draw, z: Tensor, position: int) -> Arguments:
    """The first arguments of a backward op: grad (every other time a slice of a wider one), z, norm, relu."""
    n, c, h, w = z.shape
    grad = draw.image(n, c + 5, h, w)[:, 4 : c + 4] if position % 2 else draw.image(n, c, h, w)
    mean, offset, slope = z.float().mean((0, 2, 3)), 0.1 * draw.normal(c), 0.1 * draw.normal(c)
    return grad, z, torch.stack((*draw.affine(c), mean, offset, slope)), position % 3 != 1


def _pw_bnstats_backward() -> list[Arguments]:
    found: list[Arguments] = []
    draws = {dtype: _Draw(dtype, 3) for dtype in HALVES_TOO}
    for position, forward in enumerate(_pw_bnstats()):
        x, weight, scale, shift, relu, *settings = forward
        draw, z = draws[x.dtype], pw_bnstats_reference(*forward)[0]
        centre = None if position % 5 == 4 else draw.normal(settings[2])
        found.append((*_front(draw, z, position), x, weight, scale, shift, centre, relu, *settings))
    return found


def _dw_bnstats_backward() -> list[Arguments]:
    found: list[Arguments] = []
    draws = {dtype: _Draw(dtype, 4) for dtype in HALVES_TOO}
    for position, forward in enumerate(_dw_bnstats()):
        x, weight, scale, shift, relu, *settings = forward
        draw, z = draws[x.dtype], dw_bnstats_reference(*forward)[0]
        centre = None if position % 5 == 3 else draw.normal(settings[1])
        found.append((*_front(draw, z, position), x, weight, scale, shift, centre, relu, *settings))
    return found


def _bn_act_cat_backward() -> list[Arguments]:
    found: list[Arguments] = []
    draws = {dtype: _Draw(dtype, 5) for dtype in HALVES_TOO}
    for z, scale, shift, other, *_, relu in _bn_act_cat():
        draw, first = draws[z.dtype], 0 if other is None else other.shape[1]
        n, c, h, w = z.shape
        found.append((draw.image(n, first + c, h, w), first, z, scale, shift, draw.normal(c), relu))
    return found


BLOCK_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    "bn_act_cat": _bn_act_cat,
    "bn_act_cat_backward": _bn_act_cat_backward,
    "dw_bnstats": lambda: [*_dw_bnstats(), *_dw_bnstats_in_groups()],
    "dw_bnstats_backward": _dw_bnstats_backward,
    "pw_bnstats": _pw_bnstats,
    "pw_bnstats_backward": _pw_bnstats_backward,
}
