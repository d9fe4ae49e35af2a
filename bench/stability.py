"""How stable a ranking by a supernet is against the number of calibration images, for the three modes.

    python -m bench.stability --folder runs/mine     # a run whose supernet is trained

Random architectures are scored with statistics from few images, then from more, each time from several random draws;
every ranking is compared with the one by exact statistics (pooled) of a large set. Scores are recorded in
``FOLDER/stability`` as soon as they exist, so a measurement that was stopped goes on; the table and the figure are
written there at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, NullLocator

from spos_fast import Evaluator, UniformSampler, pipeline
from spos_fast.analysis.drawing import SMALL, new_figure
from spos_fast.analysis.page import DASHES, WIDTHS
from spos_fast.analysis.svg import COLOURS, inline_svg, standalone_svg
from spos_fast.architecture import Architecture
from spos_fast.calibration import MODES, Mode
from spos_fast.checkpoint import Records, write_json
from spos_fast.data import Images
from spos_fast.errors import CheckpointError, InputError
from spos_fast.job import Job, make_space
from spos_fast.latency.settings import MAX_THREADS
from spos_fast.nasbench.statistics import correlation
from spos_fast.run import resolve

SIZES = (16, 64, 256, 1024, 4096)
REFERENCE_MODE: Mode = "pooled"
STYLES = {"cumulative": ("evolution", "line", "o"), "pooled": ("width", "dashed", "s"), "ema": ("random", "thin", "^")}


@dataclass(frozen=True)
class Stability:
    """How rankings from ``images`` calibration images agree with the reference, one value a draw."""

    mode: str
    images: int
    spearman: tuple[float, ...]
    kendall: tuple[float, ...]
    accuracy: float


def main() -> int:
    """Score what is missing, write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="run folder with a trained supernet")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="calibration images (default %(default)s)")
    parser.add_argument("--draws", type=int, default=5, help="random calibration sets a size (default %(default)s)")
    parser.add_argument("--architectures", type=int, default=40, help="random ones (default %(default)s)")
    parser.add_argument("--reference", type=int, default=20000, help="images of the reference (default %(default)s)")
    parser.add_argument("--validation", type=int, default=0, help="only so many validation images (default all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default %(default)s)")
    options = parser.parse_args()
    try:
        if not 1 <= options.threads <= MAX_THREADS:
            raise InputError(f"--threads: got {options.threads}; expected 1 to {MAX_THREADS:,}")
        torch.set_num_threads(options.threads)
        device = _device(options.device)
        if not (options.folder / "config.json").exists():
            raise InputError(f"--folder: {options.folder} is not a run folder; name one with a trained supernet")
        measured = measure(
            options.folder,
            options.sizes,
            draws=options.draws,
            architectures=options.architectures,
            reference=options.reference,
            validation=options.validation,
            device=device,
        )
    except (InputError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = options.folder / "stability"
    write_json(folder / "stability.json", [vars(row) for row in measured])
    (folder / "stability.md").write_text(table(measured))
    (folder / "stability.svg").write_text(figure(measured, options.architectures))
    print(table(measured))
    return 0


def measure(
    folder: Path,
    sizes: Sequence[int],
    *,
    draws: int,
    architectures: int,
    reference: int,
    validation: int,
    device: torch.device,
) -> list[Stability]:
    """Rank correlations for every mode and size.

    Args:
        folder: run folder with a trained supernet.
        sizes: numbers of calibration images.
        draws: calibration sets a size, all of them different draws than the reference's.
        architectures: how many uniformly random ones within the run's constraint.
        reference: calibration images of the reference; at most all of the training part are taken.
        validation: images that scores are measured on, the first ones; 0 for all.
        device: where the networks run.

    Raises:
        InputError: sizes that the training part does not have, fewer than 3 architectures, no draw, a reference of
            fewer than 2 images, a negative number of validation images, or a folder that holds scores of another
            measurement. Nothing is written then.
        CheckpointError: a file of the run is missing or damaged.
    """
    if architectures < 3 or draws < 1:
        raise InputError(f"architectures, draws: got {architectures}, {draws}; at least 3 and 1 are right")
    if reference < 2:
        raise InputError(f"reference: got {reference}; expected at least 2 images")
    if validation < 0:
        raise InputError(f"validation: got {validation}; expected a number of images, or 0 for all")
    config = resolve(folder, {}, {})
    source = config.data.load(None)
    space = make_space(config, source, folder)
    if not sizes or min(sizes) < 2 or max(sizes) > source.train_size:
        raise InputError(f"sizes: got {list(sizes)}; from 2 to {source.train_size:,} images are there")
    net = pipeline.load_supernet(Job(folder, config, source, space, device))
    archs = _random_architectures(UniformSampler(space, config.search.constraint), architectures, config.seed)
    images = source.validation(device=device)
    if validation:
        images = Images(images.pixels[:validation], images.labels[:validation], images.normalization)
    reference = min(reference, source.train_size)
    records = Records(folder / "stability" / "scores.jsonl")
    identity = {
        "architectures": [list(arch.genes) for arch in archs],
        "reference": reference,
        "validation": len(images),
        "batch": config.search.calibration_batch,
    }
    if not records.rows:
        records.append(identity)
    elif records.rows[0] != identity:
        raise InputError(f"folder: {records.path} holds scores of another measurement; move it away")
    known: dict[Any, list[float]] = {
        (row["mode"], row["images"], row["draw"]): row["accuracy"] for row in records.rows[1:]
    }
    for mode, size, draw in _plan(sizes, draws, reference):
        if (mode, size, draw) in known:
            continue
        if draw and mode == "pooled" and size <= config.search.calibration_batch:  # of one batch both are the same
            known[mode, size, draw] = known["cumulative", size, draw]
            continue
        evaluator = Evaluator(
            net,
            source.calibration(size, seed=config.seed + draw, device=device),
            images,
            mode=mode,
            calibration_batch=config.search.calibration_batch,
            batch_size=config.search.batch_size,
        )
        accuracy = [score.accuracy for score in evaluator(archs)]
        records.append({"mode": mode, "images": size, "draw": draw, "accuracy": accuracy})
        known[mode, size, draw] = accuracy
        print(f"{mode}, {size:,} images, draw {draw}: mean accuracy {np.mean(accuracy):.2%}", flush=True)
    return [_stability(known, mode, size, draws, reference) for mode in MODES for size in sizes]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def _plan(sizes: Sequence[int], draws: int, reference: int) -> Iterator[tuple[Mode, int, int]]:
    """The reference is draw 0. A whole draw of all sizes comes before the next, so that a part is of use."""
    yield REFERENCE_MODE, reference, 0
    for draw in range(1, draws + 1):
        for size in sizes:
            for mode in MODES:
                yield mode, size, draw  # type: ignore[misc]


def _random_architectures(sampler: UniformSampler, count: int, seed: int) -> list[Architecture]:
    """Different ones."""
    rng = np.random.default_rng([seed, 3])
    found: dict[Architecture, None] = {}
    for _ in range(100 * count):
        found[sampler.sample(rng)] = None
        if len(found) == count:
            return list(found)
    raise InputError(f"architectures: got {count}; the space has hardly that many within the constraint")


def _stability(known: dict[Any, list[float]], mode: str, size: int, draws: int, reference: int) -> Stability:
    wanted = np.array(known[REFERENCE_MODE, reference, 0])
    rows = [np.array(known[mode, size, draw]) for draw in range(1, draws + 1)]
    found = [correlation(row, wanted) for row in rows]
    return Stability(
        mode,
        size,
        tuple(entry.spearman for entry in found),
        tuple(entry.kendall for entry in found),
        float(np.mean(rows)),
    )


def table(measured: Sequence[Stability]) -> str:
    """Markdown: a row a size; for every mode Spearman and Kendall, mean and range of the draws, and the accuracy."""
    heads = [f"{mode}: {name}" for mode in MODES for name in ("Spearman", "Kendall", "accuracy")]
    lines = ["| images | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for size in dict.fromkeys(row.images for row in measured):
        cells = []
        for mode in MODES:
            row = next(row for row in measured if (row.mode, row.images) == (mode, size))
            for values in (row.spearman, row.kendall):
                cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            cells.append(f"{row.accuracy:.1%}")
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(measured: Sequence[Stability], architectures: int) -> str:
    """Spearman's correlation with the reference against the number of images, a line a mode, as a whole SVG file."""
    drawing, axes = new_figure(width=620, height=350)
    told = []
    for mode, (colour, shape, mark) in STYLES.items():
        rows = [row for row in measured if row.mode == mode]
        sizes = [row.images for row in rows]
        means = [float(np.mean(row.spearman)) for row in rows]
        low, high = ([end(row.spearman) for row in rows] for end in (min, max))
        axes.fill_between(sizes, low, high, color=COLOURS[colour], alpha=0.18, lw=0)
        axes.plot(
            sizes, means, mark, ls=DASHES[shape], lw=WIDTHS[shape], color=COLOURS[colour], ms=5.5, label=mode
        )  # fmt: skip
        told.append(f"{mode}: " + ", ".join(f"{mean:.2f} with {n:,}" for n, mean in zip(sizes, means, strict=True)))
    axes.axhline(1, color=COLOURS["muted"], lw=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("calibration images")
    axes.set_ylabel("Spearman's correlation with the reference")
    axes.legend(loc="lower right", frameon=False, fontsize=SMALL, labelcolor=COLOURS["ink"])
    description = (
        f"Rank correlation of {architectures} architectures with their ranking by exact statistics of the reference, "
        f"against calibration images, mean and range of the draws. {'; '.join(told)}."
    )
    return standalone_svg(inline_svg(drawing, "stability", description))


if __name__ == "__main__":
    sys.exit(main())
