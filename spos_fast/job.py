"""What the stages of a run work on, and what is refused before one of them begins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spos_fast import distributed
from spos_fast.config import Config
from spos_fast.data import DataSource
from spos_fast.errors import InputError
from spos_fast.latency import LatencyTable
from spos_fast.pareto import require_optuna
from spos_fast.recording import Listener
from spos_fast.sampling import UniformSampler
from spos_fast.spaces import Space
from spos_fast.spaces.base import without_metric

# In the run folder.
CANDIDATES = Path("search") / "candidates.jsonl"
LATENCY = Path("search") / "latency.json"


@dataclass
class Job:
    """A run folder with its data, its space and where to compute.

    Attributes:
        folder: the run folder, held open by a :class:`spos_fast.run.Run`.
        config: settings of the run.
        source: the data set.
        space: the search space for it.
        device: where networks live.
        workers: processes that decode images; None is the data set's own choice.
        tensorboard: whether scalars are written.
        listener: hears about progress.
        exchange: connection to the other processes of a ``torchrun`` job.
    """

    folder: Path
    config: Config
    source: DataSource
    space: Space
    device: torch.device
    workers: int | None = None
    tensorboard: bool = True
    listener: Listener = dataclasses.field(default_factory=Listener)
    exchange: distributed.Exchange = dataclasses.field(default_factory=distributed.Exchange)


def make_space(
    config: Config, source: DataSource, folder: Path | None = None, warn: Callable[[str], Any] | None = None
) -> Space:
    """The configured space for the images and classes of a data set, with the search's latency table.

    Args:
        config: settings of the run.
        source: the data set.
        folder: the run folder; if its search has begun, the copy of the table that it began with is read.
        warn: hears in what this machine differs from the one of the table.

    Raises:
        InputError, CheckpointError: the table is missing, damaged or of another space.
    """
    space = config.space.make(
        input_size=source.input_size, in_channels=source.in_channels, num_classes=source.num_classes
    )
    path = config.search.latency_table
    if path:
        LatencyTable.read(_bound_table(folder) or path).attach(space, warn)
    return space


def bind_table(config: Config, folder: Path) -> None:
    """Copy the search's latency table, if there is one, into the run folder before the first candidate rests on it.

    Raises:
        InputError, CheckpointError: the table is missing or damaged.
    """
    if config.search.latency_table and _bound_table(folder) is None:
        LatencyTable.read(config.search.latency_table).write(folder / LATENCY)


def _bound_table(folder: Path | None) -> Path | None:
    """The copy of the latency table that the candidates of a run rest on; None before the first."""
    if folder is None or not (folder / CANDIDATES).exists() or not (folder / LATENCY).exists():
        return None
    return folder / LATENCY


def check_settings(stage: str, config: Config, source: DataSource, space: Space) -> None:
    """Refuse what a stage could not do, before anything is written.

    Raises:
        InputError: an infeasible constraint, a limit of latency without a table, objectives without Optuna, more
            calibration images than there are, early stopping without a second batch or with several objectives, or a
            batch or population that the processes cannot share.
        CheckpointError: the published supernet does not fit.
    """
    try:
        if stage == "search":
            limited = {*config.search.constraint.bounds(), *config.search.objectives}
            if "latency_ms" in limited and not config.search.latency_table:
                raise InputError("latency_table: a limit or objective of latency needs one, of `spos-fast latency`")
            if config.search.objectives:
                require_optuna()
            for name in config.search.objectives:
                if name != "accuracy" and name not in space.cost_tables:
                    raise InputError(f"objectives: {without_metric(name)}")
            UniformSampler(space, config.search.constraint)
            if config.search.calibration_images > source.train_size:
                asked = config.search.calibration_images
                raise InputError(f"calibration_images: got {asked:,}; the training part has {source.train_size:,}")
            if config.search.early_stopping and config.search.objectives:
                raise InputError(
                    "early_stopping: stops what cannot be among the most accurate, which a front of several objectives "
                    "needs too; leave it or objectives out"
                )
            if config.search.early_stopping and source.validation_size <= config.search.batch_size:
                raise InputError(
                    f"batch_size: got {config.search.batch_size}; early stopping looks at candidates between batches, "
                    f"and the {source.validation_size:,} validation images are one batch; lower it"
                )
        elif stage == "train":
            config.train.sampler(space)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if stage in ("train", "retrain") and getattr(config, stage).batch_size % processes:
            size = getattr(config, stage).batch_size
            raise InputError(f"batch_size: {size} images cannot be shared out equally to {processes} processes")
        if stage == "search" and config.search.population < processes:
            size = config.search.population
            raise InputError(f"population: {size} architectures cannot be shared out to {processes} processes")
    except InputError as error:
        raise InputError(f"{stage}.{error}") from None
    if stage == "search" and config.search.supernet:
        space.supernet().load_published(config.search.supernet)


def require_stage_before(stage: str, folder: Path, config: Config) -> None:
    """Say what to run first if the stage before ``"search"`` or ``"retrain"`` has not begun.

    Raises:
        InputError: it has not.
    """
    if stage == "search" and not config.search.supernet and not (folder / "supernet" / "checkpoint.pt").exists():
        raise InputError(f"folder: {folder} has no trained supernet; run `spos-fast train --folder {folder}` first")
    if stage == "retrain" and not (folder / "search" / "best.json").exists():
        raise InputError(f"folder: {folder} has no finished search; run `spos-fast search --folder {folder}` first")
