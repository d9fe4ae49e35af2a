"""Hands the native build to CMake; everything else is in pyproject.toml."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# `setup.py develop` runs pip, and pip would build in a fresh environment that has no torch in it.
os.environ.setdefault("PIP_NO_BUILD_ISOLATION", "0")  # pip's spelling of "no build isolation"

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str | None:
    """The path of a command, also one that pip put beside a Python that is not on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def stop(message: str) -> NoReturn:
    """End the build with one line, not with a traceback."""
    raise SystemExit(f"spos_fast: {message}")


def summary(build_info: Path) -> str:
    """The line that CMake wrote: what was built, and what was left out."""
    return f"spos_fast: {json.loads(build_info.read_text())['summary']}"


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, into the source tree or into the wheel."""

    def run(self) -> None:
        """Leave one line on what was built and what was left out, or one on why nothing could be."""
        if importlib.util.find_spec("torch") is None:
            stop("torch >= 2.11 must be installed first; then use pip install --no-build-isolation")
        cmake = tool("cmake") or stop("cmake >= 3.25 was not found: pip install cmake")
        compiler = os.environ.get("CXX", "c++ or g++ or clang++")
        if not any(map(tool, compiler.split(" or "))):
            stop(f"no C++ compiler was found (looked for {compiler}); install one or set CXX")

        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        ninja = tool("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for name, default in (("SPOS_FAST_CUDA", "auto"), ("SPOS_FAST_CUDA_ARCHITECTURES", "")):
            configure.append(f"-D{name}={os.environ.get(name, default)}")
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_GENERATOR:INTERNAL={'Ninja' if ninja else 'Unix'}" not in cache.read_text():
            configure.append("--fresh")  # made with another generator, which CMake refuses
        jobs = str(len(os.sched_getaffinity(0)))
        compile_all = [cmake, "--build", str(build), "-j", jobs]
        install = [cmake, "--install", str(build), "--prefix", str(prefix)]
        for command in (configure, compile_all, install):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                stop(f"the native build failed in '{' '.join(command[:3])} ...' (exit {error.returncode}); see above")
        print(summary(build / "build_info.json"))

    def get_outputs(self) -> list[str]:
        """CMake installs the files; setuptools only packs what it finds."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """See get_outputs."""
        return {}


setup(
    packages=[*find_packages(include=["spos_fast", "spos_fast.*"]), "spos_fast.kernels"],
    package_dir={"spos_fast.kernels": "kernels/triton"},
    ext_modules=[Extension("spos_fast._cells", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

if "develop" in sys.argv[1:]:  # pip, which did the work, hides what the build says
    print(summary(ROOT / "spos_fast" / "_generated_build" / "build_info.json"))
