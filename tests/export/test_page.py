"""What docs/export.md shows runs as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spos_fast.cli import _parser

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()


def test_the_page_runs(tmp_path):
    """All snippets, word for word and one after another, in a fresh interpreter and another folder."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'spos-fast[export]' onnxruntime")
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 2
    assert sum(snippet.count("assert") for snippet in snippets) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


def test_every_command_exists():
    """Every flag of every line is known."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines():
        words = shlex.split(line)
        assert words[0] == "spos-fast"
        _parser().parse_args(words[1:])
