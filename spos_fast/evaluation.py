"""Scoring of architectures with a supernet's weights, and accuracy of plain networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast.architecture import Architecture
from spos_fast.calibration import MODES, Mode, recalibrate
from spos_fast.data import Images
from spos_fast.errors import InputError
from spos_fast.supernet import Supernet


@dataclass(frozen=True)
class Score:
    """How well a network does on a set of images.

    Attributes:
        accuracy: share of images whose greatest logit is their class; 0 if any logit is NaN or infinite.
        loss: mean cross-entropy, without label smoothing.
        images: number of images.
    """

    accuracy: float
    loss: float
    images: int


class Evaluator:
    """Scores architectures: recalibrates batch normalisation of the path, then measures its accuracy.

    The same architecture gives the same score, bit for bit on the CPU, whatever was scored before.

    Args:
        net: a trained supernet. Only the statistics of its normalisation layers are written to; its weights are laid
            out as channels_last, with the same values.
        calibration: images for the statistics, from the training part.
        validation: images for the accuracy, split off the training part; never the test set.
        mode: how statistics are averaged, see :func:`spos_fast.recalibrate`.
        calibration_batch: most images in a batch of calibration. The set is cut into batches of equal size (give or
            take one image), so that every batch weighs the same.
        batch_size: images in a batch of validation.

    Raises:
        InputError: empty image sets, or batch sizes below 1 (below 2 for calibration).
    """

    def __init__(
        self,
        net: Supernet,
        calibration: Images,
        validation: Images,
        *,
        mode: Mode = "cumulative",
        calibration_batch: int = 128,
        batch_size: int = 256,
    ) -> None:
        for name, images in (("calibration", calibration), ("validation", validation)):
            if len(images) == 0:
                raise InputError(f"{name}: has no images")
        if not isinstance(net, Supernet):
            raise InputError(f"net: got {type(net).__name__}; expected a Supernet (evaluate() takes plain networks)")
        if mode not in MODES:
            raise InputError(f"mode: got {mode!r}; expected one of {', '.join(MODES)}")
        if calibration_batch < 2:
            raise InputError(f"calibration_batch: got {calibration_batch}; batch statistics need at least 2 images")
        if batch_size < 1:
            raise InputError(f"batch_size: got {batch_size}; expected a positive number")
        # Faster than NCHW; docs/performance.md.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net, self.mode = net, mode
        self.calibration, self.validation = calibration, validation
        self.calibration_batch, self.batch_size = calibration_batch, batch_size

    def __call__(self, archs: Sequence[Architecture]) -> list[Score]:
        """Scores of the architectures, in their order.

        Raises:
            InputError: an architecture is of another space.
        """
        return [self._score(arch) for arch in archs]

    def _score(self, arch: Architecture) -> Score:
        net, modules = self.net, self.net.path(arch)
        recalibrate(
            net,
            self._calibration_batches(),
            self.mode,
            modules=modules,
            forward=lambda images: net(images, arch),
            allow_nonfinite=True,  # such a path scores 0
        )
        training = [(module, module.training) for root in modules for module in root.modules()]
        try:
            for module, _ in training:
                module.training = False
            return _score(lambda images: net(images, arch), self.validation.batches(self.batch_size))
        finally:
            for module, flag in training:
                module.training = flag

    def _calibration_batches(self) -> Iterator[Tensor]:
        pixels, normalize = self.calibration.pixels, self.calibration.normalization
        for part in torch.tensor_split(pixels, -(-len(pixels) // self.calibration_batch)):
            yield normalize(part)


def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Accuracy and loss of a plain network in evaluation mode (its training flag is restored).

    Args:
        network: images ``[N, C, H, W]`` to logits ``[N, classes]``.
        batches: pairs of normalised images and labels, on the network's device.

    Raises:
        InputError: there is no batch.
    """
    training = network.training
    network.eval()
    try:
        return _score(network, batches)
    finally:
        network.train(training)


def _score(forward, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:  # type: ignore[no-untyped-def]
    correct = loss = finite = None
    images = 0
    with torch.no_grad():
        for pixels, labels in batches:
            logits = forward(pixels).float()
            if images == 0 and int(labels.max()) >= logits.shape[1]:
                raise InputError(
                    f"labels: there is a class {int(labels.max())}; the network gives {logits.shape[1]} logits"
                )
            right = (logits.argmax(1) == labels).sum()
            total = functional.cross_entropy(logits, labels, reduction="sum").double()
            clean = logits.isfinite().all()
            # Sums stay on the device: one synchronisation a network, not one a batch.
            correct = right if correct is None else correct + right
            loss = total if loss is None else loss + total
            finite = clean if finite is None else finite & clean
            images += len(labels)
    if correct is None or loss is None or finite is None:
        raise InputError("batches: there is none to evaluate on")
    accuracy = correct.item() / images if finite.item() else 0.0
    return Score(accuracy, loss.item() / images, images)
