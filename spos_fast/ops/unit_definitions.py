"""The ops of the fused units: schema, fake, autograd and which reference, written once for all chains of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops import unit_reference
from spos_fast.ops.dispatch import LIBRARY, define_op, differentiable_once
from spos_fast.ops.groups import joined_gradients, runs
from spos_fast.ops.unit_layers import (
    NAMES,
    Chain,
    Unit,
    check_vector,
    make_unit,
    shuffle_chain,
    statistics_dtype,
    xception_chain,
)

_LAST = torch.channels_last

CHAINS: dict[str, Chain] = {
    "shuffle_unit": shuffle_chain,
    "shuffle_unit_infer": shuffle_chain,
    "xception_unit": xception_chain,
    "xception_unit_infer": xception_chain,
}
UNIT_OPS: dict[str, Any] = {}  # what to call, by name


def _image(unit: Unit, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=unit.x.dtype, device=unit.x.device, memory_format=_LAST)


def _define(name: str, chain: Chain) -> None:
    """Define the four ops of a unit. Their arguments: x, weights, projection, two vectors, mid, width, stride, ..."""
    count = len(NAMES[chain])
    weights = ", ".join(f"Tensor {argument}" for argument in NAMES[chain])
    given = f"{weights}, Tensor? proj_dw, Tensor? proj_pw"
    made = f"{weights}, Tensor proj_dw, Tensor proj_pw"

    def parsed(
        arguments: Sequence[Any], defaults: dict[str, Any], *, on_batch: bool
    ) -> tuple[Unit, Unit | None, tuple[Any, ...]]:
        """The unit, the slice of it that is used, and what stands in ``arguments`` behind the weights."""
        x, stored, projection = arguments[0], arguments[1 : 1 + count], (arguments[1 + count], arguments[2 + count])
        first, second, mid, width, *late = arguments[3 + count :]
        # Torch leaves out arguments that equal their defaults.
        optional = defaults | dict(zip(defaults, late, strict=False))
        groups = optional.get("groups", 1)
        unit = make_unit(chain, x, stored, projection, mid, optional["stride"], on_batch=on_batch, groups=groups)
        return unit, _narrowed(unit, chain, stored, projection, mid, width), (first, second, *optional.values())

    training = {"stride": 1, "eps": 1e-5, "save": True, "groups": 1}
    trained = {"stride": 1, "eps": 1e-5}
    folding, folded = {"stride": 1, "groups": 1}, {"stride": 1}

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        unit, used, (gamma, beta, _, eps, save, _) = parsed(arguments, training, on_batch=True)
        check_vector("gamma", gamma, unit)
        check_vector("beta", beta, unit)
        return unit_reference.forward(unit, used or unit, gamma, beta, eps, save)

    def forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
        unit, _, (_, _, _, _, save, _) = parsed(_without_width(arguments, count), training, on_batch=True)
        size, dtype = unit.each(unit.normalised), statistics_dtype(unit.x)
        return (
            _image(unit, unit.out_shape),
            unit.x.new_empty(unit.each(unit.saved_size if save else 0)),
            unit.x.new_empty(size, dtype=dtype),
            unit.x.new_empty(size, dtype=dtype),
        )

    def backward(grad: Tensor, x: Tensor, saved: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        unit, used, (gamma, beta, _, eps) = parsed((x, *rest), trained, on_batch=True)
        _check_saved(unit, saved)
        return unit_reference.backward(unit, used or unit, grad, saved, mean, var, gamma, beta, eps)

    def backward_fake(grad: Tensor, x: Tensor, saved: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Any:
        return gradients_fake(parsed(_without_width((x, *rest), count), trained, on_batch=True)[0])

    def infer(*arguments: Any) -> Tensor:
        unit, used, (scale, shift, _, _) = parsed(arguments, folding, on_batch=False)
        check_vector("scale", scale, unit, grouped=True)
        check_vector("shift", shift, unit, grouped=True)
        return unit_reference.infer(unit, used or unit, scale, shift)

    def infer_fake(*arguments: Any) -> Tensor:
        unit = parsed(_without_width(arguments, count), folding, on_batch=False)[0]
        return _image(unit, unit.out_shape)

    def infer_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        unit, used, (scale, shift, _) = parsed(arguments, folded, on_batch=False)
        return unit_reference.infer_backward(unit, used or unit, grad, scale, shift)

    def infer_backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return gradients_fake(parsed(_without_width(arguments, count), folded, on_batch=False)[0])

    def gradients_fake(unit: Unit) -> tuple[Tensor, ...]:
        beside = [layer.weight for layer in unit.projection] or [unit.x.new_empty(0)] * 2
        weights = [weight.new_empty(weight.shape) for weight in (*(layer.weight for layer in unit.main), *beside)]
        vectors = [unit.x.new_empty(unit.normalised, dtype=statistics_dtype(unit.x)) for _ in range(2)]
        return _image(unit, unit.x.shape), *weights, *vectors

    slice_of = "SymInt mid, Tensor? width, int stride=1"
    UNIT_OPS[name] = define_op(
        f"{name}(Tensor x, {given}, Tensor? gamma, Tensor? beta, {slice_of}, float eps=1e-05, bool save=True, "
        "int groups=1) -> (Tensor out, Tensor saved, Tensor mean, Tensor var)",
        reference=forward,
        fake=forward_fake,
        triton=f"spos_fast.kernels.units:{name}",
        autocast=range(3 + count),
    )
    backward_op = define_op(
        f"{name}_backward(Tensor grad, Tensor x, Tensor saved, Tensor mean, Tensor var, {given}, Tensor? gamma, "
        f"Tensor? beta, {slice_of}, float eps=1e-05) -> (Tensor x, {made}, Tensor gamma, Tensor beta)",
        reference=backward,
        fake=backward_fake,
        triton=f"spos_fast.kernels.units:{name}_backward",
    )
    UNIT_OPS[f"{name}_infer"] = define_op(
        f"{name}_infer(Tensor x, {given}, Tensor? scale, Tensor shift, {slice_of}, int groups=1) -> Tensor",
        reference=infer,
        fake=infer_fake,
        triton=f"spos_fast.kernels.units:{name}_infer",
        autocast=range(3 + count),
    )
    infer_backward_op = define_op(
        f"{name}_infer_backward(Tensor grad, Tensor x, {given}, Tensor? scale, Tensor shift, {slice_of}) "
        f"-> (Tensor x, {made}, Tensor scale, Tensor shift)",
        reference=infer_backward,
        fake=infer_backward_fake,
        plain="nothing trains through a folded unit often enough for a kernel",
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *weights, gamma, beta, ctx.mid, width, ctx.stride, ctx.eps, _, ctx.groups = inputs
        ctx.save_for_backward(x, *output[1:], *weights, gamma, beta, width)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])

    def differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (count + 11)
        x, saved, mean, var, *shared, width = ctx.saved_tensors
        grad, late = grad.contiguous(memory_format=_LAST), (ctx.mid, width, ctx.stride, ctx.eps)
        if ctx.groups == 1:
            grads = backward_op(grad, x, saved, mean, var, *shared, *late)
        else:
            each = runs(ctx.groups, (grad, x), (saved, mean, var))
            grads = joined_gradients([backward_op(*run, *shared, *late) for run in each], own=0)
        return *_fitting(grads, (x, *shared)), None, None, None, None, None, None

    def keep_folded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.mid, width, ctx.stride, ctx.groups = inputs
        ctx.save_for_backward(*tensors, width)

    def differentiate_folded(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *shared, scale, shift, width = ctx.saved_tensors
        late = (ctx.mid, width, ctx.stride)
        if ctx.groups == 1:
            grads = infer_backward_op(grad, x, *shared, scale, shift, *late)
        else:
            each = runs(ctx.groups, (grad, x), (scale, shift))
            found = [infer_backward_op(dy, part, *shared, *vectors, *late) for dy, part, *vectors in each]
            grads = joined_gradients(found, own=2)
        return *_fitting(grads, (x, *shared, scale, shift)), None, None, None, None

    def register(op: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        torch.library.register_autograd(f"spos_fast::{op}", backward, setup_context=setup, lib=LIBRARY)

    register(name, differentiate, keep)
    differentiable_once(f"{name}_backward", name)
    register(f"{name}_infer", differentiate_folded, keep_folded)


def _narrowed(
    unit: Unit, chain: Chain, weights: Sequence[Tensor], projection: Any, mid: int, width: Tensor | None
) -> Unit | None:
    """The unit at the width that a tensor says; None if there is no such tensor."""
    if width is None:
        return None
    used = min(max(int(width), 1), mid)
    narrowed = make_unit(chain, unit.x, weights, projection, used, unit.stride, on_batch=False)  # checked with the unit
    return narrowed._replace(groups=unit.groups)


def _without_width(arguments: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The arguments with None for the width, whose value a fake tensor has not."""
    at = 6 + count
    return *arguments[:at], None, *arguments[at + 1 :]


def _check_saved(unit: Unit, saved: Tensor) -> None:
    if saved.numel() != unit.saved_size:
        raise InputError(
            f"saved must hold {unit.saved_size} values, which a forward pass with save=True leaves; got {saved.numel()}"
        )


def _fitting(grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of the inputs, None for inputs that were not given."""
    return tuple(None if value is None else grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=True))


_define("shuffle_unit", shuffle_chain)
_define("xception_unit", xception_chain)
