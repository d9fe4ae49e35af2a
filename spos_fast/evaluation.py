"""Scoring of architectures with a supernet's weights, and accuracy of plain networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from spos_fast.architecture import Architecture
from spos_fast.calibration import MODES, Mode
from spos_fast.data import Images
from spos_fast.early_stopping import EarlyStopping
from spos_fast.errors import InputError
from spos_fast.memory import Probe, free_memory
from spos_fast.nn.parts import HeadPart, Moments, Part, Statistics
from spos_fast.nn.quant import QuantBasicBlock
from spos_fast.nn.quant_parts import QuantPart
from spos_fast.nn.stem_part import StemPart
from spos_fast.prefix_tree import Node, Parts, Route, build, walk
from spos_fast.running import RunningStatistics
from spos_fast.scores import Score, Tally, check_labels
from spos_fast.sharing import share_out
from spos_fast.supernet import Setting, Supernet
from spos_fast.threads import side_by_side

# Of the free memory, for activations: other processes and torch's own buffers need some too.
_SHARE = 0.5
# Fewer architectures a worker share little, and their numbers differ by too much.
_LEAST_A_WORKER = 8


class Evaluator:
    """Scores architectures: recalibrates batch normalisation of their paths, then measures their accuracy.

    Architectures that begin alike share the work on their common prefix (:mod:`spos_fast.prefix_tree`), so score a
    generation in one call; on a CPU its parts run side by side, each on some of PyTorch's threads. The same
    architecture gives the same score, bit for bit on the CPU, whatever it is scored with, in whatever order, and
    whatever the memory (with early stopping, after the same calls before). A candidate that gives NaN or infinity has
    failed, and says so; no other is touched by it. (If the images are at fault, all fail.)

    The supernet stays as it is, its running statistics too; to get a network with its statistics, ``net.extract`` it
    and :func:`spos_fast.recalibrate` it.

    Args:
        net: a trained supernet. Its weights are laid out as channels_last, with the same values.
        calibration: images for the statistics, from the training part.
        validation: images for the accuracy, split off the training part; never the test set.
        mode: how statistics are averaged, see :func:`spos_fast.recalibrate`; ``"none"``: not at all, candidates are
            normalised by the running statistics that training left, which fit no path (for comparison).
        calibration_batch: most images in a batch of calibration. The set is cut into batches of equal size (give or
            take one image), so that every batch weighs the same; a smaller set is one batch.
        batch_size: images in a batch of validation.
        memory: bytes that activations may take; None is half of what is free. Less than what all shared prefixes need
            costs time, as prefixes are computed again.
        stacked: whether architectures that run the same block on different inputs run it in one call; None is yes on
            GPUs, where one small batch does not fill the device, and no on CPUs.
        workers: threads that score a part of the architectures each, on CPUs; None is as many as PyTorch has, as far as
            each gets 8 architectures and ``memory`` has room, and 1 where blocks run as modules (with normalisation
            layers that only one path at a time can use), with a classifier of your own, or under autocast.
        early_stopping: drops hopeless candidates between batches of validation, and learns the scores of every call;
            images then come in a random order that never changes. None: all candidates see all images.

    Raises:
        InputError: empty image sets, batch sizes below 1 (below 2 for calibration), or early stopping
            with all validation images in one batch.
    """

    def __init__(
        self,
        net: Supernet,
        calibration: Images,
        validation: Images,
        *,
        mode: Mode | Literal["none"] = "cumulative",
        calibration_batch: int = 128,
        batch_size: int = 256,
        memory: int | None = None,
        stacked: bool | None = None,
        workers: int | None = None,
        early_stopping: EarlyStopping | None = None,
    ) -> None:
        for name, images in (("calibration", calibration), ("validation", validation)):
            if len(images) == 0:
                raise InputError(f"{name}: has no images")
        if not isinstance(net, Supernet):
            raise InputError(f"net: got {type(net).__name__}; expected a Supernet (evaluate() takes plain networks)")
        if type(net).forward is not Supernet.forward or "forward" in vars(net):
            raise InputError(f"net: {type(net).__name__} has a forward of its own, but the Evaluator runs net's blocks")
        if mode not in (*MODES, "none"):
            raise InputError(f"mode: got {mode!r}; expected one of {', '.join(MODES)}, none")
        for name, value in (("calibration_batch", calibration_batch), ("batch_size", batch_size), ("memory", memory)):
            if not isinstance(value, int) and not (name == "memory" and value is None):
                raise InputError(f"{name}: got {value!r}; expected a whole number")
        if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
            raise InputError(f"early_stopping: got {early_stopping!r}; expected an EarlyStopping, or None")
        if calibration_batch < 2:
            raise InputError(f"calibration_batch: got {calibration_batch}; batch statistics need at least 2 images")
        if batch_size < 1:
            raise InputError(f"batch_size: got {batch_size}; expected a positive number")
        if early_stopping is not None and len(validation) <= batch_size:
            raise InputError(
                f"batch_size: got {batch_size}; early stopping looks at candidates between batches, and the "
                f"{len(validation)} validation images are one batch; lower it"
            )
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise InputError(f"workers: got {workers!r}; expected a positive number, or None for one a thread")
        if memory is not None and memory < 1:
            raise InputError(f"memory: got {memory}; expected a positive number of bytes, or None for what is free")
        # Faster than NCHW; docs/performance.md.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net, self.mode = net, mode
        self.calibration, self.validation = calibration, validation
        self.calibration_batch, self.batch_size = calibration_batch, batch_size
        self.memory, self.stacked, self.workers, self.early_stopping = memory, stacked, workers, early_stopping
        self._probe = Probe()
        self._labels_checked = False

    def __call__(self, archs: Sequence[Architecture]) -> list[Score]:
        """Scores of the architectures, in their order. One that occurs twice is scored once.

        Raises:
            InputError: an architecture is of another space; a layer gets a single value a channel to take statistics
                of; labels that the network has no logit for; ``memory`` that one batch does not fit in. The supernet is
                untouched then.
        """
        archs = list(archs)
        routes = [tuple(self.net.route(arch)) for arch in archs]
        different = dict(zip(routes, archs, strict=True))
        with torch.no_grad(), _evaluation_mode(self.net):
            if archs and not self._labels_checked:
                check_labels(self.validation.labels, self.net(self._few_images(), archs[0]))
                self._labels_checked = True
            scores = dict(zip(different, self._score(different), strict=True))
        result = [scores[route] for route in routes]
        if self.early_stopping is not None:
            self.early_stopping.learn(archs, result)
        return result

    def _score(self, different: dict[Route, Architecture]) -> list[Score]:
        """Scores of different routes, with an architecture of each."""
        if not different:
            return []
        routes = list(different)
        workers, shared, width = self._plan(self._parts(routes), len(routes))
        if shared is None:
            return [score for route in routes for score in self._score_tree([route], 0, width)]
        if workers == 1:
            return self._score_tree(routes, shared, width)
        shares = [share for share in share_out(list(different.values()), workers) if share]
        # Parts are made in each thread: those of quantized blocks keep their packed weights.
        tasks = [partial(self._score_tree, [routes[number] for number in share], shared, width) for share in shares]
        made = side_by_side(tasks, torch.get_num_threads() // workers)
        scores = {
            number: score
            for share, some in zip(shares, made, strict=True)
            for number, score in zip(share, some, strict=True)
        }
        return [scores[number] for number in range(len(routes))]

    def _parts(self, routes: Sequence[Route]) -> Parts:
        """What these routes consist of."""
        net = self.net
        blocks = [
            {step: _part(candidates[step[0]], step[1]) for step in {route[layer] for route in routes}}  # type: ignore[index]
            for layer, candidates in enumerate(net.features)
        ]
        first = net.first_conv
        stem = StemPart(first) if isinstance(first, nn.Sequential) and StemPart.takes(first) else Part(first)
        return Parts(stem, blocks, HeadPart(net))

    def _score_tree(
        self, routes: Sequence[Route], shared: int, width: int, check: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """Scores of different routes, one tree; ``check`` is called at every node and may raise."""
        root = build(self._parts(routes), routes, shared)
        paths = root.paths()
        nodes = list(dict.fromkeys(node for path in paths for node in path))
        running = self._statistics(root, nodes, width, check)
        statistics = dict(zip(nodes, running.statistics(), strict=True))
        tally = Tally(len(routes), self.validation.labels.device)
        seen, total = 0, len(self.validation)
        for images, labels in self._validation_batches():
            walk(root, images, partial(_validate, check, statistics, tally, labels), width)
            seen += len(labels)
            if self.early_stopping is not None and seen < total:
                looks = -(-total // self.batch_size) - 1
                if not root.prune(self.early_stopping.alive(tally.correct, seen, total, looks).tolist()):
                    break
        sound = dict(zip(nodes, running.finite().tolist(), strict=True))
        return tally.scores(total, [all(sound[node] for node in path) for path in paths])

    def _statistics(
        self, root: Node, nodes: Sequence[Node], width: int, check: Callable[[], None]
    ) -> RunningStatistics:
        """Statistics of the nodes of a tree."""
        parts = [node.part for node in nodes]
        if self.mode == "none":
            running = RunningStatistics(parts, "cumulative")  # there are no batches to average
            running.take_own()
            return running
        running = RunningStatistics(parts, self.mode)
        for images in self._calibration_batches():
            moments: dict[Node, Moments] = {}
            walk(root, images, partial(_calibrate, check, moments), width)
            running.merge([moments[node] for node in nodes])
        return running

    def _plan(self, parts: Parts, routes: int) -> tuple[int, int | None, int]:
        """How many workers walk trees of their own, how many blocks of a prefix may be shared (None: not even the
        stem), and how many nodes run together.
        """
        device = self.calibration.pixels.device
        budget = int(free_memory(device) * _SHARE) if self.memory is None else self.memory
        batches = -(-len(self.calibration) // self.calibration_batch)
        images = max(-(-len(self.calibration) // batches), min(self.batch_size, len(self.validation)))
        made, working = self._probe.needs(parts, self._few_images()).of(images)
        if self.memory is not None and working > budget:
            raise InputError(
                f"memory: got {budget:,} bytes; a batch of {images} images needs about {working:,}; give more, or "
                "lower calibration_batch and batch_size"
            )
        stacked = device.type != "cpu" if self.stacked is None else self.stacked
        whole = budget // (sum(made) + working)  # so many paths fit
        if whole >= 1:
            workers = max(1, min(whole, routes // _LEAST_A_WORKER, self._most_workers(parts)))
            return workers, len(parts.blocks), min(whole // workers, routes) if stacked else 1
        fitting = [depth for depth in range(len(made)) if sum(made[: depth + 1]) + working <= budget]
        return 1, max(fitting, default=None), 1

    def _most_workers(self, parts: Parts) -> int:
        """How many threads may walk these parts."""
        images = self._few_images().contiguous(memory_format=torch.channels_last)
        if not all(part.concurrent(images) for level in parts.levels for part in level):
            return 1
        threads = torch.get_num_threads()
        return threads if self.workers is None else min(self.workers, threads)

    def _few_images(self) -> Tensor:
        return self.calibration.normalization(self.calibration.pixels[:2])

    def _calibration_batches(self) -> Iterator[Tensor]:
        pixels, normalize = self.calibration.pixels, self.calibration.normalization
        for part in torch.tensor_split(pixels, -(-len(pixels) // self.calibration_batch)):
            yield normalize(part)

    def _validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.early_stopping is None:
            yield from self.validation.batches(self.batch_size)
            return
        pixels, labels, normalize = self.validation.pixels, self.validation.labels, self.validation.normalization
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
        for part in order.split(self.batch_size):
            yield normalize(pixels[part]), labels[part]


def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Accuracy and loss of a plain network in evaluation mode (its training flag is restored).

    Args:
        network: images ``[N, C, H, W]`` to logits ``[N, classes]``.
        batches: pairs of normalised images and labels, on the network's device.

    Raises:
        InputError: there is no batch.
    """
    tally: Tally | None = None
    images = 0
    with torch.no_grad(), _evaluation_mode(network):
        for pixels, labels in batches:
            logits = network(pixels)
            if tally is None:
                check_labels(labels, logits)
                tally = Tally(1, logits.device)
            tally.add(0, logits, labels)
            images += len(labels)
    if tally is None:
        raise InputError("batches: there is none to evaluate on")
    return tally.scores(images, [True])[0]


def _part(module: nn.Module, setting: Setting) -> Part:
    if isinstance(module, QuantBasicBlock) and QuantPart.takes(module):
        return QuantPart(module, cast("tuple[int, int, int]", setting))
    return Part(module, setting)


def _calibrate(
    check: Callable[[], None], moments: dict[Node, Moments], nodes: Sequence[Node], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Runs nodes on batch statistics, which go into ``moments``."""
    check()
    outputs: list[Tensor | None] = []
    for part, first, last in _runs(nodes):
        made = part.calibrate(inputs[first:last])
        moments.update(zip(nodes[first:last], (batch for _, batch in made), strict=True))
        outputs += [out for out, _ in made]
    return outputs


def _validate(
    check: Callable[[], None],
    statistics: dict[Node, Statistics],
    tally: Tally,
    labels: Tensor,
    nodes: Sequence[Node],
    inputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """Runs nodes on given statistics; what leaves make goes into ``tally``."""
    check()
    outputs: list[Tensor | None] = []
    for part, first, last in _runs(nodes):
        outputs += part.infer(inputs[first:last], [statistics[node] for node in nodes[first:last]])
    for place, node in enumerate(nodes):
        if node.leaf is not None:
            tally.add(node.leaf, cast(Tensor, outputs[place]), labels)
            outputs[place] = None
    return outputs


def _runs(nodes: Sequence[Node]) -> Iterator[tuple[Part, int, int]]:
    """Neighbours with the same part: that, the first, and the one behind the last."""
    first = 0
    for part, group in itertools.groupby(nodes, key=lambda node: node.part):
        last = first + sum(1 for _ in group)
        yield part, first, last
        first = last


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Training flags off, and then as they were, one by one."""
    flags = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training
