"""The main job on a run folder, stage by stage: train a supernet, search, retrain. Each stage resumes where it was."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spos_fast import distributed
from spos_fast.architecture import Architecture
from spos_fast.calibration import recalibrate
from spos_fast.checkpoint import Records, load_checkpoint, read_json, write_json
from spos_fast.config import Config, RetrainConfig, SupernetConfig
from spos_fast.distributed_evaluation import DistributedEvaluator
from spos_fast.early_stopping import EarlyStopping
from spos_fast.errors import CheckpointError, InputError
from spos_fast.evaluation import Evaluator, evaluate
from spos_fast.evolution import Candidate, SearchResult, evolve, random_search
from spos_fast.job import CANDIDATES, Job, bind_table, require_stage_before
from spos_fast.pareto import ParetoResult, pareto_search
from spos_fast.recording import RecordedScores, shared_records
from spos_fast.sampling import UniformSampler
from spos_fast.spaces import Space
from spos_fast.supernet import Supernet
from spos_fast.training import Metrics, TrainConfig, first_batches, load_model, train

PHASES = ("evolution", "random_search")


def train_supernet(job: Job) -> None:
    """Train the supernet, or go on training it.

    Raises:
        InputError, CheckpointError: see :func:`spos_fast.train`.
    """
    config = job.config
    sampler = config.train.sampler(job.space)
    torch.manual_seed(config.seed)
    net = job.space.supernet().to(job.device)
    with _metrics(job, "supernet", config.train.steps) as (checkpoint, on_resume, on_metrics):
        train(
            net,
            job.source,
            _train_config(config.train),
            sampler=sampler,
            seed=config.seed,
            workers=job.workers,
            checkpoint=checkpoint,
            on_resume=on_resume,
            on_metrics=on_metrics,
            keep_checkpoints=config.train.keep_checkpoints,
        )


def load_supernet(job: Job) -> Supernet:
    """The trained supernet of the run, or the published one that the search is configured to use.

    Raises:
        InputError: the run has no supernet, or its training is not finished.
        CheckpointError: damaged or foreign checkpoint.
    """
    net = job.space.supernet()
    published = job.config.search.supernet
    if published:
        net.load_published(published)
        return net.to(job.device)
    require_stage_before("search", job.folder, job.config)
    path = job.folder / "supernet" / "checkpoint.pt"
    content = load_checkpoint(path)
    step, steps = content.get("step"), job.config.train.steps
    if step != steps:
        raise InputError(
            f"folder: the supernet in {job.folder} has {step} of {steps} steps; run `spos-fast train` again"
        )
    load_model(net, content, path)
    return net.to(job.device)


def search(job: Job) -> dict[str, SearchResult]:
    """Evolution, and random search under the same budget, with the supernet's weights; then a Pareto search, where
    objectives are set.

    Under ``torchrun`` all ranks run the same search and share out the scoring of every generation; rank 0 writes.

    Returns:
        One result a phase, on every rank, without the Pareto search. All are written into the run folder.

    Raises:
        InputError, CheckpointError: see :func:`load_supernet` and :func:`spos_fast.evolve`; ranks that have different
            supernets or settings; a phase whose candidates all failed.
        RankError: another rank is gone or has failed; the search goes on where it was when it is started again.
    """
    settings, config = job.config.search, job.config
    UniformSampler(job.space, settings.constraint)  # an infeasible constraint is refused before any work
    folder = job.folder / "search"
    records = shared_records(job.folder / CANDIDATES, job.exchange)
    net = load_supernet(job)
    _require_same_start(net, config, job.exchange)
    stopping = EarlyStopping(settings.top_k, settings.early_stopping) if settings.early_stopping else None
    evaluator = Evaluator(
        net,
        job.source.calibration(
            settings.calibration_images,
            seed=config.seed,
            device=job.device,
            progress=partial(job.listener.decoded, "calibration"),
        ),
        job.source.validation(device=job.device, progress=partial(job.listener.decoded, "validation")),
        mode=settings.bn_mode,  # type: ignore[arg-type]
        calibration_batch=settings.calibration_batch,
        batch_size=settings.batch_size,
        early_stopping=stopping,
    )
    if job.exchange.rank == 0:
        bind_table(config, job.folder)
    shared = DistributedEvaluator(evaluator, space=job.space, exchange=job.exchange)
    budget = settings.population * (settings.generations + 1)
    scores = RecordedScores(records, shared, job.space, job.listener, budget, stopping)
    results = {}
    results["evolution"] = evolve(
        job.space,
        scores.phase("evolution"),
        population=settings.population,
        generations=settings.generations,
        top_k=settings.top_k,
        mutation_probability=settings.mutation_probability,
        crossover=settings.crossover,
        mutation=settings.mutation,
        constraint=settings.constraint,
        seed=config.seed,
    )
    _require_success("evolution", results["evolution"])
    if settings.random_search:
        results["random_search"] = random_search(
            job.space,
            scores.phase("random_search"),
            len(results["evolution"].candidates),
            population=settings.population,
            constraint=settings.constraint,
            seed=config.seed,
        )
        _require_success("random_search", results["random_search"])
    found: dict[str, tuple[Candidate, ...]] = {phase: result.candidates for phase, result in results.items()}
    if settings.objectives:
        pareto = _search_front(job, scores)
        found |= {"pareto": pareto.candidates, "front": tuple(pareto.front)}
    if job.exchange.rank == 0:
        for phase, candidates in found.items():
            write_json(folder / f"{phase}.json", [_candidate_row(job.space, candidate) for candidate in candidates])
        write_json(folder / "best.json", {phase: _candidate_row(job.space, r.best) for phase, r in results.items()})
    job.exchange.barrier()  # the stage that comes next reads these files on every rank
    return results


def _require_success(phase: str, result: SearchResult) -> None:
    """Refuse a phase without a best candidate.

    Raises:
        InputError: every candidate failed.
    """
    if result.best.score.failed:
        raise InputError(
            f"search: all {len(result.candidates):,} candidates of {phase} gave NaN or infinity, so there is none to "
            "retrain; train a supernet with a lower train.lr in another folder"
        )


def _search_front(job: Job, scores: RecordedScores) -> ParetoResult:
    """Search for the configured objectives."""
    settings = job.config.search
    return pareto_search(
        job.space,
        scores.phase("pareto"),
        settings.objectives,
        population=settings.population,
        generations=settings.generations,
        constraint=settings.constraint,
        seed=job.config.seed,
    )


def retrain(job: Job, architectures: dict[str, Architecture]) -> dict[str, dict[str, Any]]:
    """Train architectures as stand-alone networks on the whole training part and test them.

    Args:
        job: the run.
        architectures: what to train, by label; the label is the folder's name.

    Returns:
        For every label ``architecture``, the cost (``macs``, ``params``, ``bitops`` in a quantized space, and
        ``latency_ms`` with a latency table), ``test_accuracy``, ``test_loss``, ``test_images``.
    """
    results = {}
    for label, arch in architectures.items():
        results[label] = _retrain_one(job, label, arch)
        if distributed.rank() == 0:
            job.listener.retrained(label, results[label])
    return results


def baselines(job: Job) -> dict[str, Architecture]:
    """The architectures of the paper's comparison: best of evolution and of random search, uniform networks, and random
    ones within the search's constraint.
    """
    chosen = searched(job) | job.space.baselines()
    sampler = UniformSampler(job.space, job.config.search.constraint)
    rng = np.random.default_rng([job.config.seed, 2])
    for number in range(job.config.retrain.random_architectures):
        chosen[f"random_{number}"] = sampler.sample(rng)
    return chosen


def searched(job: Job) -> dict[str, Architecture]:
    """The best architecture of every phase of the run's search.

    Raises:
        InputError: the search has not finished.
    """
    require_stage_before("retrain", job.folder, job.config)
    best = read_json(job.folder / "search" / "best.json")
    return {phase: job.space.architecture(best[phase]["genes"]) for phase in PHASES if phase in best}


def pareto_front(job: Job) -> dict[str, Architecture]:
    """The front of the run's Pareto search by label (``pareto_0``, ``pareto_1``, ...), cheapest first; empty without
    one.
    """
    path = job.folder / "search" / "front.json"
    rows = read_json(path) if path.exists() else []
    return {f"pareto_{number}": job.space.architecture(row["genes"]) for number, row in enumerate(rows)}


def _retrain_one(job: Job, label: str, arch: Architecture) -> dict[str, Any]:
    settings, stage = job.config.retrain, f"retrain/{label}"
    if (job.folder / stage / "result.json").exists():
        result = read_json(job.folder / stage / "result.json")
        if not isinstance(result, dict) or result.get("architecture") != list(arch.genes):
            raise CheckpointError(f"{job.folder / stage}: holds another architecture; name another label")
        return result
    torch.manual_seed(job.config.seed)
    net = load_supernet(job).extract(arch) if settings.init == "inherited" else job.space.build(arch)
    net.to(job.device)
    with _metrics(job, stage, settings.steps) as (checkpoint, on_resume, on_metrics):
        train(
            net,
            job.source,
            _train_config(settings),
            seed=job.config.seed,
            full=True,
            workers=job.workers,
            checkpoint=checkpoint,
            identity={"architecture": list(arch.genes)},
            on_resume=on_resume,
            on_metrics=on_metrics,
        )
    if distributed.rank() > 0:
        return {}
    _recalibrate_retrained(job, net)
    score = evaluate(net, job.source.test_batches(settings.batch_size, device=job.device))
    result = {
        "label": label,
        "architecture": list(arch.genes),
        **job.space.cost(arch).known(),
        "test_accuracy": score.accuracy,
        "test_loss": score.loss,
        "test_images": score.images,
    }
    write_json(job.folder / stage / "result.json", result)
    return result


def _recalibrate_retrained(job: Job, net: nn.Module) -> None:
    """Statistics of a retrained network over the training batches that would come next; always the same ones."""
    settings = job.config.retrain
    if not settings.bn_steps:
        return
    stream = job.source.train_stream(
        settings.batch_size,
        seed=job.config.seed,
        start_step=settings.steps,
        full=True,
        device=job.device,
        workers=job.workers,
    )
    recalibrate(net, first_batches(stream, settings.bn_steps), "cumulative", allow_nonfinite=True)


def retrained_labels(folder: Path) -> list[str]:
    """Labels of the networks of a run whose retraining has finished."""
    return sorted(path.parent.name for path in folder.glob("retrain/*/result.json"))


def retrained(job: Job, label: str) -> tuple[Architecture, nn.Module]:
    """A retrained network of the run as it was tested, in evaluation mode.

    Args:
        job: the run; its images are read where statistics were recalibrated after training.
        label: one of :func:`retrained_labels`.

    Returns:
        Its architecture and the network, on the job's device.

    Raises:
        CheckpointError: missing, damaged or foreign checkpoint or result.
    """
    folder = job.folder / "retrain" / label
    result = read_json(folder / "result.json")
    if not isinstance(result, dict) or not isinstance(result.get("architecture"), list):
        raise CheckpointError(f"{folder / 'result.json'}: is no result of retraining")
    arch = job.space.architecture(result["architecture"])
    net = job.space.build(arch)
    load_model(net, load_checkpoint(folder / "checkpoint.pt"), folder / "checkpoint.pt")
    net.to(job.device)
    _recalibrate_retrained(job, net)
    return arch, net.eval()


def _require_same_start(net: Supernet, config: Config, exchange: distributed.Exchange) -> None:
    """Refuse ranks whose searches would differ: hosts that do not share the run folder.

    Raises:
        InputError: the weights or the settings of the search differ.
    """
    digest = hashlib.sha256(repr((config.seed, config.search)).encode())
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    digests = exchange.all_gather(digest.hexdigest())
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise InputError(
                f"folder: ranks 0 and {rank} have different supernets or settings; share the folder between all hosts"
            )


@contextmanager
def _metrics(job: Job, stage: str, steps: int) -> Iterator[tuple[Path | None, Any, Any]]:
    """Checkpoint path and callbacks of a training stage: rows of metrics, TensorBoard scalars, progress."""
    folder = job.folder / stage
    if distributed.rank() > 0:
        # Other ranks resume from the checkpoint of rank 0 but write nothing.
        yield folder / "checkpoint.pt", None, None
        return
    folder.mkdir(parents=True, exist_ok=True)
    records = Records(folder / "metrics.jsonl")
    writer: Any = None
    if job.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

    def on_resume(done: int) -> None:
        nonlocal writer
        for number, row in enumerate(records.rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise CheckpointError(f"{records.path}: line {number} is no row of metrics; the file is damaged")
        records.keep(sum(row["step"] <= done for row in records.rows))
        job.listener.resumed(stage, done, steps)
        if job.tensorboard and done < steps:
            writer = SummaryWriter(job.folder / "tensorboard" / stage, purge_step=done + 1)

    def on_metrics(metrics: Metrics) -> None:
        row = dataclasses.asdict(metrics)
        row.pop("steps")
        records.append(row)
        if writer is not None:
            for name in ("loss", "accuracy", "lr", "images_per_second"):
                writer.add_scalar(f"{stage}/{name}", row[name], metrics.step)
            writer.flush()
        job.listener.metrics(stage, metrics)

    try:
        yield folder / "checkpoint.pt", on_resume, on_metrics
    finally:
        if writer is not None:
            writer.close()


def _train_config(settings: SupernetConfig | RetrainConfig) -> TrainConfig:
    return TrainConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainConfig)})


def _candidate_row(space: Space, candidate: Any) -> dict[str, Any]:
    return {
        "genes": list(candidate.architecture.genes),
        "generation": candidate.generation,
        "origin": candidate.origin,
        **dataclasses.asdict(candidate.score),
        **space.cost(candidate.architecture).known(),
    }
