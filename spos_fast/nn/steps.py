"""The steps of quantizers in a search: vectors with an entry for each bit-width, of which a path uses one.

The other entries' gradient is zero, not None, so an optimizer would go on moving them by momentum and decay;
:func:`hold_unsampled` keeps them where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spos_fast.nn.quant import QuantAct, QuantConv2d


def step_vectors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it is of the weights' bit-widths (or else of the activations'), of every vector of
    steps or offsets in a model, [K] or [K, channels]; a shared one once.
    """
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        names = {QuantAct: ("step", "offset"), QuantConv2d: ("weight_step",)}
        for kind, attributes in names.items():
            for attribute in attributes if isinstance(module, kind) else ():
                vector = getattr(module, attribute)
                if vector is not None and vector not in seen:
                    seen.add(vector)
                    yield f"{prefix}.{attribute}".lstrip("."), vector, kind is QuantConv2d


def step_entries(block: nn.Module, weight_index: int, act_index: int) -> dict[str, int]:
    """By name of every vector of steps in a block the entry that it uses with these indices of bit-widths: what a plain
    network with the one pair of bit-widths keeps.
    """
    return {name: weight_index if of_weights else act_index for name, _, of_weights in step_vectors(block)}


def hold_unsampled(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let the optimizer leave alone, in every step, what was not sampled of the steps of quantizers.

    Entries whose gradient is exactly zero keep their value and their momentum (every tensor of the optimizer's state
    that has the parameter's shape), whatever decay and momentum would do with them. Nothing is read from the device.
    Works with any ``torch.optim`` optimizer that takes one step a call; Adam's count of steps stays that of the vector.
    Of the model's other parameters nothing changes: those off the path have no gradient, and optimizers skip them.

    Args:
        optimizer: of the model's parameters; gets a hook before and one after its step, which stay.
        model: with :class:`QuantConv2d` or :class:`QuantAct` in it; those with a single bit-width need nothing.
    """
    vectors = [vector for _, vector, _ in step_vectors(model) if len(vector) > 1]
    before: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []

    def remember(*_: Any) -> None:
        before.clear()
        for vector in vectors:
            if vector.grad is None:
                continue
            momenta = {name: value.clone() for name, value in _momenta(optimizer, vector)}
            before.append((vector, vector.grad == 0, vector.detach().clone(), momenta))

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for vector, held, value, momenta in before:
            vector.copy_(torch.where(held, value, vector))
            for name, state in _momenta(optimizer, vector):
                # A state that this step made begins at zero.
                state.copy_(torch.where(held, momenta.get(name, torch.zeros_like(state)), state))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(put_back)


def _momenta(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state of a parameter, without what is not of its shape (a count of steps)."""
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield name, value
