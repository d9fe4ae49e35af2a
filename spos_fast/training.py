"""Training of supernets and of plain networks, by the same code.

SGD with momentum, a falling learning rate, weight decay on weights only, label smoothing (arXiv 1904.00420,
section 4.1). Everything random in a step depends on the seed and the step alone, so a run that was
killed and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from spos_fast import distributed
from spos_fast.architecture import Architecture
from spos_fast.checkpoint import kept_path, load_checkpoint, save_checkpoint
from spos_fast.data import DataSource
from spos_fast.errors import CheckpointError, InputError
from spos_fast.nn.steps import hold_unsampled, step_vectors
from spos_fast.spaces import Space
from spos_fast.supernet import Supernet

Amp = Literal["off", "bf16", "fp16"]
Schedule = Literal["linear", "cosine"]
_AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's except ``steps``, ``batch_size`` and ``lr``, which suit small images.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step, over all processes together.
        lr: learning rate of the first step.
        schedule: how the learning rate falls: ``"linear"`` or ``"cosine"``.
        lr_end: where it falls to.
        momentum: of SGD.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: on weights of convolutions and linear layers only, not on steps of quantizers.
        label_smoothing: of the cross-entropy.
        clip_norm: greatest norm of the gradient; 0 leaves it alone.
        amp: ``"off"``, ``"bf16"`` or ``"fp16"`` autocast.
        channels_last: memory format of images and weights.
        log_every: steps between two rows of metrics.
        checkpoint_seconds: least time between two checkpoints; one is always written at the end.
    """

    steps: int = 1000
    batch_size: int = 128
    lr: float = 0.1
    schedule: Schedule = "linear"
    lr_end: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    clip_norm: float = 0.0
    amp: Amp = "off"
    channels_last: bool = False
    log_every: int = 50
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}; expected a positive number")
        for name in ("lr", "lr_end", "momentum", "weight_decay", "label_smoothing", "clip_norm", "checkpoint_seconds"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}: got {value}; expected 0 or more")
        for name in ("momentum", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name}: got {getattr(self, name)}; expected less than 1")
        if self.schedule not in ("linear", "cosine"):
            raise InputError(f"schedule: got {self.schedule!r}; expected linear or cosine")
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov: there is no momentum; give one, or leave it out")
        if self.amp not in ("off", *_AMP_TYPES):
            raise InputError(f"amp: got {self.amp!r}; expected off, bf16 or fp16")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, 0 for the first; :attr:`lr_end` would be that of the step behind the last."""
        done = step / self.steps
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr_end + (self.lr - self.lr_end) * left


class PathSampler(Protocol):
    """What draws the paths of a training: a :class:`spos_fast.UniformSampler`, or a schedule over one.

    Attributes:
        space: what it draws from; checkpoints remember it.
    """

    space: Space

    def at(self, seed: int, step: int) -> Architecture:
        """The architecture of a training step; depends on nothing but seed and step."""


@dataclass(frozen=True)
class Metrics:
    """What training reports every ``log_every`` steps.

    Attributes:
        step: steps done.
        steps: steps in all.
        loss, accuracy: means over the images since the last row, on augmented training images.
        lr: learning rate of the last step.
        images_per_second: speed since the last row.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    lr: float
    images_per_second: float


def train(
    net: nn.Module,
    source: DataSource,
    config: TrainConfig,
    *,
    sampler: PathSampler | None = None,
    seed: int = 0,
    full: bool = False,
    workers: int | None = None,
    checkpoint: str | Path | None = None,
    identity: dict[str, Any] | None = None,
    on_resume: Callable[[int], None] | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
    keep_checkpoints: int = 0,
) -> None:
    """Train ``net`` in place, on the device where its parameters are.

    Under ``torchrun`` the gradients are averaged by DistributedDataParallel; all ranks run the same path and share out
    the images of every batch.

    Args:
        net: a :class:`Supernet` (give ``sampler``) or a plain network.
        source: where images come from.
        config: how to train.
        sampler: draws the path of every step.
        seed: of paths, order of images, augmentation and dropout.
        full: train on the whole training part, validation split included (for retraining).
        workers: processes that decode images, where the source has any.
        checkpoint: file to resume from if it exists, and to save to.
        identity: plain values that must be the same in a checkpoint for it to be resumed from.
        on_resume: called once with the number of steps that are already done.
        on_metrics: called every ``log_every`` steps and after the last, on rank 0.
        keep_checkpoints: how many states of the network on the way are kept beside the checkpoint, evenly spaced, each
            at the next row of metrics (:func:`spos_fast.checkpoint.kept_checkpoints`); none is resumed from.

    Raises:
        InputError: settings that do not fit together, or a loss that is not finite.
        CheckpointError: the checkpoint is damaged, of another network or of other settings; or cannot be written.
    """
    if isinstance(net, Supernet) != (sampler is not None):
        raise InputError("sampler: a supernet needs one, a plain network takes none")
    device = next(net.parameters()).device
    if config.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(net, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    recipe = {name: value for name, value in asdict(config).items() if name not in ("log_every", "checkpoint_seconds")}
    space = None if sampler is None else {"name": sampler.space.name, **sampler.space.config()}
    state = _State(net, optimizer, scaler, {"seed": seed, "full": full, **recipe, **(identity or {})}, space)
    start = state.load(checkpoint) if checkpoint is not None else 0
    _check_same_start(start, device)
    if on_resume is not None:
        on_resume(start)
    if start >= config.steps:
        return
    run = _parallel(net, device)
    stream = source.train_stream(
        config.batch_size,
        seed=seed,
        start_step=start,
        full=full,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=device,
        workers=workers,
    )
    net.train()
    window, kept = _Window(config), set(kept_steps(config.steps, config.log_every, keep_checkpoints))
    saved = time.monotonic()
    with contextlib.closing(cast("Any", stream)):
        for step in range(start, config.steps):
            images, labels = next(stream)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            arch = sampler.at(seed, step) if sampler is not None else None
            lr = config.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Dropout draws from torch's global generator.
            torch.manual_seed(_mix(seed, step, distributed.rank()))
            loss, logits = _step(run, arch, images, labels, optimizer, scaler, config, source.num_classes)
            window.add(loss, logits, labels)
            done = step + 1
            if done % config.log_every and done < config.steps:
                continue
            metrics = window.close(done, lr)
            if on_metrics is not None and distributed.rank() == 0:
                on_metrics(metrics)
            if checkpoint is not None and distributed.rank() == 0 and done in kept:
                # Before the checkpoint: a run that is killed in between writes it again, and never lacks it.
                state.keep(checkpoint, done)
            due = time.monotonic() - saved >= config.checkpoint_seconds
            if checkpoint is not None and distributed.rank() == 0 and (due or done == config.steps):
                state.save(checkpoint, done)
                saved = time.monotonic()


def _step(
    run: nn.Module,
    arch: Architecture | None,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    classes: int,
) -> tuple[Tensor, Tensor]:
    enabled = config.amp != "off"
    with torch.autocast(images.device.type, _AMP_TYPES.get(config.amp, torch.bfloat16), enabled=enabled):
        logits = run(images) if arch is None else run(images, arch)
        if logits.shape[1] != classes:
            raise InputError(f"net: gives {logits.shape[1]} logits; the data has {classes} classes")
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    # Gradients are None, not zero, off the path: SGD then skips those parameters altogether.
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if config.clip_norm:
        scaler.unscale_(optimizer)
        on_path = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(on_path, config.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), logits.detach()


def _optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    steps = {vector for _, vector, _ in step_vectors(net)}  # of quantizers; a matrix where every channel has its own
    weights = [p for p in net.parameters() if p.dim() > 1 and p not in steps]
    others = [p for p in net.parameters() if p.dim() <= 1 or p in steps]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    hold_unsampled(optimizer, net)
    return optimizer


def _check_same_start(start: int, device: torch.device) -> None:
    """All ranks must have read the same checkpoint."""
    if distributed.world_size() == 1:
        return
    ends = torch.tensor([start, -start], device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    most, least = int(ends[0]), -int(ends[1])
    if most != least:
        raise CheckpointError(f"checkpoint: one process is at step {most}, another at {least}; share the folder")


def _parallel(net: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return net
    # Statistics of batch normalisation are each rank's own: they are recalibrated before they are used. Newer PyTorch
    # has another name for the switch.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    local_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # A supernet uses other parameters every step; those that no rank used keep their gradient None.
    return DistributedDataParallel(
        net,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=isinstance(net, Supernet),
        **local_buffers,
    )


class _Window:
    """Sums since the last row of metrics, kept on the device: no synchronisation between two rows."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._reset()

    def _reset(self) -> None:
        self.sums: Tensor | None = None
        self.images = 0
        self.batches = 0
        self.since = time.monotonic()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        sums = torch.stack((loss.double(), (logits.argmax(1) == labels).sum().double()))
        self.sums = sums if self.sums is None else self.sums + sums
        self.images += len(labels)
        self.batches += 1

    def close(self, step: int, lr: float) -> Metrics:
        assert self.sums is not None
        sums = self.sums
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(sums)
        loss, correct = sums.tolist()
        processes = distributed.world_size()
        loss /= self.batches * processes
        if loss != loss or abs(loss) == float("inf"):
            raise InputError(
                f"lr: training diverged before step {step} (loss {loss}) with lr {self.config.lr:g}; "
                "lower it, or set clip_norm"
            )
        seconds = max(time.monotonic() - self.since, 1e-9)
        accuracy = correct / (self.images * processes)
        speed = self.images * processes / seconds
        self._reset()
        return Metrics(step, self.config.steps, loss, accuracy, lr, speed)


class _State:
    """Everything that a resumed run needs."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: dict[str, Any],
        space: dict[str, Any] | None,
    ) -> None:
        self.net, self.optimizer, self.scaler, self.identity = net, optimizer, scaler, identity
        self.space = space

    def save(self, path: str | Path, step: int) -> None:
        save_checkpoint(
            path,
            {
                "step": step,
                "identity": self.identity,
                "space": self.space,
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )

    def keep(self, path: str | Path, step: int) -> None:
        """Save the network alone, beside the checkpoint."""
        content = {"step": step, "identity": self.identity, "space": self.space, "model": self.net.state_dict()}
        save_checkpoint(kept_path(path, step), content)

    def load(self, path: str | Path) -> int:
        """Number of steps done; 0 where there is no checkpoint yet."""
        if not Path(path).exists():
            return 0
        content = load_checkpoint(path)
        for key in ("step", "identity", "model", "optimizer", "scaler"):
            if key not in content:
                raise CheckpointError(f"{path}: not a checkpoint of training ({key} is missing)")
        self._check_space(content.get("space"), path)
        # Settings that are younger than a checkpoint had what is their default when it was written.
        recorded = {**asdict(TrainConfig()), **content["identity"]}
        for key, value in self.identity.items():
            if recorded.get(key) != value:
                other = recorded.get(key)
                raise CheckpointError(
                    f"{path}: was trained with {key} = {other!r}, not {value!r}; use another run folder"
                )
        load_model(self.net, content, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        return int(content["step"])

    def _check_space(self, other: dict[str, Any] | None, path: str | Path) -> None:
        """Networks of different spaces may have the same weights (other image sizes, other ratios of one widest)."""
        if other is None or self.space is None:  # a plain network, or written before checkpoints knew their space
            return
        differing = [key for key in {**other, **self.space} if other.get(key) != self.space.get(key)]
        if differing:
            theirs, own = (
                f"{space.get('name')} ({', '.join(f'{key}={space.get(key)!r}' for key in differing if key != 'name')})"
                for space in (other, self.space)
            )
            raise CheckpointError(f"{path}: was trained in the space {theirs}, not {own}; use another run folder")


def kept_steps(steps: int, log_every: int, count: int) -> list[int]:
    """The steps of a training whose states :func:`train` keeps: for each of ``count`` evenly spaced ones the next row
    of metrics; a row counts once, and the end is none.
    """
    rows = range(log_every, steps, log_every)
    return [row for row in rows if (count + 1) * row // steps > (count + 1) * (row - log_every) // steps]


def load_model(net: nn.Module, content: dict[str, Any], path: str | Path) -> None:
    """Load the network of a checkpoint that :func:`train` wrote.

    Raises:
        CheckpointError: it is of another network; nothing is loaded then.
    """
    given, own = content.get("model", {}), net.state_dict()
    for name in [*own, *given]:
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise CheckpointError(f"{path}: is of another network ({name} differs)")
    net.load_state_dict(given)


def _mix(*values: int) -> int:
    """One 63-bit seed from several numbers (the finaliser of splitmix64 after each)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def first_batches(stream: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[Tensor]:
    """Images of the next ``count`` batches of a stream."""
    for _ in range(count):
        yield next(stream)[0]
