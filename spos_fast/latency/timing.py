"""Networks as they run when they are deployed, and a clock for their parts."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.latency.settings import DTYPES, LatencySettings
from spos_fast.spaces import Space
from spos_fast.supernet import Network

Part = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], Any]

# Runs of a network before the one that is timed. The first after another network is some 10 % slower.
UNTIMED = 2


def deployed(space: Space, arch: Architecture, settings: LatencySettings, device: torch.device) -> Network:
    """A network of its own in evaluation mode, channels last.

    Raises:
        InputError: the space's networks are not made of a stem, blocks and a head.
    """
    network = space.build(arch)
    if not isinstance(network, Network):
        raise InputError(f"space: {space.name} builds {type(network).__name__}; latency is measured of a Network")
    network.to(device=device, dtype=DTYPES[settings.dtype])
    return network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def parts_of(network: Network) -> list[Part]:
    """What a network runs one after the other: the stem, its blocks, and the head as one."""

    def head(x: Tensor) -> Tensor:
        return network.classifier(network.dropout(network.conv_last(x).mean((2, 3))))

    return [network.first_conv, *network.features, head]


def images_for(space: Space, settings: LatencySettings, device: torch.device) -> Tensor:
    """Random images [batch_size, in_channels, input_size, input_size], channels last."""
    config, generator = space.config(), torch.Generator().manual_seed(settings.seed)
    size = config["input_size"]
    images = torch.randn(settings.batch_size, config["in_channels"], size, size, generator=generator)
    return images.to(device, DTYPES[settings.dtype]).contiguous(memory_format=torch.channels_last)


class Compiler:
    """Compiles parts for fixed shapes. Parts of equal structure share what is compiled.

    torch.compile keeps what it made with the code of the function that was called, looks through all of it at every
    call and gives up after some. Every structure therefore gets a copy of that function.
    """

    def __init__(self) -> None:
        self._functions: dict[Any, FunctionType] = {}

    def __call__(self, part: Part, key: Any) -> Part:
        """The compiled part; ``key`` tells structures (and shapes of input) apart."""

        def run(module: Part, x: Tensor) -> Tensor:
            return module(x)

        if key not in self._functions:
            code = run.__code__.replace(co_name=f"run_{len(self._functions)}")
            self._functions[key] = torch.compile(FunctionType(code, globals()), dynamic=False)  # type: ignore[assignment]
        function = self._functions[key]
        return lambda x: function(part, x)


def structure(part: Part) -> str:
    """Layers and sizes of a module in words: equal for modules that differ in weights only."""
    return repr(part) if isinstance(part, nn.Module) else "head"


class Clock:
    """Times what happens between two marks: wall time on the CPU, events of the stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"

    def mark(self) -> Any:
        """Now."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """From every mark to the next."""
        pairs = itertools.pairwise(marks)
        if not self._on_gpu:
            return [after - before for before, after in pairs]
        marks[-1].synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in pairs]

    def chain(self, parts: Sequence[Part], x: Tensor) -> list[float]:
        """Seconds of every part of a chain, which has just run before: its weights are as near as they are in a network
        that serves one request after the other.
        """
        for _ in range(UNTIMED):
            y = x
            for part in parts:
                y = part(y)
        marks, y = [self.mark()], x
        for part in parts:
            y = part(y)
            marks.append(self.mark())
        return self.seconds(marks)


@contextmanager
def quiet(settings: LatencySettings) -> Iterator[int]:
    """No gradients, no garbage collection, the number of threads of the settings (which is handed out)."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(settings.threads or threads)
    gc.disable()
    try:
        with torch.no_grad():
            yield torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
