"""The mixed-precision search on a small scale: searched bits against uniform 3W3A and random ones at the same bit
operations, several seeds.

    python -m bench.quant_search --data.path FOLDER     # runs what is missing, writes the table of docs/results.md

Every seed is one ``spos-fast demo`` on one thread, ``--jobs`` of them at a time. A run that was stopped goes on.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

from bench.seeds import ROOT, finished_runs, mean_interval, results_of, write_between

ROWS = {
    "evolution": "searched: bits and widths of every block",
    "all_3W3A": "uniform 3W3A, usual widths",
    "random_0": "random bits and widths",
}
M = 2**20
BEGIN, END = "<!-- quant_search: begin (written by bench/quant_search.py) -->", "<!-- quant_search: end -->"


def main() -> int:
    """Run the seeds and write the table."""
    folders = finished_runs(__doc__, "quant_cifar10_small", Path("runs/quant_search"))
    if folders is None:
        return 1
    write_between(ROOT / "docs" / "results.md", f"{table(folders)}\n{searched(folders)}", BEGIN, END)
    return 0


def table(folders: list[Path]) -> str:
    """The comparison as Markdown, means over the seeds with 95 % t-intervals, and the differences within a seed.

    Args:
        folders: finished run folders, one a seed.
    """
    lines = [
        "| architecture | BitOps (M = 2^20) | MACs | test accuracy, mean ± 95 % interval | seeds |",
        "|---|---|---|---|---|",
    ]
    accuracies = {label: [100 * one["test_accuracy"] for one in results_of(folders, label)] for label in ROWS}
    for label, title in ROWS.items():
        results = results_of(folders, label)
        bitops = _span([one["bitops"] / M for one in results], 1)
        macs = _span([one["macs"] / 1e6 for one in results], 2)
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies[label])
        lines.append(f"| {title} | {bitops} | {macs} M | {mean_interval(accuracies[label])} % | {each} |")
    lines += [
        "",
        "Differences within a seed, in points of test accuracy:",
        "",
        "| | mean ± 95 % interval |",
        "|---|---|",
    ]
    short = {label: title.replace(":", ",").split(",")[0] for label, title in ROWS.items()}
    for first, second in itertools.combinations(ROWS, 2):
        points = [a - b for a, b in zip(accuracies[first], accuracies[second], strict=True)]
        lines.append(f"| {short[first]} minus {short[second]} | {mean_interval(points)} |")
    return "\n".join(lines) + "\n"


def searched(folders: list[Path]) -> str:
    """The searched networks as Markdown, block by block; args as :func:`table`."""
    from spos_fast.config_io import config_from

    lines = ["Searched networks, bits and width of every block:", ""]
    accuracies = []
    for folder in folders:
        config = config_from(json.loads((folder / "config.json").read_text()), str(folder))
        space = config.space.make(input_size=config.data.input_size, in_channels=3, num_classes=10)
        best = json.loads((folder / "search" / "best.json").read_text())["evolution"]
        names = [space.candidates(gene)[chosen] for gene, chosen in enumerate(best["genes"])]
        blocks = ", ".join(f"{bits} {width}" for bits, width in zip(names[::2], names[1::2], strict=True))
        lines.append(f"- {folder.name}: {blocks}")
        accuracies.append(100 * best["accuracy"])
    lines += ["", f"In the supernet they have {statistics.mean(accuracies):.2f} % of the validation images right."]
    return "\n".join(lines) + "\n"


def _span(values: list[float], digits: int) -> str:
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(ends)


if __name__ == "__main__":
    sys.exit(main())
