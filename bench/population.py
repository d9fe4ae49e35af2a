"""Scoring generations of evolution: the published procedure against the Evaluator, and what makes it faster.

    python -m bench.population --threads 2      # 96 x 96, ten minutes; writes bench/results/population/
    python -m bench.population --device cuda --size 224 --dtype bfloat16 --batches 16

Generations are those of ``evolve`` with its defaults (seed 0) on a stated surrogate: the sum of one random number a
layer and choice. All contenders score the same architectures with the same weights on the same images, in turn, in one
process. Calibration to validation images is 3.2 : 1, as published (25,600 : 8,000).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.cases.supernet import ScoringInputs, ScoringSizes, autocast, published_scoring, scoring_inputs
from bench.environment import ROOT, describe, slug
from bench.measure import OtherWork, interleaved, ratio, spread
from bench.memory import TensorsAlive
from bench.peers.shufflenet import split_by_reshape, split_by_slices
from spos_fast import Architecture, Evaluator, Score, evolve
from spos_fast.spaces import ShuffleNetV2

PEERS = ("published, NCHW", "published, channels_last")
# Each with the Evaluator's arguments; all but the first score a generation in one call. Workers are for CPUs.
OURS: dict[str, dict[str, Any]] = {
    "fused ops, one by one": dict(stacked=False, workers=1),
    "+ tree": dict(stacked=False, workers=1),
    "tree and stacking": dict(stacked=True, workers=1),
    "tree and workers": dict(stacked=False, workers=None),
}


def main() -> int:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser("python -m bench.population", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of PyTorch; default: all")
    parser.add_argument("--size", type=int, default=96, help="of the images (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--population", type=int, default=50)
    parser.add_argument("--generations", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--batches", type=int, default=1, help="of 128 calibration images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default %(default)s)")
    parser.add_argument("--memory", type=int, help="bytes for the Evaluator's activations; default: its own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, watch = torch.device(options.device), OtherWork()
    space = ShuffleNetV2(input_size=options.size, dropout=0.0, init="pytorch")
    sizes = ScoringSizes(options.population, options.batches, 128, options.batches * 40)
    populations = bred(space, options.population, max(options.generations))
    rows = [measured(space, populations[at], at, sizes, device, options) for at in options.generations]
    environment, day = describe(device), datetime.date.today().isoformat()
    record = {
        "what": "python -m bench.population",
        "options": vars(options),
        "environment": environment,
        "date": day,
        "other_work_cores": watch.share(),
        "generations": rows,
    }
    # In a folder of its own: the tables take the newest file of bench/results.
    path = ROOT / "bench" / "results" / "population" / f"{slug(environment['device'])}-{options.size}-{day}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    return 0


def bred(space: ShuffleNetV2, population: int, generations: int) -> list[list[Architecture]]:
    """The populations that evolution makes of the surrogate, from the first, random one on."""
    rng = np.random.default_rng(0)
    worth = [rng.normal(size=len(choices)) for choices in space.choices]

    def surrogate(archs: Any) -> list[Score]:
        return [Score(float(sum(w[gene] for w, gene in zip(worth, arch.genes, strict=True))), 0.0, 1) for arch in archs]

    half = population // 2
    found = evolve(space, surrogate, population=population, generations=generations, crossover=half, mutation=half)
    return [
        [candidate.architecture for candidate in found.candidates if candidate.generation == generation]
        for generation in range(generations + 1)
    ]


def measured(
    space: ShuffleNetV2,
    archs: list[Architecture],
    generation: int,
    sizes: ScoringSizes,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One generation's row: seconds of every contender, ratios, memory, and how much of the work the tree leaves."""
    given = scoring_inputs(space, archs, sizes, device)
    evaluators = {name: _evaluator(given, sizes, options, keywords) for name, keywords in OURS.items()}
    alone, tree = list(OURS)[:2]

    def ours(name: str) -> Callable[[], list[Score]]:
        def run() -> list[Score]:
            with autocast(device, options.dtype):
                if name == alone:
                    return [score for arch in archs for score in evaluators[name]([arch])]
                return evaluators[name](archs)

        return run

    layouts = ((torch.contiguous_format, split_by_reshape), (torch.channels_last, split_by_slices))
    runs: dict[str, Callable[[], Any]] = {
        name: published_scoring(given, sizes, layout, split, options.dtype)
        for name, (layout, split) in zip(PEERS, layouts, strict=True)
    }
    runs |= {name: ours(name) for name in OURS}
    scores = {name: runs[name]() for name in OURS}
    samples = interleaved(runs, device, seconds=0.0, least=options.rounds, most=options.rounds)
    with TensorsAlive() as alive:  # of one worker: what other threads make is not seen
        runs[tree]()
    prefixes = [len({arch.genes[:length] for arch in archs}) for length in range(1, len(archs[0].genes) + 1)]
    row = {
        "generation": generation,
        "candidates": len(archs),
        "seconds": {name: spread(times) for name, times in samples.items()},
        "times_faster": {peer: {name: ratio(samples[peer], samples[name]) for name in OURS} for peer in PEERS},
        "prefixes": prefixes,
        "bytes_alive": alive.most,
        "scores_equal": all(made == scores[alone] for made in scores.values()),
    }
    print(f"generation {generation}: done", file=sys.stderr, flush=True)
    return row


def _evaluator(
    given: ScoringInputs, sizes: ScoringSizes, options: argparse.Namespace, keywords: dict[str, Any]
) -> Evaluator:
    return Evaluator(
        given.net,
        given.calibration,
        given.validation,
        calibration_batch=sizes.batch,
        batch_size=200,
        memory=options.memory,
        **keywords,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; the memory is that of one worker."""
    lines = [
        f"| generation | {' | '.join((*PEERS, *OURS))} | times faster than {PEERS[0]} | than {PEERS[1]} | memory |",
        "|---" * (4 + len(PEERS) + len(OURS)) + "|",
    ]
    for row in rows:
        seconds = " | ".join(f"{row['seconds'][name]['median']:.2f} s" for name in (*PEERS, *OURS))
        best = min(OURS, key=lambda name: row["seconds"][name]["median"])
        faster = " | ".join(f"{row['times_faster'][peer][best]['median']:.2f}" for peer in PEERS)
        lines.append(f"| {row['generation']} | {seconds} | {faster} | {row['bytes_alive'] / 1e6:,.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
