"""Code in fresh interpreters, for what environment variables decide at import: one start, one import of PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# Imports PyTorch, which takes seconds and none of our variables, then forks a child for every job.
_PROGRAM = """
import json, os, sys, tempfile, traceback
import torch

found = []
for code, environment in json.loads(sys.stdin.read()):
    files = [tempfile.TemporaryFile() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        os.environ.update(environment)
        status = 0
        try:
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read().decode())
    found.append([status, *said])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finished:
    """How a job ended."""

    returncode: int
    stdout: str
    stderr: str


def run_fresh(jobs: Sequence[tuple[str, dict[str, str]]]) -> list[Finished]:
    """Run every (code, environment variables) in an interpreter that has imported PyTorch and nothing of ours."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(jobs), capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("SPOS_FAST_")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Finished(*result) for result in json.loads(done.stdout)]
