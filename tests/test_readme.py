"""What the README shows runs as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spos_fast.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path):
    """Word for word, in a fresh interpreter and another folder; its network learns."""
    (example,) = _blocks("python")
    assert len(example.strip().splitlines()) <= 18
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0.9


@pytest.mark.parametrize("line", [line for block in _blocks("sh") for line in block.splitlines() if line.strip()])
def test_every_command_exists(line):
    """Every flag of every ``spos-fast`` line is known, every make target is there."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert words[0] == "spos-fast"
        _parser().parse_args(words[1:])


def test_links_lead_somewhere():
    """Files that the README and the docs point to are there."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)  # code has brackets too
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
