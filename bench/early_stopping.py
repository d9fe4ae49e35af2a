"""How often early stopping errs and how many images it spares: on a finished search, and in the worst case.

    python -m bench.early_stopping --folder RUN     # prints the tables of docs/scoring.md

The candidates of the run's evolution are scored once more, image by image. Then every generation is looked at anew in
many random orders of the validation images, with the bar that it had in the search.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from spos_fast import Architecture, EarlyStopping, Score, pipeline, recalibrate
from spos_fast.checkpoint import read_json
from spos_fast.config_io import config_from
from spos_fast.errors import CheckpointError, InputError
from spos_fast.job import Job, make_space

CONFIDENCES = (0.9, 0.99, 0.999)


def main() -> int:
    """Score the candidates, replay the search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="run folder with a finished search")
    parser.add_argument("--generations", type=int, default=20, help="at most so many of them (default %(default)s)")
    parser.add_argument("--orders", type=int, default=500, help="random orders of the images (default %(default)s)")
    options = parser.parse_args()
    try:
        for name in ("generations", "orders"):
            if getattr(options, name) < 1:
                raise InputError(f"--{name}: got {getattr(options, name)}; expected a positive number")
        archs, generations, right, keep = answers(options.folder, options.generations)
    except (InputError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| confidence | images | batch | dropped at the bar | stated |\n|---|---|---|---|---|")
    for confidence in CONFIDENCES:
        for total, batch in ((5_000, 256), (5_000, 64), (50_000, 256)):
            share = worst_case(confidence, total, batch)
            print(f"| {confidence} | {total:,} | {batch} | {share:.2%} | {1 - confidence:.1%} |")
    print("\n| deviation of accuracies | images | images spared |\n|---|---|---|")
    for deviation in (0.005, 0.01, 0.02, 0.04):
        for total in (5_000, 50_000):
            print(f"| {100 * deviation:g} points | {total:,} | {spared_by_spread(0.99, total, 256, deviation):.0%} |")
    print("\n| confidence | batch | wrongly dropped | of those that reach the bar | stated | images spared |")
    print("|---|---|---|---|---|---|")
    for confidence in CONFIDENCES:
        for batch in (256, 64):
            stopping = EarlyStopping(keep, confidence)
            wrong, fit, spared = replay(archs, generations, right, stopping, batch, options.orders)
            rate = f"{wrong / fit:.2%}" if fit else ""
            print(f"| {confidence} | {batch} | {wrong:,} of {fit:,} | {rate} | {1 - confidence:.1%} | {spared:.1%} |")
    return 0


def worst_case(confidence: float, total: int, batch: int) -> float:
    """How often a candidate exactly at the bar is dropped."""
    seen = images_seen(0.6, np.full(20_000, 0.6), confidence, total, batch)
    return float((seen < total).mean())


def spared_by_spread(confidence: float, total: int, batch: int, deviation: float) -> float:
    """Share of the images that nobody looks at if accuracies are normal and one candidate in five reaches the bar."""
    accuracies = np.random.default_rng(1).normal(0.6, deviation, 5_000).clip(0, 1)
    seen = images_seen(float(np.quantile(accuracies, 0.8)), accuracies, confidence, total, batch)
    return 1 - float(seen.mean()) / total


def images_seen(bar: float, accuracies: np.ndarray, confidence: float, total: int, batch: int) -> np.ndarray:
    """For candidates with these accuracies ``[n]`` how many images each sees, every one in an order of its own."""
    stopping = EarlyStopping(1, confidence)
    stopping.learn([Architecture("known", ())], [Score(bar, 0.0, total)])
    rng = np.random.default_rng(0)
    right = np.round(accuracies * total).astype(np.int64)
    correct, seen = np.zeros_like(right), np.full(len(right), total)
    looks = -(-total // batch) - 1
    for done in range(batch, total, batch):
        left = total - done + batch
        correct += rng.hypergeometric(right - correct, left - (right - correct), batch)
        dropped = ~stopping.alive(torch.from_numpy(correct), done, total, looks).numpy()
        seen[dropped & (seen == total)] = done
    return seen


def answers(folder: Path, most: int) -> tuple[list[Architecture], list[int], np.ndarray, int]:
    """The candidates of evolution, their generations, which images each gets right ``[n, images]``, and ``top_k``."""
    config = config_from(read_json(folder / "config.json"), "run")
    source = config.data.load()
    space = make_space(config, source, folder)
    net = pipeline.load_supernet(Job(folder, config, source, space, torch.device("cpu")))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = config.search
    calibration = source.calibration(settings.calibration_images, seed=config.seed)
    validation = source.validation()
    rows = [row for row in read_json(folder / "search" / "evolution.json") if row["generation"] <= most]
    archs = [space.architecture(row["genes"]) for row in rows]
    right = []
    for arch in archs:
        plain = net.extract(arch)
        recalibrate(plain, calibration.batches(settings.calibration_batch), settings.bn_mode)  # type: ignore[arg-type]
        plain.eval()
        with torch.no_grad():
            right.append(torch.cat([plain(x).argmax(1) == labels for x, labels in validation.batches(256)]).numpy())
    return archs, [row["generation"] for row in rows], np.stack(right), settings.top_k


def replay(
    archs: list[Architecture],
    generations: list[int],
    right: np.ndarray,
    stopping: EarlyStopping,
    batch: int,
    orders: int,
) -> tuple[int, int, float]:
    """Candidates that were wrongly dropped, those that could have been, and the share of images that nobody looked at.

    What a search knows are the candidates of the generations before, with their true accuracies.
    """
    total = right.shape[1]
    looks = -(-total // batch) - 1
    wrong = fit = 0
    spared = images = 0.0
    rng = np.random.default_rng(0)
    for members in _generations(generations):
        known = range(members[0])
        scores = [Score(float(right[number].mean()), 0.0, total) for number in known]
        stopping.forget()
        stopping.learn([archs[number] for number in known], scores)
        answers = right[members]
        reaches = np.full(len(members), False) if stopping.bar is None else answers.mean(1) >= stopping.bar
        for _ in range(orders):
            correct = answers[:, rng.permutation(total)].cumsum(1, dtype=np.int64)
            alive = np.ones(len(members), dtype=bool)
            for seen in range(batch, total, batch):
                now = torch.from_numpy(correct[:, seen - 1])
                dropped = alive & ~stopping.alive(now, seen, total, looks).numpy()
                alive &= ~dropped
                spared += int(dropped.sum()) * (total - seen)
            wrong += int((reaches & ~alive).sum())
        fit += int(reaches.sum()) * orders
        images += len(members) * total * orders
    return wrong, fit, spared / images


def _generations(numbers: list[int]) -> Iterator[list[int]]:
    for generation in range(1, max(numbers) + 1):
        yield [index for index, number in enumerate(numbers) if number == generation]


if __name__ == "__main__":
    raise SystemExit(main())
