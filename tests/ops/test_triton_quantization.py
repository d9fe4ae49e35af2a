"""The quantization ops' Triton kernels: interpreted, and as the compiler makes them without a GPU."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from spos_fast.ops.dispatch import OPS  # noqa: E402
from tests.ops.interpreter import run_interpreted  # noqa: E402
from tests.ops.test_batchnorm_device import resource_usage  # noqa: E402

LAUNCHERS = {
    "quantization": ["fake_quant", "fake_quant_backward"],
    "quantize_codes": ["quantize_codes", "quantize_codes_backward"],
}
# Pointers that hold x's dtype, and the other ones that do not hold float32.
IMAGES = {"x", "out", "grad", "grad_x", "bias"}
INTEGERS = {
    "bits": "*i32", "index": "*i64", "codes": "*u8", "weight": "*i8", "sums": "*i32", "act_bits": "*i32",
    "act_index": "*i64", "weight_bits": "*i32", "weight_index": "*i64",
}  # fmt: skip
FLOATS = {"step", "offset", "scale", "shift", "partial", "of_step", "grad_step", "grad_offset", "step_used"}
VARIANTS = [
    ("fake_quant_kernel", {"PACT": False, "SIGNED": True, "RUNS": True}, (1024, 1)),
    ("fake_quant_kernel", {"PACT": True, "SIGNED": False, "RUNS": False, "offset": None}, (16, 64)),
    ("fake_quant_backward_kernel", {"PACT": False, "RESIDUAL": True, "SIGNED": True, "RUNS": True}, (1024, 1)),
    ("fake_quant_backward_kernel", {"PACT": True, "RESIDUAL": True, "SIGNED": False, "RUNS": False}, (16, 64)),
    ("quantize_codes_kernel", {"PACT": True}, (16, 64)),
    ("quantize_codes_kernel", {"PACT": False, "scale": None, "shift": None}, (64, 16)),
    ("quantize_codes_backward_kernel", {"PACT": True, "RESIDUAL": True}, (16, 64)),
]
# Of 65536 a processor, what leaves room for six programs of 4 warps; backwards, with two images to read, for five.
MOST_REGISTERS = {False: 85, True: 102}


@pytest.mark.timeout(600)
def test_interpreted() -> None:
    """Values, layouts, ties, NaN, no synchronisation: all of interpreted_quantization.py."""
    run_interpreted("interpreted_quantization.py")


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in LAUNCHERS.items() for name in names])
def test_launchers_take_the_schemas_arguments(module: str, name: str) -> None:
    """The dispatcher calls a launcher with positional arguments."""
    launcher = getattr(importlib.import_module(f"spos_fast.kernels.{module}"), name)
    assert list(inspect.signature(launcher).parameters) == [a.name for a in OPS[name].overload._schema.arguments]


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], architecture: int, **options: int) -> Any:
    """The kernel compiled ahead of time. All pointers are aligned, as torch's are; sizes have no known divisor."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in constants:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
        elif name in IMAGES or name in INTEGERS or name in FLOATS:
            signature[name] = f"*{dtype}" if name in IMAGES else INTEGERS.get(name, "*fp32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            # Another size must not mean another compilation.
            assert parameter.do_not_specialize, (kernel.fn.__name__, name)
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(result: Any, folder: Path) -> tuple[int, int]:
    """Registers a thread, and bytes of stack."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    ((_, registers, stack),) = resource_usage(cubin)
    return registers, stack


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp32"), (80, "bf16"), (90, "fp32"), (90, "fp16")])
def test_compiles_within_budget(architecture: int, dtype: str, tmp_path: Path) -> None:
    """Few registers, no spills; quotients are rounded to nearest, as in CUDA and PyTorch, not approximated."""
    import triton.language as tl

    from spos_fast.kernels import quantization, quantize_codes

    for name, settings, (items, channels) in VARIANTS:
        constants = settings | {"WIDE": tl.float32, "BLOCK_ITEMS": items, "BLOCK_CHANNELS": channels}
        module = quantize_codes if name.startswith("quantize_codes") else quantization
        result = compiled(getattr(module, name), dtype, constants, architecture)
        registers, stack = usage(result, tmp_path)
        most = MOST_REGISTERS["backward" in name]
        assert registers <= most and stack == 0, (name, settings, registers, stack)
        assert "div.rn.f32" in result.asm["ptx"] and "div.full" not in result.asm["ptx"]
    finish = {"PACT": False, "SIGNED": True, "BLOCK_CHUNKS": 32, "BLOCK_CHANNELS": 16}
    registers, stack = usage(compiled(quantization.finish_kernel, dtype, finish, architecture), tmp_path)
    assert registers <= 128 and stack == 0
