"""What the whole method costs on the machine that was measured: the published ImageNet protocol, eager against ours.

    python -m bench.cost [RESULTS.json]     default: the newest committed results of every device

Supernet: 150,000 steps of 1,024 images. Search: 1,050 candidates of 25,600 calibration and 8,000 validation forwards
(arXiv 1904.00420 and its code). Hours = images / measured images a second, both tasks at 224 x 224. Data loading,
augmentation and retraining are not in it. The scoring rate is measured on fewer images a candidate in the same
proportion; what every candidate pays once weighs more there than in the full protocol.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cases.supernet import SCORING, STEP
from bench.run import GREEN
from bench.table import RESULTS, header, newest

TRAINING_IMAGES = 150_000 * 1_024
CANDIDATES = 1_050
FORWARDS = CANDIDATES * (200 * 128 + 40 * 200)
SIDE = "224x224"
# Whose times count as plain eager PyTorch, task by task: the published code's layout.
EAGER = {STEP: "eager NCHW", SCORING: "published, NCHW"}


def hours(images: int, images_per_second: float) -> float:
    """Device hours for that many images at that speed."""
    return images / images_per_second / 3600


def costs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task that the record holds: task, images, hours of ours, of plain eager and of the best peer.

    Ours is left out (None) where the case is not green.
    """
    rows = []
    for task, images in ((STEP, TRAINING_IMAGES), (SCORING, FORWARDS)):
        case = next((c for c in record["cases"] if c["op"] == task and c["shape"].startswith(SIDE)), None)
        if case is None:
            continue

        def spent(contender: str, case: Mapping[str, Any] = case, images: int = images) -> float | None:
            spread = case["seconds"].get(contender)
            return hours(images, case["items"] / spread["median"]) if spread else None

        rows.append(
            {
                "task": task,
                "images": images,
                "ours": spent(case.get("ours", "")) if case["verdict"] == GREEN else None,
                "eager": spent(EAGER[task]),
                "best_peer": case.get("best_peer", ""),
                "best": spent(case.get("best_peer", "")),
            }
        )
    return rows


def report(record: Mapping[str, Any]) -> str:
    """The costs of one record as Markdown."""
    unit = "GPU" if record["environment"]["device_type"] == "cuda" else "machine"
    rows = costs(record)
    lines = [
        f"{header(record)}.",
        "",
        f"| {unit}-hours | images | spos_fast | eager, as published | best peer |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        best = f"{_shown(row['best'])} ({row['best_peer']})"
        lines.append(
            f"| {row['task']} | {row['images'] / 1e6:.1f} M | {_shown(row['ours'])} | {_shown(row['eager'])} | {best} |"
        )
    if len(rows) == 2:
        sums = [_sum([row[key] for row in rows]) for key in ("ours", "eager", "best")]
        lines.append(f"| both | | {' | '.join(map(_shown, sums))} |")
    else:
        lines.append("| both | | not measured | not measured | not measured |")
    return "\n".join(lines) + "\n"


def _sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 if there are no results."""
    parser = argparse.ArgumentParser(
        "python -m bench.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="*", type=Path, help="files of python -m bench")
    files = parser.parse_args(arguments).results
    records = []
    for file in files:
        try:
            records.append(json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"results: {file} is not a file of python -m bench ({error})")
        if "cases" not in records[-1]:
            parser.error(f"results: {file} is not a file of python -m bench (it has no cases)")
    records = records or newest(RESULTS)
    if not records:
        parser.error(f"results: there are none in {RESULTS}; run python -m bench")
    print("\n".join(report(record) for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
