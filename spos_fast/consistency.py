"""Rank consistency: a supernet's scores against a table of networks that were trained one by one.

A stage on the run folder: architectures are drawn, scored by the :class:`spos_fast.Evaluator` in one or more ways
(recalibration on more or fewer images, or none; earlier states of the supernet), recorded as they are scored, and
ranked beside predictors that need no supernet.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spos_fast.analysis.ranks import RankStatistics, rank_statistics
from spos_fast.architecture import Architecture
from spos_fast.checkpoint import kept_checkpoints, load_checkpoint, write_json
from spos_fast.config import Config, ConsistencyConfig
from spos_fast.data import DataSource
from spos_fast.distributed_evaluation import DistributedEvaluator
from spos_fast.errors import InputError
from spos_fast.evaluation import Evaluator
from spos_fast.job import Job
from spos_fast.nasbench import TABLES, ArchitectureTable
from spos_fast.pipeline import load_supernet
from spos_fast.recording import RecordedScores, shared_records
from spos_fast.scores import Score
from spos_fast.spaces import Space
from spos_fast.training import kept_steps, load_model

FOLDER = "consistency"
RESULT = Path(FOLDER) / "result.json"
# Architectures of a call: what a killed process loses at most. More share more of their prefixes.
_AT_ONCE = 50


@dataclass(frozen=True)
class Way:
    """A way to score architectures.

    Attributes:
        mode: of the Evaluator.
        images: calibration images; 0 without recalibration.
        batch: most images in a batch of calibration; 0 without recalibration.
        step: state of the supernet; None is the trained one.
    """

    mode: str
    images: int
    batch: int
    step: int | None = None

    @property
    def name(self) -> str:
        """For files: all that the scores depend on beside the run's settings."""
        calibration = f"_{self.images}_in_{self.batch}" if self.images else ""
        return f"{self.mode}{calibration}" + (f"_step_{self.step}" if self.step is not None else "")


@dataclass(frozen=True)
class Ranking:
    """Architectures with a predictor's scores.

    Attributes:
        name: of the predictor.
        predicted: [n], what it ranks by.
        true: [n], what its ranking is compared with.
        statistics: how they agree.
        way: how the scores were made; None for predictors without a supernet.
    """

    name: str
    predicted: NDArray[np.float64]
    true: NDArray[np.float64]
    statistics: RankStatistics
    way: Way | None = None


@dataclass(frozen=True)
class Consistency:
    """What came out.

    Attributes:
        space: name of the search space.
        dataset: of the table.
        size: architectures in the space.
        n: architectures that were scored.
        failed: for every way by name how many of them gave NaN or infinity; they count as accuracy 0.
        scored: one ranking a way of scoring: the ways of the ablation, then numbers of images, then earlier states.
        references: the predictors without a supernet, random order first.
        steps: steps of the supernet's training.
        missing: steps of states that training was to keep, and that are not there to be scored.
    """

    space: str
    dataset: str
    size: int
    n: int
    failed: dict[str, int]
    scored: tuple[Ranking, ...]
    references: tuple[Ranking, ...]
    steps: int
    missing: tuple[int, ...] = ()


def ways(config: ConsistencyConfig, steps: Iterable[int] = ()) -> list[Way]:
    """The ways to score that the settings ask for, in the order of :attr:`Consistency.scored`.

    Args:
        config: the settings.
        steps: states of the supernet beside the trained one.
    """
    first, batch = config.calibration_images[0], config.calibration_batch
    found = [Way(mode, 0, 0) if mode == "none" else Way(mode, first, batch) for mode in config.ablation]
    main = next((way for way in found if way.images), None)
    if main is not None:
        found += [dataclasses.replace(main, images=images) for images in config.calibration_images[1:]]
    if config.checkpoints:
        found += [dataclasses.replace(main or found[0], step=step) for step in steps]
    return found


def draw(space: Space, n: str, seed: int) -> list[Architecture]:
    """Distinct random architectures, or all, in the order of their genes. A greater ``n`` holds those of a smaller."""
    numbers = np.arange(space.size)
    if n != "all":
        numbers = np.sort(np.random.default_rng([seed, 3]).permutation(numbers)[: int(n)])
    genes = np.unravel_index(numbers, [len(names) for names in space.choices])
    return [space.architecture(row) for row in np.stack(genes, axis=1).tolist()]


def open_table(config: Config, source: DataSource, space: Space) -> ArchitectureTable:
    """The table of the settings, once all that could not be done with it is refused.

    Raises:
        InputError: no table of the space or none given, one that cannot be read or that lacks the data set or an
            architecture of the space; more architectures or calibration images than there are.
    """
    settings = config.consistency
    if space.name not in TABLES:
        raise InputError(f"space.name: there is no table of {space.name}'s networks; there are of {', '.join(TABLES)}")
    if not settings.table:
        raise InputError(f"consistency.table: give the file with {space.name}'s networks by --table")
    if settings.n != "all" and int(settings.n) > space.size:
        raise InputError(f"consistency.n: got {settings.n}; the space has {space.size:,} architectures")
    if max(settings.calibration_images) > source.train_size:
        asked = max(settings.calibration_images)
        raise InputError(f"consistency.calibration_images: got {asked:,}; the training part has {source.train_size:,}")
    table = TABLES[space.name](settings.table)
    for name, value in table.layout.items():
        if space.config()[name] != value:
            raise InputError(f"space.{name}: got {space.config()[name]}; the table's networks have {value}")
    try:
        table.truth(_dataset(config))
        table.rows([arch.genes for arch in draw(space, settings.n, config.seed)], space.choices)
    except InputError as error:
        raise InputError(f"consistency.{error}") from None
    return table


def consistency(job: Job, table: ArchitectureTable) -> Consistency:
    """Score architectures with the run's trained supernet in all ways that the settings ask for, and rank them.

    Under ``torchrun`` all ranks share out the scoring; rank 0 writes. Ways that are on record are not scored again.

    Args:
        job: the run.
        table: what :func:`open_table` gave.

    Raises:
        InputError, CheckpointError: see :func:`spos_fast.pipeline.load_supernet`; damaged records.
        RankError: another rank is gone or has failed; scoring goes on where it was when it is started again.
    """
    config, dataset = job.config, _dataset(job.config)
    archs = draw(job.space, config.consistency.n, config.seed)
    rows = table.rows([arch.genes for arch in archs], job.space.choices)
    true, params = table.truth(dataset)[rows], table.params[rows]
    scored, failed = [], {}
    for way in ways(config.consistency, _kept(job)):
        scores = _scores(job, way, archs)
        predicted = np.array([score.accuracy for score in scores])
        failed[way.name] = sum(score.failed for score in scores)
        scored.append(Ranking(way.name, predicted, true, rank_statistics(predicted, true, params), way))
    references = [_random_order(true)]
    for name, values, reference_truth in table.references(dataset):
        given = params if name != "parameters" else None
        statistics = rank_statistics(values[rows], reference_truth[rows], given)
        references.append(Ranking(name, values[rows], reference_truth[rows], statistics))
    result = Consistency(
        job.space.name,
        dataset,
        job.space.size,
        len(archs),
        failed,
        tuple(scored),
        tuple(references),
        config.train.steps,
        missing_states(job),
    )
    if job.exchange.rank == 0:
        write_json(job.folder / RESULT, _plain(result))
    return result


def _dataset(config: Config) -> str:
    return config.consistency.dataset or config.data.name


def missing_states(job: Job) -> tuple[int, ...]:
    """Steps of states that the run's training was to keep and that are to be scored, but are not there."""
    train = job.config.train
    kept = kept_steps(train.steps, train.log_every, train.keep_checkpoints)
    return tuple(step for step in kept if job.config.consistency.checkpoints and step not in _kept(job))


def _kept(job: Job) -> dict[int, Path]:
    return kept_checkpoints(job.folder / "supernet" / "checkpoint.pt")


def _scores(job: Job, way: Way, archs: Sequence[Architecture]) -> list[Score]:
    """Scores of architectures in one way, those on record taken from there."""
    records = shared_records(job.folder / FOLDER / f"{way.name}.jsonl", job.exchange)
    evaluator: DistributedEvaluator | None = None

    def evaluate(some: Sequence[Architecture]) -> list[Score]:
        # Made when there is something to score: a run that is finished reads no weights and no images.
        nonlocal evaluator
        if evaluator is None:
            evaluator = DistributedEvaluator(_evaluator(job, way), space=job.space, exchange=job.exchange)
        return evaluator(some)

    recorded = RecordedScores(records, evaluate, job.space, job.listener, len(archs))
    # Another number of architectures has another order, and takes the scores on record.
    score = recorded.phase(f"{way.name}_n{len(archs)}")
    parts = (archs[first : first + _AT_ONCE] for first in range(0, len(archs), _AT_ONCE))
    return list(itertools.chain.from_iterable(map(score, parts)))


def _evaluator(job: Job, way: Way) -> Evaluator:
    settings = job.config.consistency
    net = load_supernet(job)
    if way.step is not None:
        path = _kept(job)[way.step]
        load_model(net, load_checkpoint(path), path)
    # Without recalibration a few images tell the Evaluator their shape.
    images = way.images or min(job.source.train_size, 2)
    return Evaluator(
        net,
        job.source.calibration(
            images, seed=job.config.seed, device=job.device, progress=partial(job.listener.decoded, "calibration")
        ),
        job.source.validation(device=job.device, progress=partial(job.listener.decoded, "validation")),
        mode=way.mode,  # type: ignore[arg-type]
        calibration_batch=settings.calibration_batch,
        batch_size=settings.batch_size,
    )


def _random_order(true: NDArray[np.float64]) -> Ranking:
    """What to expect of a random order. Its top is that of a predictor with nothing but ties; the interval is that of
    tau between unrelated lists (variance 2 (2n + 5) / (9n (n - 1)), Kendall 1938).
    """
    n, constant = len(true), np.zeros(len(true))
    spread = min(1.96 * math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1))), 1.0)
    tied = rank_statistics(constant, true)
    nothing: dict[str, Any] = dict.fromkeys(("tau", "spearman", "tau_top_half", "tau_top_tenth", "partial_tau"), 0.0)
    return Ranking("random order", constant, true, dataclasses.replace(tied, **nothing, interval=(-spread, spread)))


def _plain(result: Consistency) -> dict[str, Any]:
    """The result without its lists of scores, for JSON, which knows no NaN."""

    def row(ranking: Ranking) -> dict[str, Any]:
        way = dataclasses.asdict(ranking.way) if ranking.way else {}
        return {"name": ranking.name, **way, **_without_nan(dataclasses.asdict(ranking.statistics))}

    return {
        "space": result.space,
        "dataset": result.dataset,
        "size": result.size,
        "n": result.n,
        "failed": result.failed,
        "missing": list(result.missing),
        "scored": [row(ranking) for ranking in result.scored],
        "references": [row(ranking) for ranking in result.references],
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
