"""Training of a cell's network as NAS-Bench-101 trained it.

The procedure is that of model_builder.py, evaluate.py and config.py of google-research/nasbench: RMSProp as TensorFlow
has it, cosine decay of the learning rate by step, L2 on all parameters, batch statistics of half a batch (each of the
two TPU shards had its own), evaluation at the start, halfway and at the end.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast import evaluation
from spos_fast.data import DataSource
from spos_fast.errors import InputError
from spos_fast.nasbench.networks import Spec, network

# CIFARInput of the official code measures training accuracy on the first of its files, 10,000 images.
_TRAIN_IMAGES = 10_000


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the benchmark's.

    Attributes:
        epochs: passes over the training images; the benchmark has 4, 12, 36 and 108.
        batch_size: images a step.
        shards: equal parts of a batch that are normalised by their own statistics (2 TPU shards).
        learning_rate: of the beginning: 0.1 a shard.
        momentum, decay, epsilon: of RMSProp.
        weight_decay: factor of the L2 norm of all parameters, those of batch normalisation and the bias too.
        bn_momentum: share of the running statistics that a step keeps. With 0.997 they lag some hundred steps behind,
            which is part of why the benchmark's accuracies after 4 epochs are so low.
    """

    epochs: int = 108
    batch_size: int = 256
    shards: int = 2
    learning_rate: float = 0.2
    momentum: float = 0.9
    decay: float = 0.9
    epsilon: float = 1.0
    weight_decay: float = 1e-4
    bn_momentum: float = 0.997

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "shards"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}; expected a positive number")
        if self.batch_size % self.shards:
            raise InputError(f"shards: got {self.shards}; a batch of {self.batch_size} images does not divide so")
        for name in ("learning_rate", "epsilon", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: got {getattr(self, name)}; expected 0 or more")
        for name in ("momentum", "decay", "bn_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}; expected 0 or more, less than 1")


@dataclass(frozen=True)
class Evaluation:
    """How well the network does at one moment of its training.

    Attributes:
        epoch: passes done; half ones occur.
        step: optimiser steps done.
        training_time: seconds spent in steps so far, evaluations not counted.
        train_accuracy: on 10,000 images of the training part (on all, where there are fewer), not augmented.
        validation_accuracy, test_accuracy: on all images of those parts (the official code leaves out the last 16 of
            10,000, which fill no batch).
    """

    epoch: float
    step: int
    training_time: float
    train_accuracy: float
    validation_accuracy: float
    test_accuracy: float


class RMSProp(torch.optim.Optimizer):
    """RMSProp as ``tf.train.RMSPropOptimizer`` computes it.

    It differs from torch.optim.RMSprop: the mean square begins at 1, epsilon stands under the root, and the learning
    rate goes into the momentum: ``v = decay v + (1 - decay) g^2; m = momentum m + lr g / sqrt(v + epsilon); w -= m``.
    """

    def __init__(self, params: Iterable[nn.Parameter], recipe: Recipe) -> None:
        super().__init__(params, {"lr": recipe.learning_rate})
        self.recipe = recipe

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients; ``closure`` is not used."""
        recipe = self.recipe
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["square"], state["move"] = torch.ones_like(weight), torch.zeros_like(weight)
                gradient = weight.grad.add(weight, alpha=recipe.weight_decay)
                state["square"].mul_(recipe.decay).addcmul_(gradient, gradient, value=1 - recipe.decay)
                root = (state["square"] + recipe.epsilon).sqrt_()
                state["move"].mul_(recipe.momentum).addcdiv_(gradient, root, value=group["lr"])
                weight.sub_(state["move"])


def evaluate(
    spec: Spec,
    source: DataSource,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_evaluation: Callable[[Evaluation], None] | None = None,
    **sizes: int,
) -> list[Evaluation]:
    """Train the network of a cell from scratch, as the benchmark did, and measure it.

    The benchmark's data are ``spos_fast.data.load("cifar10", path, validation=0.2)``: 40,000 training, 10,000
    validation and 10,000 test images, padded by 4, cropped and mirrored. Which 10,000 images the official code held out
    depends on its data files; here they are drawn evenly from the classes.

    Args:
        spec: the cell.
        source: the images.
        recipe: how to train; the benchmark's 108 epochs by default.
        seed: of weights, order and augmentation.
        device: where to train.
        on_evaluation: called with every evaluation.
        sizes: ``stem_channels``, ``stacks``, ``cells_per_stack`` of :func:`network`, for smaller networks.

    Returns:
        Evaluations at the start, halfway and at the end.

    Raises:
        InputError: settings that do not fit together, or a loss that is not finite.
    """
    recipe = recipe or Recipe()
    if source.train_size < recipe.batch_size:
        raise InputError(f"batch_size: got {recipe.batch_size}; there are {source.train_size} training images")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network(spec, num_classes=source.num_classes, in_channels=source.in_channels, **sizes).to(device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            # The running statistics see every shard of a step.
            module.momentum = 1 - recipe.bn_momentum ** (1 / recipe.shards)
    out: list[Evaluation] = []
    seconds = 0.0

    def measure(epoch: float, step: int) -> None:
        images = min(_TRAIN_IMAGES, source.train_size)
        accuracies = [
            evaluation.evaluate(net, batches).accuracy
            for batches in (
                source.calibration(images, seed=0, device=device).batches(recipe.batch_size),
                source.validation(device=device).batches(recipe.batch_size),
                source.test_batches(recipe.batch_size, device=device),
            )
        ]
        out.append(Evaluation(epoch, step, seconds, *accuracies))
        if on_evaluation is not None:
            on_evaluation(out[-1])

    halfway, steps = (int(share * recipe.epochs * source.train_size / recipe.batch_size) for share in (0.5, 1.0))
    optimizer = RMSProp(net.parameters(), recipe)
    stream = source.train_stream(recipe.batch_size, seed=seed, device=device)
    measure(0.0, 0)
    begun = time.perf_counter()
    with contextlib.closing(cast("Any", stream)):
        for step in range(steps):
            # The first step moves no weight, as in the official code.
            lr = 0.5 * recipe.learning_rate * (1 + math.cos(math.pi * step / steps)) if step else 0.0
            loss = _step(net, optimizer, lr, *next(stream))
            if step + 1 in (halfway, steps):
                if not math.isfinite(loss.item()):
                    raise InputError(f"learning_rate: got {recipe.learning_rate}; training diverged by step {step + 1}")
                seconds += time.perf_counter() - begun
                measure(recipe.epochs * (0.5 if step + 1 == halfway else 1.0), step + 1)
                begun = time.perf_counter()
    return out


def _step(net: nn.Module, optimizer: RMSProp, lr: float, images: Tensor, labels: Tensor) -> Tensor:
    """One optimiser step; returns the loss, still on the device."""
    shards = optimizer.recipe.shards
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=images.device)
    for part, answers in zip(images.chunk(shards), labels.chunk(shards), strict=True):
        loss = functional.cross_entropy(net(part), answers) / shards
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total
