"""Small arguments for the ops of the fused units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spos_fast.ops.dispatch import OPS

Arguments = tuple[Any, ...]
KINDS = ("shuffle_unit", "xception_unit")
LAST = torch.channels_last


@dataclass(frozen=True)
class Sizes:
    """One unit: input [samples, channels, height, width]; stored mid channels, used ones, channels made; kernel."""

    samples: int
    channels: int
    height: int
    width: int
    stored: int
    mid: int
    made: int
    kernel: int
    affine: bool = False
    stride: int = 1
    projects: bool = False
    device_width: int | None = None


SMALL = Sizes(2, 8, 5, 6, 4, 4, 4, 3)

# Widths 1 and 3, kernels larger than the image, counts that no vector width divides, one image of more rows than a task
# takes, odd sides under stride 2, and widths that only the kernel reads.
SIZES = (
    Sizes(3, 16, 9, 7, 20, 12, 8, 5),
    Sizes(1, 6, 1, 3, 5, 5, 4, 7, affine=True),
    Sizes(2, 40, 5, 1, 33, 33, 18, 3, affine=True),
    Sizes(2, 12, 8, 9, 24, 17, 20, 3, stride=2, projects=True),
    Sizes(1, 7, 11, 5, 10, 10, 9, 7, affine=True, stride=2, projects=True),
    Sizes(2, 5, 4, 6, 6, 6, 11, 5, projects=True),
    Sizes(2, 24, 6, 7, 20, 20, 12, 3, affine=True, device_width=13),
    Sizes(2, 32, 15, 16, 48, 32, 16, 7),
    Sizes(1, 8, 70, 65, 17, 3, 6, 9, affine=True),
)

# Of all groups together, and how many there are.
GROUPED = (
    (Sizes(6, 16, 5, 7, 20, 12, 8, 5, affine=True), 3),
    (Sizes(4, 7, 6, 5, 10, 10, 9, 3, stride=2, projects=True), 2),
)


def weights(kind: str, size: Sizes, generator: torch.Generator | None = None) -> list[Tensor | None]:
    """Weights of a unit in the order of the op's arguments, None for no projection; of deviation one after summing."""

    def normal(rows: int, columns: int, kernel: int = 1) -> Tensor:
        return torch.randn(rows, columns, kernel, kernel, generator=generator) / (columns * kernel**2) ** 0.5

    b = size.channels if size.projects else size.channels // 2
    stored, made, kernel = size.stored, size.made, size.kernel
    if kind == "shuffle_unit":
        main = [normal(stored, b), normal(stored, 1, kernel), normal(made, stored)]
    else:
        main = [normal(b, 1, kernel), normal(stored, b), normal(stored, 1, 3), normal(stored, stored)]
        main += [normal(stored, 1, kernel), normal(made, stored)]
    return [*main, *([normal(b, 1, kernel), normal(b, b)] if size.projects else [None, None])]


def normalised(kind: str, size: Sizes) -> int:
    """Channels of all BN layers together."""
    b = size.channels if size.projects else size.channels // 2
    main = 2 * size.mid + size.made if kind == "shuffle_unit" else b + 4 * size.mid + size.made
    return main + (2 * b if size.projects else 0)


def image(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random channels-last images."""
    return torch.randn(size, dtype=dtype).contiguous(memory_format=LAST)


def unit(kind: str, size: Sizes, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights of the main branch, and the keywords of the public function."""
    *main, proj_dw, proj_pw = [None if w is None else w.to(dtype) for w in weights(kind, size)]
    projection = None if proj_dw is None or proj_pw is None else (proj_dw, proj_pw)
    return [w for w in main if w is not None], {"projection": projection, "stride": size.stride}


def arguments(kind: str, dtype: torch.dtype, seed: int, sizes: Sequence[Sizes] = SIZES) -> list[Arguments]:
    """Of the training op, for every size."""
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        # The statistics of few channels that halves round are a matter of luck, for the reference as for a kernel.
        if dtype != torch.float32 and size is SIZES[-1]:
            continue
        x = torch.randn(size.samples, size.channels, size.height, size.width, generator=generator) + 0.5
        stored = [None if w is None else w.to(dtype) for w in weights(kind, size, generator)]
        count = normalised(kind, size)
        gamma = 0.5 + torch.rand(count, generator=generator) if size.affine else None
        beta = torch.randn(count, generator=generator) if size.affine else None
        width = None if size.device_width is None else torch.tensor(size.device_width, dtype=torch.int32)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        found.append((x, *stored, gamma, beta, size.mid, width, size.stride))
    return found


def _training(kind: str) -> list[Arguments]:
    found = [a for dtype in (torch.float32, torch.float16) for a in arguments(kind, dtype, 0)]
    nchw, *rest = found[0]
    found += [(nchw.contiguous(), *rest), (*found[1], 1e-3, False), *arguments(kind, torch.bfloat16, 1)]
    # What is saved of channels beyond a device's width is not specified, and so not compared.
    found = [a if a[-2] is None or len(a) > len(found[0]) else (*a, 1e-5, False) for a in found]
    for dtype in (torch.bfloat16, torch.float32):
        grouped = arguments(kind, dtype, 6, [size for size, _ in GROUPED])
        found += [(*a, 1e-5, True, groups) for a, (_, groups) in zip(grouped, GROUPED, strict=True)]
    return found


def _backward(kind: str) -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for x, *rest in arguments(kind, dtype, 2):
            out, *saved = OPS[kind].reference(x, *rest)
            grad = torch.randn(out.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
            found.append((grad, x, *saved, *rest))
    return found


def _infer(kind: str) -> list[Arguments]:
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for size, (x, *rest) in zip(SIZES, arguments(kind, dtype, 4), strict=False):
            *stored, gamma, _, mid, width, stride = rest
            shift = torch.randn(normalised(kind, size), generator=generator)
            found.append((x, *stored, gamma, shift, mid, width, stride))
        for (size, groups), given in zip(GROUPED, arguments(kind, dtype, 7, [s for s, _ in GROUPED]), strict=True):
            scale, shift = torch.randn(2, groups, normalised(kind, size), generator=generator)
            *stored, gamma, _, mid, width, stride = given
            found.append((*stored, None if gamma is None else scale, shift, mid, width, stride, groups))
    return found


def layers_of(kind: str, size: Sizes, longer: int = 0) -> list[int]:
    """Channels of every BN layer, those of mid channels ``longer`` than what is used."""
    b, mid = size.channels if size.projects else size.channels // 2, size.mid + longer
    main = [mid, mid, size.made] if kind == "shuffle_unit" else [b, mid, mid, mid, mid, size.made]
    return main + ([b, b] if size.projects else [])


def evaluated() -> list[Arguments]:
    """Of the op that folds running statistics itself: both units, vectors longer than what is used of them."""
    found: list[Arguments] = []
    generator = torch.Generator().manual_seed(8)
    sizes = [size for size in SIZES if size.device_width is None]
    for kind in KINDS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for size, (x, *rest) in zip(sizes, arguments(kind, dtype, 4, sizes), strict=False):
                stored = [w for w in rest[:-5] if w is not None]
                widths = layers_of(kind, size, size.stored - size.mid)
                mean, var, gamma, beta = ([torch.rand(n, generator=generator) + 0.5 for n in widths] for _ in range(4))
                affine = (gamma, beta) if size.affine else ([], [])
                found.append((x, stored, mean, var, *affine, size.mid, size.stride, 1e-3))
    return found


def trained() -> list[Arguments]:
    """The same units on batch statistics."""
    found: list[Arguments] = []
    for x, stored, mean, var, gamma, beta, mid, stride, eps in evaluated():
        counters = [torch.tensor(layer) for layer in range(len(mean) - 1)]
        momenta = [0.1 + 0.05 * layer for layer in range(len(mean))]
        found.append((x, stored, mean, var, counters, gamma, beta, momenta, mid, stride, eps))
    return found


def _infer_backward(kind: str) -> list[Arguments]:
    generator = torch.Generator().manual_seed(5)
    found: list[Arguments] = []
    for given in _infer(kind)[:7]:
        out = OPS[f"{kind}_infer"].reference(*given)
        found.append((torch.randn(out.shape, generator=generator), *given))
    return found


UNIT_SAMPLES: dict[str, Callable[[], list[Arguments]]] = {
    kind + suffix: partial(made, kind)
    for kind in KINDS
    for suffix, made in (
        ("", _training),
        ("_backward", _backward),
        ("_infer", _infer),
        ("_infer_backward", _infer_backward),
    )
} | {"unit_eval": evaluated, "unit_train": trained}
