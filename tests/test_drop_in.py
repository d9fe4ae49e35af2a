"""What docs/drop-in.md shows runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "drop-in.md"


def test_the_page_runs(tmp_path):
    """All snippets, word for word and one after another, in a fresh interpreter and another folder: their own checks
    hold, and nothing warns of misuse."""
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) == 14
    assert sum(snippet.count("assert") for snippet in snippets) == 12
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(snippets)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
