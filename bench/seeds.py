"""The paper's comparison on a small scale: each choice everywhere, random, random search and evolution, several seeds.

    python -m bench.seeds --data.path FOLDER     # runs what is missing, writes the tables of README and docs/results.md

Every seed is one ``spos-fast demo`` on one thread, ``--jobs`` of them at a time. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
ROWS = {
    "all_shuffle_k3": "all shuffle k3",
    "all_shuffle_k5": "all shuffle k5",
    "all_shuffle_k7": "all shuffle k7",
    "all_xception": "all Xception",
    "random_0": "random architecture",
    "random_search": "random search",
    "evolution": "evolution",
}
ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- seeds: begin (written by bench/seeds.py) -->", "<!-- seeds: end -->"


def main() -> int:
    """Run the seeds and write the table."""
    folders = finished_runs(__doc__, "cifar10_small", Path("runs/seeds"))
    if folders is None:
        return 1
    comparison = table(folders)
    write_between(ROOT / "README.md", comparison, BEGIN, END)
    write_between(ROOT / "docs" / "results.md", f"{comparison}\n{differences(folders)}", BEGIN, END)
    return 0


def finished_runs(description: str | None, config: str, folder: Path) -> list[Path] | None:
    """Run what the command line asks for, or go on with it: a demo a seed.

    Args:
        description: of the command.
        config: the preset that is run by default.
        folder: where runs go by default.

    Returns:
        The finished run folders, one a seed; None if a run failed, which has been said.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=config, help="preset or TOML file (default %(default)s)")
    parser.add_argument("--data.path", dest="data", required=True, help="folder or archive of the data set")
    parser.add_argument("--folder", type=Path, default=folder, help="where runs go (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=3, help="seeds at a time, one thread each (default %(default)s)")
    options = parser.parse_args()
    folders = [options.folder / f"seed_{seed}" for seed in options.seeds]
    options.folder.mkdir(parents=True, exist_ok=True)

    def run(seed: int, folder: Path) -> int:
        command = [sys.executable, "-m", "spos_fast", "demo", "--config", options.config, "--data.path", options.data]
        command += ["--folder", str(folder), "--seed", str(seed), "--threads", "1", "--no-tensorboard"]
        with open(folder.with_suffix(".log"), "w") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(run, options.seeds, folders))
    if any(codes):
        failed = [str(folder.with_suffix(".log")) for folder, code in zip(folders, codes, strict=True) if code]
        print(f"failed, see {', '.join(failed)}", file=sys.stderr)
        return None
    return folders


def write_between(page: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two marks of a page."""
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.split(end)[1]}")


def table(folders: list[Path]) -> str:
    """The comparison as Markdown: mean over the seeds with a 95 % t-interval, and every seed.

    Args:
        folders: finished run folders, one a seed.
    """
    best = [json.loads((folder / "search" / "best.json").read_text()) for folder in folders]
    lines = [
        "| architecture | MACs | accuracy in the supernet (validation) | test accuracy, mean ± 95 % interval | seeds |",
        "|---|---|---|---|---|",
    ]
    for label, title in ROWS.items():
        results = results_of(folders, label)
        accuracies = [100 * result["test_accuracy"] for result in results]
        macs = sorted({result["macs"] for result in results})
        cost = " to ".join(f"{value / 1e6:.2f}" for value in dict.fromkeys((macs[0], macs[-1]))) + " M"
        inherited = [100 * row[label]["accuracy"] for row in best if label in row]
        shown = f"{statistics.mean(inherited):.2f} %" if inherited else ""
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        lines.append(f"| {title} | {cost} | {shown} | {mean_interval(accuracies)} % | {each} |")
    return "\n".join(lines) + "\n"


def differences(folders: list[Path]) -> str:
    """Differences between rows within a seed, as Markdown; args as :func:`table`."""
    lines = ["Differences within a seed, in points of test accuracy:", "", "| | mean ± 95 % interval |", "|---|---|"]
    for first, second in (
        ("evolution", "random_search"),
        ("evolution", "random_0"),
        ("evolution", "all_shuffle_k3"),
        ("random_search", "random_0"),
    ):
        pairs = zip(results_of(folders, first), results_of(folders, second), strict=True)
        points = [100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in pairs]
        lines.append(f"| {ROWS[first]} minus {ROWS[second]} | {mean_interval(points)} |")
    return "\n".join(lines) + "\n"


def results_of(folders: list[Path], label: str) -> list[dict[str, Any]]:
    """What retraining an architecture gave, one result a seed."""
    return [json.loads((folder / "retrain" / label / "result.json").read_text()) for folder in folders]


def mean_interval(values: list[float]) -> str:
    """Mean and half width of the 95 % interval of Student's t."""
    half = T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


if __name__ == "__main__":
    sys.exit(main())
