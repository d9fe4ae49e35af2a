"""Whole tasks of the method on the ImageNet space: a training step of the supernet, and scoring a generation.

All contenders run the same paths from the same weights on the same images, dropout off so that they can be compared.
Floors: the units' floors (cases/units.py) plus stem and head.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases.units import CHOICES, GPU_TESTS, layered, unit_bytes
from bench.peers import shufflenet
from bench.peers.compiled import compiled
from bench.peers.scoring import published_scores
from bench.peers.shufflenet import State
from bench.registry import OURS, Bind, Case
from spos_fast import Architecture, Evaluator
from spos_fast.data import Images, Normalization
from spos_fast.spaces import ShuffleNetV2
from spos_fast.supernet import Supernet

# The released architecture of the paper's block search: all four choices occur.
PATH = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)
STRIDES = tuple(2 if block in (0, 4, 8, 16) else 1 for block in range(20))
CHANNELS = tuple(c for c, repeats in ((64, 4), (160, 4), (320, 8), (640, 4)) for _ in range(repeats))
NORMALIZATION = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
STEP, SCORING = "supernet step", "scoring candidates"  # the names that bench.cost looks for


@dataclass(frozen=True)
class ScoringSizes:
    """Candidates, calibration batches of 128, validation images; published: 1,050, 200, 8,000."""

    candidates: int
    batches: int
    batch: int
    validation: int

    @property
    def images(self) -> int:
        """Forwards of one image, all candidates together."""
        return self.candidates * (self.batches * self.batch + self.validation)


def cases(device: str) -> list[Case]:
    """The step at the published size and, on the CPU, at 96 x 96; scoring likewise, calibration to validation 3.2:1."""
    if device == "cuda":
        return [
            _step(device, 224, 128, "bfloat16"),
            _scoring(device, 224, ScoringSizes(8, 16, 128, 640), "bfloat16"),
        ]
    return [
        _step(device, 96, 64, "float32"),
        _step(device, 224, 32, "float32"),
        _scoring(device, 96, ScoringSizes(8, 1, 128, 40), "float32"),
        _scoring(device, 224, ScoringSizes(4, 1, 64, 20), "float32"),
    ]


def path_bytes(size: int, batch: int, genes: Sequence[int], mode: str, itemsize: int) -> int:
    """The units' floors, the stem's and the head's layers written and read once (backwards: once more each)."""
    side, before, total = size // 2, 16, 0
    for gene, stride, channels in zip(genes, STRIDES, CHANNELS, strict=True):
        total += unit_bytes(mode, CHOICES[gene], batch, before, channels, side, stride, itemsize)
        side, before = side // stride, channels
    ends = batch * (3 * size * size + 2 * 16 * (size // 2) ** 2 + 2 * 1024 * side * side)
    return total + itemsize * ends * (2 if mode == "train" else 1)


@dataclass
class _StepInputs:
    net: Supernet
    images: Tensor
    labels: Tensor


def _space(size: int) -> ShuffleNetV2:
    return ShuffleNetV2(input_size=size, dropout=0.0, init="pytorch")


def _step(device: str, size: int, batch: int, dtype: str) -> Case:
    space = _space(size)
    arch = space.architecture(PATH)

    def inputs(where: torch.device) -> _StepInputs:
        torch.manual_seed(0)
        kind = torch.float64 if dtype == "float64" else torch.float32  # halves come by autocast
        images = torch.randn(batch, 3, size, size).to(where, kind)
        labels = torch.randint(0, 1000, (batch,)).to(where)
        return _StepInputs(space.supernet().to(where, kind).train(), images, labels)

    def ours(given: _StepInputs) -> Callable[[], tuple[Tensor, Tensor]]:
        net = copy.deepcopy(given.net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return _training(lambda x: net(x, arch), list(net.parameters()), given, torch.channels_last, dtype)

    def peer(layout: torch.memory_format, split: shufflenet.Split, mode: str | None = None) -> Bind:
        def bind(given: _StepInputs) -> Callable[[], tuple[Tensor, Tensor]]:
            state = layered(path_state(given.net, PATH), layout, True)
            path = shufflenet.network_layers(state, prefixes(PATH), STRIDES)

            def forward(x: Tensor) -> Tensor:
                return shufflenet.network(x, path, True, split, dropout=0.0)

            if mode is not None:
                forward = compiled(forward, None if mode == "default" else mode)
            return _training(forward, [v for v in state.values() if v.requires_grad], given, layout, dtype)

        return bind

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    itemsize = getattr(torch, dtype).itemsize
    return Case(
        op=STEP,
        shape=f"{size}x{size} batch {batch}",
        dtype=dtype,
        device=device,
        bytes=path_bytes(size, batch, PATH, "train", itemsize),
        flops=3 * 2 * batch * space.cost(arch).macs,
        inputs=inputs,
        contenders={
            OURS: ours,
            "eager NCHW": peer(nchw, shufflenet.split_by_reshape),
            "eager channels_last": peer(nhwc, shufflenet.split_by_slices),
            "compile NCHW": peer(nchw, shufflenet.split_by_slices, "default"),
            "compile channels_last": peer(nhwc, shufflenet.split_by_slices, "default"),
            **(
                {"compile max-autotune": peer(nhwc, shufflenet.split_by_slices, "max-autotune-no-cudagraphs")}
                if device == "cuda"
                else {}
            ),
        },
        tests=("tests/test_supernet.py", "tests/test_training.py", "tests/bench/test_registry.py", *GPU_TESTS[device]),
        tolerance=0.1 if dtype == "bfloat16" else 1e-3,
        items=batch,
        unit="images",
        headline=True,
        task=True,
        graphs=False,  # every step of real training has another path
        slow=device == "cpu",
        note="forward, backward and SGD on one path; compile peers are given that one path whole, and no other",
    )


def _training(
    forward: Callable[[Tensor], Tensor],
    parameters: list[Tensor],
    given: _StepInputs,
    layout: torch.memory_format,
    dtype: str,
) -> Callable[[], tuple[Tensor, Tensor]]:
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=4e-5)
    images, labels = given.images.contiguous(memory_format=layout), given.labels

    def run() -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = forward(images)
            loss = functional.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    return run


def prefixes(genes: Sequence[int]) -> list[str]:
    """Names of the path's blocks in the supernet."""
    return [f"features.{block}.{gene}." for block, gene in enumerate(genes)]


def path_state(net: Supernet, genes: Sequence[int]) -> State:
    """The supernet's own tensors, those of one path and of both ends."""
    wanted = ("first_conv", "conv_last", "classifier", *prefixes(genes))
    return {name: value for name, value in net.state_dict(keep_vars=True).items() if name.startswith(wanted)}


@dataclass
class ScoringInputs:
    """What candidates are scored with.

    Attributes:
        net: the supernet.
        archs: the candidates.
        calibration, validation: random images.
    """

    net: Supernet
    archs: list[Architecture]
    calibration: Images
    validation: Images


def scoring_inputs(
    space: ShuffleNetV2, archs: list[Architecture], sizes: ScoringSizes, where: torch.device
) -> ScoringInputs:
    """The same for the same arguments."""
    torch.manual_seed(0)
    net, size = space.supernet().to(where), space.input_size

    def images(count: int) -> Images:
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        return Images(pixels.to(where), torch.randint(0, 1000, (count,)).to(where), NORMALIZATION)

    return ScoringInputs(net, archs, images(sizes.batches * sizes.batch), images(sizes.validation))


def published_scoring(
    given: ScoringInputs, sizes: ScoringSizes, layout: torch.memory_format, split: shufflenet.Split, dtype: str
) -> Callable[[], list[float]]:
    """The published procedure in eager PyTorch, ready to run; images are normalised and laid out beforehand."""
    state = layered(given.net.state_dict(keep_vars=True), layout, False)

    def laid_out(pixels: Tensor) -> Tensor:
        return NORMALIZATION(pixels).contiguous(memory_format=layout)

    calibration = [laid_out(part) for part in given.calibration.pixels.split(sizes.batch)]
    pairs = zip(given.validation.pixels.split(200), given.validation.labels.split(200), strict=True)
    validation = [(laid_out(pixels), labels) for pixels, labels in pairs]
    paths = [shufflenet.network_layers(state, prefixes(arch.genes), STRIDES) for arch in given.archs]

    def forward(images: Tensor, path: shufflenet.Path, training: bool) -> Tensor:
        return shufflenet.network(images, path, training, split)

    def run() -> list[float]:
        with autocast(given.calibration.pixels.device, dtype):
            return published_scores(forward, state, paths, calibration, validation)

    return run


def autocast(where: torch.device, dtype: str) -> torch.autocast:
    """Autocast on a device for bfloat16, none for float32."""
    return torch.autocast(where.type, torch.bfloat16, enabled=dtype == "bfloat16")


def generation(space: ShuffleNetV2, count: int) -> list[Architecture]:
    """As evolution breeds it: half mutations (probability 0.1 a gene), half crossovers of two parents."""
    rng = random.Random(0)
    mother, father = ([rng.randrange(4) for _ in range(20)] for _ in range(2))
    mutations = [
        [rng.randrange(4) if rng.random() < 0.1 else gene for gene in rng.choice((mother, father))]
        for _ in range(count // 2)
    ]
    crossovers = [[rng.choice(pair) for pair in zip(mother, father, strict=True)] for _ in range(count - count // 2)]
    return [space.architecture(genes) for genes in mutations + crossovers]


def _scoring(device: str, size: int, sizes: ScoringSizes, dtype: str) -> Case:
    space = _space(size)
    archs = generation(space, sizes.candidates)

    def inputs(where: torch.device) -> ScoringInputs:
        return scoring_inputs(space, archs, sizes, where)

    def ours(given: ScoringInputs) -> Callable[[], Any]:
        evaluator = Evaluator(
            given.net, given.calibration, given.validation, calibration_batch=sizes.batch, batch_size=200
        )

        def run() -> list[float]:
            with autocast(given.calibration.pixels.device, dtype):
                return [score.accuracy for score in evaluator(given.archs)]

        return run

    def peer(layout: torch.memory_format, split: shufflenet.Split) -> Bind:
        return lambda given: published_scoring(given, sizes, layout, split, dtype)

    itemsize = getattr(torch, dtype).itemsize
    bytes_moved = sum(
        path_bytes(size, sizes.batches * sizes.batch, arch.genes, "forward", itemsize)
        + path_bytes(size, sizes.validation, arch.genes, "infer", itemsize)
        for arch in archs
    )
    return Case(
        op=SCORING,
        shape=f"{size}x{size}, {sizes.candidates} x ({sizes.batches} x {sizes.batch} + {sizes.validation}) images",
        dtype=dtype,
        device=device,
        bytes=bytes_moved,
        flops=2 * (sizes.batches * sizes.batch + sizes.validation) * sum(space.cost(arch).macs for arch in archs),
        inputs=inputs,
        contenders={
            OURS: ours,
            "published, NCHW": peer(torch.contiguous_format, shufflenet.split_by_reshape),
            "published, channels_last": peer(torch.channels_last, shufflenet.split_by_slices),
        },
        tests=("tests/test_evaluation.py", "tests/test_calibration.py", *GPU_TESTS[device]),
        tolerance=None,
        items=sizes.images,
        unit="images",
        headline=True,
        task=True,
        graphs=False,  # it waits for its results
        slow=True,
        note="accuracies differ by design: ours recalibrates with dropout off and averages all batches alike; "
        "the peer's images are normalised beforehand. The floor counts every candidate by itself; ours shares prefixes",
    )
