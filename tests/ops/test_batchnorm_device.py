"""The device kernels of bn_moments where no GPU is at hand: what the compilers make of them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

BUNDLED = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "cuda"
# At 256 threads a block, three blocks a processor: 65536 / 768 registers, and nothing in local memory.
MOST_REGISTERS = 85


def resource_usage(file: Path) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes of stack) for every kernel and architecture in a cubin or a library."""
    tool = BUNDLED / "cuobjdump"
    if not tool.is_file():
        pytest.skip("triton bundles no cuobjdump here")
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    return [(name, int(used), int(stack)) for name, used, stack in found]


@pytest.mark.parametrize("architecture", [80, 90])
def test_triton_compiles_within_budget(architecture: int, tmp_path: Path) -> None:
    """All Triton kernels compile ahead of time for sm_80 and sm_90, with few registers and no spills."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spos_fast.kernels import batchnorm

    def usage(kernel: Any, types: list[str], constants: dict[str, Any]) -> tuple[int, int]:
        free = [name for name in kernel.arg_names if name not in constants]
        signature = dict(zip(free, types, strict=True)) | dict.fromkeys(constants, "constexpr")
        # As at run time: torch's pointers are aligned, and so are most sizes and strides.
        aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in free}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ((_, used, stack),) = resource_usage(cubin)
        return used, stack

    for dtype in ("fp32", "fp16", "bf16"):
        for channels_last in (True, False):
            pixels, channels = batchnorm.tile_shape(channels_last, 196, 320)
            unit = "channel_stride" if channels_last else "pixel_stride"  # a stride of one is known when compiling
            constants = {unit: 1, "BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": channels, "WIDE": tl.float32}
            used, stack = usage(batchnorm.moments_of_chunk, [f"*{dtype}", "*fp32", *["i32"] * 6], constants)
            assert used <= MOST_REGISTERS and stack == 0, (dtype, channels_last, used, stack)
            constants |= {f"out_{unit}": 1, "RELU": True}
            types = [f"*{dtype}", "*fp32", "*fp32", f"*{dtype}", *["i32"] * 7]
            used, stack = usage(batchnorm.normalize_kernel, types, constants)
            assert used <= MOST_REGISTERS and stack == 0, (dtype, channels_last, used, stack)
    constants = {"BLOCK_CHUNKS": 16, "BLOCK_CHANNELS": 32}
    used, stack = usage(batchnorm.merge_chunks, ["*fp32", "*fp32", "*fp32", *["i32"] * 4], constants)
    assert used <= 128 and stack == 0, (used, stack)


def test_cuda_stays_within_budget() -> None:
    """What nvcc built into the library: every bn_moments kernel, for every architecture, within the budget."""
    from spos_fast import native

    if not native.build_info()["cuda"]:
        pytest.skip(f"no CUDA code was built: {native.build_info()['summary']}")
    usage = resource_usage(native.OPS_LIBRARY)
    walks = [kernel for kernel in usage if "moments_of_" in kernel[0]]
    merges = [kernel for kernel in usage if "merge_chunks" in kernel[0]]
    assert len({name for name, _, _ in walks}) == 16  # 4 dtypes x 2 layouts x 2 load widths
    for name, used, stack in walks:
        assert used <= MOST_REGISTERS and stack == 0, (name, used, stack)
    for name, used, stack in merges:  # short and small: few blocks anyway
        assert used <= 128 and stack == 0, (name, used, stack)
