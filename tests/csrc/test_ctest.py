"""Builds and runs the C++ tests: the cores, and the CUDA sources through the host shim."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_ctest() -> None:
    """Every C++ test passes. They are built where the installed modules were (the same compiler's objects of the same
    sources), or where there is no such folder in one of their own, which compiles everything again."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("cmake", "ctest", "ninja") if shutil.which(tool, path=path) is None]
    if shutil.which(os.environ.get("CXX", "c++"), path=path) is None:
        missing.append("a C++ compiler")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    soabi = sysconfig.get_config_var("SOABI")
    build = ROOT / "build" / f"cmake-{soabi}"  # setup.py's
    options = ["-DSPOS_FAST_TESTS=ON"]
    if not (build / "build.ninja").exists():
        build = ROOT / "build" / f"ctest-{soabi}"
        options += ["-DSPOS_FAST_CUDA=0", f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "PATH": path}

    def run(*command: str) -> None:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]

    run("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options)
    run("cmake", "--build", str(build), "--target", "spos_tests")
    run("ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error")
