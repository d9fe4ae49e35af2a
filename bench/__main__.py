"""``python -m bench``: measure, print the table, write ``bench/results/<device>-<date>.json``.

    python -m bench                       everything, torch.compile peers too (they take a while to build)
    python -m bench --only "unit train" --no-compile     some cases, printed only
    python -m bench.table                 the tables of README and docs/performance.md from the committed results

First the tests that the cases name are run: what is red gets no ratio.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import environment, registry, run, table, verify

RESULTS = environment.ROOT / "bench" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a case is not green, 2 for wrong arguments, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--only", metavar="WORDS", action="append", help="cases whose name holds all these words; may be repeated"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile peers out")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per case (default %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds after which no further case is begun")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument(
        "--junit",
        type=Path,
        action="append",
        help="pytest's JUnit file of a run on this machine; the tests are not run again then",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the file (default {RESULTS.relative_to(environment.ROOT)}; with --only: none)",
    )
    parser.add_argument("--list", action="store_true", help="only list the cases")
    options = parser.parse_args(arguments)
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda; torch finds no CUDA device here")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads: got {options.threads}; expected 1 or more")
        torch.set_num_threads(options.threads)
    for report in options.junit or []:
        if not report.is_file():
            parser.error(f"--junit: there is no file {report}")
        newer = verify.older_than_code(report)
        if newer is not None:
            parser.error(f"--junit: {report} is older than {newer}; run the tests again")
    chosen = [case for case in registry.cases(kind) if _wanted(case.name, options.only)]
    if not chosen:
        parser.error(f"--only: no case's name holds {' or '.join(map(repr, options.only))}; see --list")
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    folder = options.out or (None if options.only else RESULTS)
    tests = {test for case in chosen for test in case.tests}
    if not options.junit:
        print(f"running the tests of {len(chosen)} cases first ...", flush=True)
    verdicts = verify.verdicts(options.junit, tests) if options.junit else verify.run_tests(tests)
    latest: dict[str, Any] = {}

    def on_case(record: dict[str, Any], case: dict[str, Any]) -> None:
        latest.update(record)
        print(table.line(case), flush=True)
        if folder is not None:
            run.write(record, folder, complete=False)

    try:
        record = run.run(
            chosen,
            torch.device(kind),
            verdicts,
            compiled=not options.no_compile,
            seconds=options.seconds,
            budget=options.budget,
            on_case=on_case,
        )
    except KeyboardInterrupt:
        if latest:
            print(f"\n{table.full(latest)}", flush=True)
        kept = f"; what was measured is in {run.write(latest, folder, complete=False)}" if latest and folder else ""
        print(f"\ninterrupted{kept}", file=sys.stderr)
        return 130
    print(f"\n{table.full(record)}")
    if folder is not None:
        print(f"written: {run.write(record, folder, complete=True)}")
    red = [case["name"] for case in record["cases"] if case["verdict"] not in (run.GREEN, run.NO_KERNEL)]
    return 1 if red else 0


def _wanted(name: str, filters: list[str] | None) -> bool:
    return not filters or any(all(word in name for word in words.split()) for words in filters)


if __name__ == "__main__":
    sys.exit(main())
