"""What a training step of a quantized ResNet-18 costs against one in full precision: time, and memory.

    python -m bench.quant_step --batch 8 --size 224               # prints a table
    python -m bench.quant_step --batch 16 --size 112 --compile    # torch.compile of the composed ones too, minutes

A step is forward, backward and SGD with momentum, channels last, with bits drawn anew for every residual block. Medians
of interleaved rounds in one process; memory is what autograd keeps, parameters not counted, and the peak of the
process, from a process for each contender.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.peers.resnet import ComposedConv, ResNet, resnet18
from spos_fast.nn import QuantBasicBlock

# Weights and activations; the paper's pairs that all contenders can, that is without the single bit.
PAIRS = ((2, 2), (2, 4), (3, 4), (4, 4))
WEIGHT_BITS, ACT_BITS = (2, 3, 4), (2, 4)
FP32 = "fp32"


class QuantResNet(ResNet):
    """ResNet-18 of our blocks."""

    def __init__(self, weight_quantizer: str, act_quantizer: str) -> None:
        def block(narrow: int, wide: int, stride: int) -> nn.Module:
            quantizers: Any = dict(weight_quantizer=weight_quantizer, act_quantizer=act_quantizer)
            return QuantBasicBlock(narrow, wide, wide, stride, weight_bits=WEIGHT_BITS, act_bits=ACT_BITS, **quantizers)

        super().__init__((2, 2, 2, 2), block)
        self.bits: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for block, (weight_bits, act_bits) in zip(self.stages, self.bits, strict=True):
            setting = (
                cast(QuantBasicBlock, block).conv1.out_channels,
                WEIGHT_BITS.index(weight_bits),
                ACT_BITS.index(act_bits),
            )
            x = block(x, setting)
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def composed(quantizer: str) -> ResNet:
    """ResNet-18 with composed quantizers."""
    return resnet18(functools.partial(ComposedConv, quantizer=quantizer))


MODELS: dict[str, Callable[[], ResNet]] = {
    FP32: resnet18,
    "spos_fast PACT, DoReFa": lambda: QuantResNet("dorefa", "pact"),
    "spos_fast LSQ": lambda: QuantResNet("lsq", "lsq"),
    "composed PACT, DoReFa": lambda: composed("pact"),
    "composed LSQ": lambda: composed("lsq"),
}
COMPILED = {"compile composed PACT, DoReFa": "composed PACT, DoReFa", "compile composed LSQ": "composed LSQ"}


class Step:
    """A training step of one contender.

    Args:
        name: which.
        batch, size: of the images.
    """

    def __init__(self, name: str, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.model = MODELS[COMPILED.get(name, name)]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.run = torch.compile(self.model) if name in COMPILED else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=4e-5)
        self.x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 1000, (batch,))
        self.draw = random.Random(0)

    def __call__(self) -> None:
        """Draw bits, one step."""
        for number, block in enumerate(self.model.stages):
            pair = self.draw.choice(PAIRS)
            if isinstance(self.model, QuantResNet):
                self.model.bits[number : number + 1] = [pair]
            for layer in block.modules():
                if isinstance(layer, ComposedConv):
                    layer.set_bits(*pair)
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Forward."""
        return functional.cross_entropy(self.run(self.x), self.labels)

    def saved_bytes(self) -> int:
        """What autograd keeps between forward and backward, each storage once, without parameters."""
        own = {value.untyped_storage().data_ptr() for value in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = self.loss()
        del loss
        return sum(kept.values())


def measured(steps: dict[str, Step], rounds: int, cpu_time: bool) -> dict[str, list[float]]:
    """Seconds of every contender in every round, in an order drawn each time."""
    clock = time.process_time if cpu_time else time.perf_counter
    order, names = random.Random(1), list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):  # the first two warm up
        order.shuffle(names)
        for name in names:
            start = clock()
            steps[name]()
            if number > 1:
                samples[name].append(clock() - start)
    return samples


def peak_mib(name: str, batch: int, size: int, threads: int) -> float:
    """Peak resident memory of a process that makes three steps."""
    given = ["--batch", str(batch), "--size", str(size), "--threads", str(threads), "--peak", name]
    done = subprocess.run(
        [sys.executable, "-m", "bench.quant_step", *given], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="their height and width (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall clock (busy machines)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the composed models too")
    parser.add_argument("--peak", choices=list(MODELS), help="print the peak memory of three steps of this one, in MiB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        step = Step(options.peak, options.batch, options.size)
        for _ in range(3):
            step()
        # Not ru_maxrss, which a process inherits from the one that started it.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        print(int(found[1]) / 1024)
        return
    names = [*MODELS, *(COMPILED if options.compile else ())]
    steps = {name: Step(name, options.batch, options.size) for name in names}
    samples = measured(steps, options.rounds, options.cpu_time)
    print(f"ResNet-18, {options.batch} images, {options.size} x {options.size}, {options.threads} thread(s)\n")
    print("| step | ms | of fp32 | kept by autograd, MiB | peak, MiB |\n|---|---|---|---|---|")
    for name in names:
        ratio = statistics.median(mine / base for mine, base in zip(samples[name], samples[FP32], strict=True))
        kept = peak = ""
        if name in MODELS:
            kept = f"{steps[name].saved_bytes() / 2**20:.1f}"
            peak = f"{peak_mib(name, options.batch, options.size, options.threads):.0f}"
        print(f"| {name} | {1000 * statistics.median(samples[name]):.0f} | {ratio:.2f} | {kept} | {peak} |")


if __name__ == "__main__":
    main()
