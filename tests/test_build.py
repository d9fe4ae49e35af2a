"""What the native build left behind, and that it runs on other torches than the one it was built with."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spos_fast import native

ROOT = Path(__file__).resolve().parents[1]


def symbols(*flags: str) -> list[str]:
    """Lines of nm -D on the ops library."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    if not native.OPS_LIBRARY.is_file():
        pytest.skip("the ops library was not built")
    command = ["nm", "-D", *flags, str(native.OPS_LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_only_the_stable_abi_is_needed() -> None:
    """No C++ symbol of torch, which would tie the file to one release, and no strong one of its CUDA half."""
    needed = [line.split() for line in symbols("--undefined-only")]
    strong = [name for kind, name in needed if kind == "U"]
    assert not [name for name in strong if re.match(r"_ZN?K?(3c10|2at|5torch)", name)]
    assert not [name for name in strong if re.search(r"cuda_(stream|check|guard|blas)|^cuda|^cu[A-Z]", name)]
    assert not [name for name in strong if re.search(r"Py[A-Z_]", name)], "the ops library must serve any Python"
    if native.build_info()["cuda"]:
        assert ["w", "aoti_torch_get_current_cuda_stream"] in needed


def test_only_the_entry_point_is_exported() -> None:
    """Everything of ours but the one entry point stays inside, so that nothing can clash with another library."""
    exported = [line.split()[-1] for line in symbols("--defined-only")]
    assert [name for name in exported if "spos" in name] == ["spos_fast_register_kernel"]


def test_libtorch_is_named_as_needed() -> None:
    """Only through DT_NEEDED does the weak stream symbol resolve where torch has CUDA."""
    if shutil.which("readelf") is None or not native.OPS_LIBRARY.is_file():
        pytest.skip("readelf is not installed, or the ops library was not built")
    dynamic = subprocess.run(["readelf", "-d", native.OPS_LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name or "c10" in name]


def test_code_for_ampere_and_hopper() -> None:
    """Where CUDA was built, machine code for sm_80 and sm_90 is inside."""
    if not native.build_info()["cuda"]:
        pytest.skip(f"no CUDA code was built: {native.build_info()['summary']}")
    triton = pytest.importorskip("triton", reason="triton, whose cuobjdump this needs, is not installed")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("triton bundles no cuobjdump here")
    listed = subprocess.run([tool, "-lelf", native.OPS_LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "sm_80" in listed and "sm_90" in listed


def test_the_build_says_what_it_made() -> None:
    """One line names what was built and what was left out; it agrees with explain()."""
    info = native.build_info()
    assert "\n" not in info["summary"]
    if "torch" not in info:
        pytest.skip(info["summary"])
    assert re.match(r"built cells.*; left out ", info["summary"])
    json.dumps(info)
    from spos_fast import ops

    assert info["summary"] in ops.explain()


@pytest.mark.parametrize("module", ["spos_fast", "spos_fast.native", "spos_fast.nasbench"])
def test_no_torch_at_import(module: str) -> None:
    """These modules load without torch, for scripts that only look things up."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_triton_kernels_are_installed() -> None:
    """kernels/triton is importable as spos_fast.kernels, from any folder."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = "import spos_fast.kernels.batchnorm as b; print(b.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr


def test_native_code_is_formatted() -> None:
    """C++ and CUDA sources are as clang-format leaves them."""
    tool = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or shutil.which("clang-format")
    if tool is None:
        pytest.skip("clang-format is not installed")
    endings = {".h", ".cpp", ".cu", ".cuh"}
    sources = [p for top in ("csrc", "kernels", "tests/csrc") for p in (ROOT / top).rglob("*") if p.suffix in endings]
    assert sources
    result = subprocess.run([tool, "--dry-run", "-Werror", *sources], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_wheels_hold_every_data_file():
    """Presets and style sheets are package data: what no pattern names is missing from an installed wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    patterns = re.findall(r'"([^"]+)"', text.split('"*" = [')[1].split("]")[0])
    package = ROOT / "spos_fast"
    folders = {path.parent for path in package.rglob("__init__.py")}
    for path in package.rglob("*"):
        if path.suffix not in (".toml", ".css", ".html", ".json"):
            continue
        covered = [path.relative_to(folder) for folder in folders if folder in path.parents]
        assert any(name.match(pattern) and len(name.parts) == pattern.count("/") + 1
                   for name in covered for pattern in patterns) or "_generated_build" in path.parts, path  # fmt: skip
