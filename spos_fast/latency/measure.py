"""Measures the parts of all networks of a space: every choice of every layer, the stem and the head."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.latency.settings import LatencySettings, describe_machine, describe_versions
from spos_fast.latency.table import LatencyTable, Spread, plain_config
from spos_fast.latency.timing import (
    Clock,
    Compiler,
    Part,
    Progress,
    deployed,
    images_for,
    parts_of,
    quiet,
    structure,
)
from spos_fast.spaces import Space

# samples[layer][choice]: seconds. The first layer is the stem, the last the head; their choices are copies.
Samples = list[list[list[float]]]


def measure(
    space: Space,
    settings: LatencySettings | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LatencyTable:
    """Time every choice of every layer inside of whole networks.

    In a round as many random networks run as a layer has choices, so that every choice runs once, between neighbours
    that change from round to round: its input was just written by the block before, and what is in the caches is what
    whole networks leave there. Entries are medians over the rounds, with the quantiles beside them. Modules are those
    of ``space.build`` in evaluation mode, channels last, as :func:`spos_fast.evaluate` runs them: blocks run as one
    fused inference op where there is a kernel for it (float32; batch normalisation is folded in at every call).

    Args:
        space: whose blocks are measured.
        settings: how; :class:`LatencySettings` by default.
        device: where.
        progress: hears (rounds done, rounds in all), warm-up included.

    Returns:
        The table, without a test of its predictions (:func:`spos_fast.latency.compare`).

    Raises:
        InputError: the space's networks have no blocks that run one after the other.
    """
    settings, device = settings or LatencySettings(), torch.device(device)
    with quiet(settings) as threads:
        candidates = _candidates(space, settings, device)
        samples = _sample(candidates, images_for(space, settings, device), settings, Clock(device), progress)
    stem, *layers, head = samples
    shaped = zip(layers, space.layer_shapes, strict=True)
    return LatencyTable(
        space={"name": space.name, "config": plain_config(space)},
        settings=dataclasses.replace(settings, threads=threads),
        machine=describe_machine(device),
        versions=describe_versions(),
        stem=Spread.of(np.concatenate(stem)),
        head=Spread.of(np.concatenate(head)),
        layers=tuple(_spread(layer, shape) for layer, shape in shaped),
    )


def _candidates(space: Space, settings: LatencySettings, device: torch.device) -> list[list[Part]]:
    """For every layer what can run there, in the order of flattened genes, and as many stems and heads: a single copy
    would stay in the caches while blocks take turns, as no network's does.
    """
    shapes = space.layer_shapes
    most = max(map(math.prod, shapes))
    sizes = [most, *map(math.prod, shapes), most]
    candidates: list[list[Part]] = [[] for _ in sizes]
    compiler = Compiler()
    for number in range(most):
        genes: list[int] = []
        for shape in shapes:
            genes += map(int, np.unravel_index(number % math.prod(shape), shape))
        network = deployed(space, space.architecture(genes), settings, device)
        x = images_for(space, settings, device)
        parts = parts_of(network)
        if len(parts) != len(sizes):
            raise InputError(
                f"space: the networks of {space.name!r} are no chain with a block a gene, so that their latency is not "
                "the sum of one entry a gene; choose another space"
            )
        for there, size, part in zip(candidates, sizes, parts, strict=True):
            key = structure(part), tuple(x.shape)
            x = part(x)
            if number < size:
                there.append(compiler(part, key) if settings.compiled else part)
    return candidates


def _sample(
    candidates: list[list[Part]], images: Tensor, settings: LatencySettings, clock: Clock, progress: Progress | None
) -> Samples:
    rng = np.random.default_rng(settings.seed)
    samples: Samples = [[[] for _ in there] for there in candidates]
    most = max(map(len, candidates))
    total = settings.warmup + settings.rounds
    for number in range(total):
        orders = [rng.permutation(len(there)) for there in candidates]
        for place in range(most):
            chosen = [int(order[place % len(order)]) for order in orders]
            parts = [there[choice] for there, choice in zip(candidates, chosen, strict=True)]
            seconds = clock.chain(parts, images)
            if number >= settings.warmup:
                for layer, choice, spent in zip(samples, chosen, seconds, strict=True):
                    layer[choice].append(spent)
        if progress is not None:
            progress(number + 1, total)
    return samples


def _spread(layer: list[list[float]], shape: tuple[int, ...]) -> Spread:
    entries = [Spread.of(np.array(seconds)) for seconds in layer]
    names = [field.name for field in dataclasses.fields(Spread)]
    return Spread(*(np.array([getattr(entry, name) for entry in entries]).reshape(shape) for name in names))
