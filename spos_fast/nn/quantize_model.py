"""Quantized convolutions in a model that exists: replacing its layers, and the first values of their steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from spos_fast.errors import InputError
from spos_fast.nn.quant_act import Bits, QuantAct
from spos_fast.nn.quant_conv import QuantConv2d


def quantize_model(
    model: nn.Module,
    *,
    weight_bits: Bits = 4,
    act_bits: Bits = 4,
    skip: Collection[str] | Callable[[str, nn.Conv2d], bool] | None = None,
    **quantizers: Any,
) -> nn.Module:
    """Replace the convolutions of a model, in place, by quantized ones that share their parameters.

    A convolution that is in several places stays one: it is replaced in all of them, or, if one of its names is
    skipped, in none.

    Args:
        model: any module; only its ``torch.nn.Conv2d`` change, not subclasses of them.
        weight_bits, act_bits: of all of them.
        skip: names of convolutions that stay in full precision, or a function of name and convolution that says whether
            one does; None for the first one. Linear layers always stay.
        quantizers: further keyword arguments of :class:`QuantConv2d`. An input is taken to be not negative, as behind a
            ReLU, unless ``signed_act``.

    Returns:
        The model.

    Raises:
        InputError: nothing to replace, or a name that is none of a convolution's.
    """
    modules = model.named_modules(remove_duplicate=False)  # every place of a shared one
    found = {name: module for name, module in modules if type(module) is nn.Conv2d}
    if skip is None:
        skip = list(found)[:1]
    if not callable(skip):
        unknown = [name for name in skip if name not in found]
        if unknown:
            raise InputError(f"skip: {', '.join(unknown)}: no convolutions of the model; it has {', '.join(found)}")
    skipped = skip if callable(skip) else lambda name, _: name in skip
    stay = {module for name, module in found.items() if not name or skipped(name, module)}
    quantized = {
        module: QuantConv2d.from_float(module, weight_bits=weight_bits, act_bits=act_bits, **quantizers)
        for module in found.values()
        if module not in stay
    }
    if not quantized:
        raise InputError("model: has no torch.nn.Conv2d to replace")
    for name, module in found.items():
        if module in quantized:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, quantized[module])
    return model


@torch.no_grad()
def initialize_steps(model: nn.Module, images: Tensor) -> None:
    """Set the steps of all quantizers that a forward pass reaches from the values that they see, and the weights'.

    LSQ's rule, ``2 mean|x| / sqrt(high)``, for every bit-width; PACT's clipping level is ``high`` such steps. The
    values are those of the model as it stands, quantizers in front included. One that sees only zeros keeps its steps.

    Args:
        model: with :class:`QuantConv2d` or :class:`QuantAct` in it.
        images: a batch that the model takes.
    """

    def look(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        act, x = cast(QuantAct, layer), arguments[0]
        magnitude = (x if act.signed else x.relu()).abs().to(act.step.dtype)
        mean = magnitude.mean() if act.channels is None else magnitude.mean((0, *range(2, x.dim())))
        if bool((mean > 0).all()):
            act.start_at(mean)

    layers = [layer for layer in model.modules() if isinstance(layer, QuantAct)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        for layer in model.modules():
            if isinstance(layer, QuantConv2d):
                layer.start_weight_steps()
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
