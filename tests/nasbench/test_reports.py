"""The reports and their commands: whole pages, what is missing is said, mistakes are one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spos_fast.analysis.nasbench_report import page, write_statistics
from spos_fast.cli import main
from spos_fast.nasbench.results import CellResults

SECTIONS = (
    "How good cells are",
    "Training, validation and test",
    "What accuracy costs",
    "Operations",
    "Depth and width",
    "Locality",
    "Short budgets as a guide to long ones",
)


def check_page(html: str) -> None:
    """One file: nothing to load, no scripts, no element id twice, all sections there."""
    assert html.startswith("<!DOCTYPE html>")
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!#|data:|https://arxiv\.org/)', html)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert [title for title in re.findall(r"<h2>([^<]*)</h2>", html)] == list(SECTIONS)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL).lower().replace("finance", "")


def test_full_file(small_space: CellResults) -> None:
    """With test accuracies and repeats nothing but completeness is missing, and the same input gives the same page."""
    html = page(small_space, walks=200)
    check_page(html)
    assert "Not in this file" not in html
    assert html.count('role="img"') >= 13
    assert page(small_space, walks=200) == html


def test_sample(sample: CellResults, tmp_path: Path) -> None:
    """The page on the published sample says what it cannot show, how many cells and pairs figures rest on, and has the
    recorded median."""
    path = write_statistics(sample, tmp_path / "out" / "report.html", walks=1000)
    html = path.read_text()
    check_page(html)
    assert "It holds no test accuracy" in html
    assert "It holds one training of each cell" in html
    assert "It holds no training time for 4, 12 and 36 epochs" in html
    assert html.count("Not in this file") == 2
    assert "91.62%" in html
    assert "3,422 for conv3x3 to conv1x1" in html
    assert len(html) < 1_000_000


def test_commands(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """stats and search run on an official tfrecord from the command line and write what they say."""
    source = shared_data / "nasbench101" / "mini_only108_53cells.tfrecord"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    assert main(["nasbench", "stats", str(source), "--out", str(tmp_path / "stats.html"), "--walks", "53"]) == 0
    html = (tmp_path / "stats.html").read_text()
    assert [title for title in re.findall(r"<h2>([^<]*)</h2>", html)] == list(SECTIONS)
    assert "It holds 108 epochs only" in html
    command = ["nasbench", "search", str(source), "--runs", "5", "--budget", "50000"]
    assert main([*command, "--out", str(tmp_path / "s.html"), "--json", str(tmp_path / "s.json")]) == 0
    said = capsys.readouterr().out
    assert "Median test regret" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.html", "s.json", "stats.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere.tfrecord"], "nowhere.tfrecord: could not be read"),
        (["search", "nowhere.csv"], "nowhere.csv: could not be read"),
        (["stats", "nowhere", "--walks", "0"], "--walks: got 0; expected 1 or more"),
        (["search", "nowhere", "--runs", "0"], "--runs: got 0; expected 1 or more"),
        (["search", "nowhere", "--budget", "nan"], "--budget: got nan; expected 1 or more"),
        (["search", "nowhere", "--seed", "-1"], "--seed: got -1; expected 0 or more"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main(["nasbench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["stats", "SOURCE", "--out"], ["search", "SOURCE", "--out"], ["search", "SOURCE", "--json"]]
)
@pytest.mark.parametrize("blocked", ["a folder", "a folder that is a file"])
def test_an_unwritable_output_is_refused_before_the_work(
    arguments: list[str], blocked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the source is even read (it is not there), with one line that names the output; nothing is written."""
    (tmp_path / "file").write_text("kept")
    out = tmp_path if blocked == "a folder" else tmp_path / "file" / "report.html"
    assert main(["nasbench", *arguments, str(out)]) == 2
    error = capsys.readouterr().err
    said = "is no regular file" if blocked == "a folder" else "could not be written"
    assert f"{out}: {said}" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_no_torch() -> None:
    """The reports and the searches load without torch."""
    code = (
        "import sys, spos_fast.analysis.nasbench_report, spos_fast.analysis.nasbench_search_report; "
        "import spos_fast.nasbench.api; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
