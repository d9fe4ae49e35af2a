"""What docs/drop-in.md and docs/mixed_precision.md show runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize(("page", "snippets", "checks"), [("drop-in", 14, 12), ("mixed_precision", 1, 1)])
def test_the_page_runs(tmp_path, page, snippets, checks):
    """All snippets, word for word and one after another, in a fresh interpreter and another folder: their own checks
    hold, and nothing warns of misuse."""
    found = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(found) == snippets
    assert sum(snippet.count("assert") for snippet in found) == checks
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(found)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
