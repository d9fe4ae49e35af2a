"""The gate: no ratio to a peer is shown for a case whose correctness tests are red or were not run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

from bench.environment import ROOT


def run_tests(targets: Iterable[str], report: Path | None = None) -> dict[str, str]:
    """Run pytest once on all targets and give the verdict of each: ``"green"``, ``"red"`` or ``"not run"``.

    Args:
        targets: files, folders or node ids below the repository.
        report: where pytest's JUnit file is kept; default nowhere.
    """
    wanted = sorted(set(targets))
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = report or Path(folder) / "junit.xml"
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junit-xml={file}"]
        command = [sys.executable, "-m", "pytest", *options, *wanted]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 1):  # stopped on the way: what did run says little
            return dict.fromkeys(wanted, "not run")
        return verdicts([file], wanted)


def verdicts(reports: Iterable[Path], targets: Iterable[str]) -> dict[str, str]:
    """Verdicts on the targets from JUnit files of whole pytest runs (no ``-k``, not stopped on the way).

    Green needs at least one test that passed and none that failed. A missing or broken file counts as empty, a target
    without tests is ``"not run"``.
    """
    tests: list[ElementTree.Element] = []
    for report in reports:
        with contextlib.suppress(OSError, ElementTree.ParseError):
            tests += ElementTree.parse(report).iter("testcase")
    return {target: _verdict(target, tests) for target in targets}


def older_than_code(report: Path) -> Path | None:
    """A file of the code or the tests that was changed after the report was written; None if there is none."""
    written = report.stat().st_mtime
    for folder in ("spos_fast", "tests", "kernels"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".so") and file.stat().st_mtime > written:
                return file.relative_to(ROOT)
    return None


def _verdict(target: str, tests: list[ElementTree.Element]) -> str:
    path, _, node = target.partition("::")
    module = path.removesuffix(".py").replace("/", ".")
    passed = 0
    for test in tests:
        place, name = test.get("classname", ""), test.get("name", "")
        # An error while collecting is a test case without a class, named after the module.
        for where in (place, name if not place else ""):
            if where != module and not where.startswith(f"{module}."):
                continue
            if node and where == place and name.partition("[")[0] != node.rpartition("::")[2].partition("[")[0]:
                continue
            if test.find("failure") is not None or test.find("error") is not None:
                return "red"
            passed += test.find("skipped") is None
    return "green" if passed else "not run"
