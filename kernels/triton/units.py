"""Launchers of the fused units: the passes of the building blocks, one behind another, without a word to the host.

One pass a layer and one small launch between two of them, forwards; backwards two passes a layer, for its input's and
its weight's gradient. Depthwise passes are the CUDA kernels where they are built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.kernels import concatenation, depthwise, merging, pointwise
from spos_fast.kernels.matrix import Input, Output, image, matrix, wide
from spos_fast.ops.dispatch import OPS
from spos_fast.ops.groups import joined
from spos_fast.ops.unit_layers import Layer, Unit, check_vector, make_unit, shuffle_chain, xception_chain

LAST = torch.channels_last


class Stage(NamedTuple):
    """A layer of a unit with all that its passes need.

    Attributes:
        layer: the convolution.
        weight: its weight, contiguous.
        position: among the unit's layers.
        shape: sides of the image that it reads and makes.
        read, made: int32 [] on the device where the layer reads or makes the unit's mid channels and a tensor says how
            many there are, else None.
    """

    layer: Layer
    weight: Tensor
    position: int
    shape: depthwise.Shape
    read: Tensor | None
    made: Tensor | None


def shuffle_unit(
    x: Tensor, pw1: Tensor, dw: Tensor, pw2: Tensor, proj_dw: Tensor | None, proj_pw: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, mid: int, width: Tensor | None, stride: int = 1, eps: float = 1e-5,
    save: bool = True, groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ShuffleNetV2 unit in training: out, saved, mean, var; see spos_fast.ops.units."""
    unit = make_unit(
        shuffle_chain, _last(x), (pw1, dw, pw2), (proj_dw, proj_pw), mid, stride, on_batch=True, groups=groups
    )
    return _forward(unit, width, gamma, beta, eps, save)


def xception_unit(
    x: Tensor, dw1: Tensor, pw1: Tensor, dw2: Tensor, pw2: Tensor, dw3: Tensor, pw3: Tensor,
    proj_dw: Tensor | None, proj_pw: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mid: int,
    width: Tensor | None, stride: int = 1, eps: float = 1e-5, save: bool = True, groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Xception unit in training: out, saved, mean, var; see spos_fast.ops.units."""
    weights = (dw1, pw1, dw2, pw2, dw3, pw3)
    unit = make_unit(xception_chain, _last(x), weights, (proj_dw, proj_pw), mid, stride, on_batch=True, groups=groups)
    return _forward(unit, width, gamma, beta, eps, save)


def shuffle_unit_backward(
    grad: Tensor, x: Tensor, saved: Tensor, mean: Tensor, var: Tensor, pw1: Tensor, dw: Tensor, pw2: Tensor,
    proj_dw: Tensor | None, proj_pw: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mid: int,
    width: Tensor | None, stride: int = 1, eps: float = 1e-5,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, the weights, gamma and beta; see spos_fast.ops.units."""
    unit = make_unit(shuffle_chain, _last(x), (pw1, dw, pw2), (proj_dw, proj_pw), mid, stride, on_batch=True)
    return _backward(unit, width, _last(grad), saved, mean, var, gamma, beta, eps)


def xception_unit_backward(
    grad: Tensor, x: Tensor, saved: Tensor, mean: Tensor, var: Tensor, dw1: Tensor, pw1: Tensor, dw2: Tensor,
    pw2: Tensor, dw3: Tensor, pw3: Tensor, proj_dw: Tensor | None, proj_pw: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, mid: int, width: Tensor | None, stride: int = 1, eps: float = 1e-5,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, the weights, gamma and beta; see spos_fast.ops.units."""
    weights = (dw1, pw1, dw2, pw2, dw3, pw3)
    unit = make_unit(xception_chain, _last(x), weights, (proj_dw, proj_pw), mid, stride, on_batch=True)
    return _backward(unit, width, _last(grad), saved, mean, var, gamma, beta, eps)


def shuffle_unit_infer(
    x: Tensor, pw1: Tensor, dw: Tensor, pw2: Tensor, proj_dw: Tensor | None, proj_pw: Tensor | None,
    scale: Tensor | None, shift: Tensor, mid: int, width: Tensor | None, stride: int = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """ShuffleNetV2 unit with a scale and a shift in place of every batch norm; see spos_fast.ops.units."""
    unit = make_unit(
        shuffle_chain, _last(x), (pw1, dw, pw2), (proj_dw, proj_pw), mid, stride, on_batch=False, groups=groups
    )
    return _infer(unit, width, scale, shift)


def xception_unit_infer(
    x: Tensor, dw1: Tensor, pw1: Tensor, dw2: Tensor, pw2: Tensor, dw3: Tensor, pw3: Tensor,
    proj_dw: Tensor | None, proj_pw: Tensor | None, scale: Tensor | None, shift: Tensor, mid: int,
    width: Tensor | None, stride: int = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Xception unit with a scale and a shift in place of every batch norm; see spos_fast.ops.units."""
    weights = (dw1, pw1, dw2, pw2, dw3, pw3)
    unit = make_unit(xception_chain, _last(x), weights, (proj_dw, proj_pw), mid, stride, on_batch=False, groups=groups)
    return _infer(unit, width, scale, shift)


def _forward(
    unit: Unit, width: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_vector("gamma", gamma, unit)
    check_vector("beta", beta, unit)
    if unit.groups > 1 and save:  # each group's outputs have to lie together
        out, saved, mean, var = joined([_forward(run, width, gamma, beta, eps, save) for run in unit.runs()])
        return out, saved, mean, var
    mean, var, scale, shift = (unit.x.new_empty(unit.each(unit.normalised), dtype=wide(unit.x)) for _ in range(4))
    means, variances, scales, shifts, gammas, betas = _cut(unit, mean, var, scale, shift, gamma, beta)
    saved = unit.x.new_empty(unit.each(unit.saved_size if save else 0))
    kept = _kept(unit, saved) if save else None

    def run(stages: Sequence[Stage], y: Input) -> Input:
        """The chain's last convolution, with the batch norm that is still to be applied to it."""
        for stage in stages:
            at, channels = stage.position, stage.layer.made
            if stage.layer.depthwise and _native("dw_bnstats", y.data):
                made, *moments = OPS["dw_bnstats"].overload(
                    _image(y.data, unit, *stage.shape[:2]), stage.weight, y.scale, y.shift, y.relu,
                    stage.layer.stride, channels, stage.made, unit.groups,
                )  # fmt: skip
                z = matrix(made) if kept is None else kept[at].copy_(matrix(made))
                found = merging.whole(*moments, z.shape[0] // unit.groups, unit.groups)
            else:
                z = y.data.new_empty(_pixels(unit, stage), channels) if kept is None else kept[at]
                if stage.layer.depthwise:
                    found = depthwise.forward(y, stage.shape, stage.weight, stage.layer.stride, z)
                else:
                    found = pointwise.forward(y, stage.weight, channels, stage.made, z)
            norm = (means[at], variances[at], scales[at], shifts[at], gammas[at], betas[at])
            merging.merge_into_norm(found, *norm, stage.made, eps)
            y = Input(z, scales[at], shifts[at], not stage.layer.depthwise, channels, stage.made, groups=unit.groups)
        return y

    main, projection = _stages(unit, width)
    y = run(main, _input(unit))
    out = image(unit.x, *unit.out_shape[1:])
    if projection:
        beside = run(projection, _whole_input(unit))
        other = (beside.data, beside.scale, beside.shift)
    else:
        other = (matrix(unit.x), None, None)
    concatenation.concatenate(y.data, y.scale, y.shift, *other, True, matrix(out), unit.groups)
    return out, saved, mean, var


def _backward(
    unit: Unit, width: Tensor | None, grad: Tensor, saved: Tensor, mean: Tensor, var: Tensor,
    gamma: Tensor | None, beta: Tensor | None, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    kept = _kept(unit, saved)
    grad_gamma, grad_beta = torch.empty_like(mean), torch.empty_like(mean)
    scale, shift = merging.scale_and_shift(mean, var, gamma, beta, eps)
    means, variances, scales, shifts, gammas, betas = _cut(unit, mean, var, scale, shift, grad_gamma, grad_beta)
    weights: list[Tensor] = [saved] * len(unit.layers)

    def run(stages: Sequence[Stage], x: Input, grad: Tensor, passed: Tensor | None = None) -> Tensor:
        """The gradient of the chain's input, between the columns of passed if there are such; fills weights."""
        found: merging.Partial | None = None
        for stage in reversed(stages):
            at, last, first = stage.position, stage is stages[-1], stage is stages[0]
            if last:
                found = concatenation.sums(grad, kept[at], scales[at], shifts[at], means[at], True)
            norm = merging.merge_into_gradients(
                found, betas[at], gammas[at], means[at], variances[at], scales[at], shifts[at], stage.made, eps
            )
            # The pass behind has masked the gradient of what it loaded; only the last layer's is as it came.
            made = Output(grad, kept[at], norm, last, stage.layer.made, stage.made)
            if first:
                read, centre, other = x, None, passed
            else:
                relu = stage.layer.depthwise  # a depthwise layer stands behind a 1x1 convolution, which ReLU ends
                read = Input(kept[at - 1], scales[at - 1], shifts[at - 1], relu, stage.layer.read, stage.read)
                centre, other = means[at - 1], None
            grad, weights[at], found = _gradients(unit, stage, made, read, centre, other)
        return grad

    main, projection = _stages(unit, width)
    front, back = matrix(grad[:, : unit.beside]), matrix(grad[:, unit.beside :])
    if projection:
        dx = run(main, _input(unit), back)
        dx += run(projection, _whole_input(unit), front)
    else:
        dx = run(main, _input(unit), back, front)
    absent = [] if projection else [unit.x.new_empty(0), unit.x.new_empty(0)]
    return _image(dx, unit, *unit.x.shape[2:]), *weights, *absent, grad_gamma, grad_beta


def _gradients(
    unit: Unit, stage: Stage, made: Output, read: Input, centre: Tensor | None, passed: Tensor | None
) -> tuple[Tensor, Tensor, merging.Partial | None]:
    """Gradients of a layer's input (between the columns of passed) and of its weight, and the sums of the former."""
    height, width, *out_sides = stage.shape
    pixels, channels, stride = unit.x.shape[0] * height * width, stage.layer.read, stage.layer.stride
    if not stage.layer.depthwise:
        out = read.data.new_empty(pixels, channels if passed is None else 2 * channels)
        found = pointwise.data_gradient(made, read, stage.weight, centre, out, passed)
        return out, pointwise.weight_gradient(made, read, stage.weight), found
    if _native("dw_bnstats_backward", read.data):
        grad_x, grad_weight, *sums = OPS["dw_bnstats_backward"].overload(
            _image(made.grad, unit, *out_sides), _image(made.z, unit, *out_sides), made.norm, made.relu,
            _image(read.data, unit, height, width), stage.weight, read.scale, read.shift, centre, read.relu,
            stride, channels, stage.made,
        )  # fmt: skip
        out = matrix(grad_x)
        found = None if centre is None else merging.whole(*sums, pixels)
    else:
        out = read.data.new_empty(pixels, channels)
        found = depthwise.data_gradient(made, read, stage.shape, stage.weight, stride, centre, out)
        grad_weight = depthwise.weight_gradient(made, read, stage.shape, stage.weight, stride)
    if passed is not None:
        out = torch.stack((passed, out), 2).flatten(1)
    return out, grad_weight, found


def _infer(unit: Unit, width: Tensor | None, scale: Tensor | None, shift: Tensor) -> Tensor:
    check_vector("scale", scale, unit, grouped=True)
    check_vector("shift", shift, unit, grouped=True)
    scales, shifts = _cut(unit, scale, shift)
    out = image(unit.x, *unit.out_shape[1:])
    front, back = matrix(out)[:, : unit.beside], matrix(out)[:, unit.beside :]

    def run(stages: Sequence[Stage], y: Input, end: Tensor) -> None:
        """Fill end with what the chain makes."""
        for stage in stages:
            at, channels = stage.position, stage.layer.made
            z = end if stage is stages[-1] else y.data.new_empty(_pixels(unit, stage), channels)
            if stage.layer.depthwise:
                depthwise.infer(y, stage.shape, stage.weight, stage.layer.stride, scales[at], shifts[at], z)
            else:
                pointwise.infer(y, stage.weight, channels, stage.made, scales[at], shifts[at], z)
            y = Input(z, None, None, False, channels, stage.made, groups=unit.groups)

    main, projection = _stages(unit, width)
    run(main, _input(unit), back)
    if projection:
        run(projection, _whole_input(unit), front)
    else:
        front.copy_(matrix(unit.x)[:, ::2])
    return out


def _stages(unit: Unit, width: Tensor | None) -> tuple[list[Stage], list[Stage]]:
    """Main chain and projection."""

    def of(chain: Sequence[Layer], position: int, width: Tensor | None) -> Iterator[Stage]:
        sides: Sequence[int] = unit.x.shape[2:]
        made: Tensor | None = None
        for layer in chain:
            read = made
            if not layer.depthwise:
                made = None if layer is chain[-1] else width
            shape = depthwise.shape_of(*sides, layer.stride)
            yield Stage(layer, layer.weight.contiguous(), position, shape, read, made)
            sides, position = shape[2:], position + 1

    return [*of(unit.main, 0, width)], [*of(unit.projection, len(unit.main), None)]


def _input(unit: Unit) -> Input:
    """What the main chain reads: all of x, or its odd channels (those of a depthwise layer packed)."""
    if unit.projection:
        return _whole_input(unit)
    if unit.main[0].depthwise:
        odd = matrix(_last(unit.x[:, 1::2]))
        return Input(odd, None, None, False, unit.beside, None, groups=unit.groups)
    return Input(matrix(unit.x), None, None, False, unit.beside, None, 1, 2, unit.groups)


def _whole_input(unit: Unit) -> Input:
    """All of x, which a projection reads."""
    return Input(matrix(unit.x), None, None, False, unit.beside, None, groups=unit.groups)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=LAST)


def _pixels(unit: Unit, stage: Stage) -> int:
    return unit.x.shape[0] * stage.shape.out_height * stage.shape.out_width


def _kept(unit: Unit, saved: Tensor) -> list[Tensor]:
    """The convolutions' outputs, [pixels, channels], as views."""
    if saved.numel() != unit.saved_size:
        raise InputError(
            f"saved must hold {unit.saved_size} values, which a forward pass with save=True leaves; got {saved.numel()}"
        )
    shapes = [(n * height * width, channels) for n, channels, height, width in unit.saved_shapes]
    parts = saved.split([pixels * channels for pixels, channels in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _cut(unit: Unit, *vectors: Tensor | None) -> Iterator[Sequence[Any]]:
    """Each vector's parts, one a layer; None for a vector that was not given."""
    for vector in vectors:
        yield [None] * len(unit.sizes) if vector is None else vector.contiguous().split(unit.sizes, -1)


def _image(rows: Tensor, unit: Unit, height: int, width: int) -> Tensor:
    """[N * height * width, C], also a slice of columns, as a channels-last [N, C, height, width]."""
    samples, channels, distance = unit.x.shape[0], rows.shape[1], rows.stride(0)
    strides = (height * width * distance, 1, width * distance, distance)
    return rows.as_strided((samples, channels, height, width), strides)


def _native(op: str, x: Tensor) -> bool:
    return op in OPS and OPS[op].choices[x.device.type].kernel == "native"
