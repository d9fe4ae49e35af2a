"""The Triton kernels of the fused units' building blocks: interpreted, and as the compiler makes them without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from tests.ops.interpreter import run_interpreted  # noqa: E402
from tests.ops.test_batchnorm_device import resource_usage  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Pointers that hold x's dtype; all others hold statistics, or (the widths) int32.
IMAGES = {"x", "z", "weight", "grad", "out", "other", "passed", "residual", "grad_x", "grad_residual"}
STATISTICS = {
    "scale", "shift", "norm", "centre", "mean", "var", "gamma", "beta", "partial", "parts", "out_scale", "out_shift",
    "other_scale", "other_shift", "means", "squares", "pivots", "mean_out", "second_out", "scale_out", "shift_out",
    "sums", "products", "sum_out", "product_out", "norm_out", "residual_scale", "residual_shift", "grad_scale",
    "grad_shift", "grad_residual_scale",
}  # fmt: skip
# Passes forwards are compiled anew for several groups; sizes are the same code.
POINTWISE = [
    ("forward_kernel", {"STEP": 1, "MULTIPLE": 8, "RELU": True, "group_distance": None}),
    ("forward_kernel", {"STEP": 2, "MULTIPLE": 1, "RELU": True}),
    ("data_gradient_kernel", {"STEP": 1, "MULTIPLE": 1, "RELU": True, "IN_RELU": True}),
    ("data_gradient_kernel", {"STEP": 2, "MULTIPLE": 8, "RELU": False, "IN_RELU": False, "passed": "image"}),
    ("weight_gradient_kernel", {"STEP": 2, "MULTIPLE": 1, "RELU": True, "IN_RELU": True}),
]
DEPTHWISE = [
    ("forward_kernel", {"K": 3, "STRIDE": 1, "MULTIPLE": 4, "RELU": True, "group_distance": None}),
    ("forward_kernel", {"K": 7, "STRIDE": 2, "MULTIPLE": 1, "RELU": True}),
    ("data_gradient_kernel", {"K": 5, "STRIDE": 1, "MULTIPLE": 4, "RELU": True, "IN_RELU": True}),
    ("data_gradient_kernel", {"K": 7, "STRIDE": 2, "MULTIPLE": 1, "RELU": True, "IN_RELU": True}),
    ("weight_gradient_kernel", {"K": 7, "STRIDE": 1, "MULTIPLE": 4, "RELU": True, "IN_RELU": True}),
]
OTHERS = [
    ("concatenate_kernel", {"STEP": 2, "MULTIPLE": 8, "RELU": True, "other_scale": None, "other_shift": None}),
    ("concatenate_kernel", {"STEP": 1, "MULTIPLE": 1, "RELU": True, "group_distance": None}),
    ("sums_kernel", {"MULTIPLE": 1, "RELU": True}),
]
PLAIN = {"residual_scale": None}  # a shortcut without a batch norm
ADD_RELU = [
    ("add_relu_kernel", {"MULTIPLE": 8}),
    ("add_relu_kernel", {"MULTIPLE": 1, "group_distance": None, "residual_shift": None} | PLAIN),
    ("add_relu_backward_kernel", {"MULTIPLE": 8}),
    ("add_relu_backward_kernel", {"MULTIPLE": 1, "group_distance": None, "residual": None} | PLAIN),
]
MERGING = ["moments_kernel", "sums_kernel", "weight_kernel", "scale_shift_kernel"]


@pytest.mark.timeout(900)
def test_interpreted() -> None:
    """Values, slices, widths, repeatability: all of interpreted_blocks.py."""
    run_interpreted("interpreted_blocks.py")


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], architecture: int, options: dict[str, int]) -> Any:
    """The kernel compiled ahead of time. All pointers are aligned, as torch's are; sizes have no known divisor."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if constants.get(name, "image") != "image" or parameter.is_constexpr or constants.get(name, 0) is None:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
        elif name in IMAGES or name in STATISTICS or name.startswith("width_") or name == "channels_used":
            signature[name] = f"*{dtype}" if name in IMAGES else "*fp32" if name in STATISTICS else "*i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            # Another size must not mean another compilation.
            assert parameter.do_not_specialize, (kernel.fn.__name__, name)
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def assert_within_budget(result: Any, folder: Path) -> None:
    """At most 255 registers a thread and nothing in local memory."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    ((name, registers, stack),) = resource_usage(cubin)
    assert registers <= 255 and stack == 0, (name, registers, stack)
    assert result.metadata.shared <= 48 << 10


def wide(dtype: str) -> dict[str, Any]:
    """The dtype that kernels for x's dtype count in."""
    import triton.language as tl

    assert dtype in DTYPES
    return {"WIDE": tl.float32}


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp32"), (80, "bf16"), (90, "fp32"), (90, "fp16")])
def test_pointwise_compiles_within_budget(architecture: int, dtype: str, tmp_path: Path) -> None:
    """1x1 convolutions: no spills; halves on the tensor cores, float32 never (they would round it to TF32).

    Where 8 divides the sizes, values are loaded and stored 16 bytes at a time, also with a width in device memory.
    """
    from spos_fast.kernels import pointwise

    x = torch.empty(0, dtype=DTYPES[dtype])
    rows, columns, depth = pointwise.blocks(x, 160)
    tiles = {
        "forward_kernel": {"BLOCK_PIXELS": rows, "BLOCK_IN": depth, "BLOCK_OUT": columns},
        "data_gradient_kernel": {"BLOCK_PIXELS": rows // 2, "BLOCK_IN": columns, "BLOCK_OUT": depth},
        "weight_gradient_kernel": {"BLOCK_PIXELS": depth, "BLOCK_IN": columns, "BLOCK_OUT": columns},
    }
    for name, settings in POINTWISE:
        absent = {"out_scale": None, "out_shift": None, "OUT_RELU": False, "passed": None}
        constants = absent | settings | tiles[name] | wide(dtype)
        result = compiled(getattr(pointwise, name), dtype, constants, architecture, pointwise.options(x))
        assert_within_budget(result, tmp_path)
        ptx = result.asm["ptx"]
        assert bool(re.search(r"\bw?g?mma", ptx)) == (dtype != "fp32")
        if settings["MULTIPLE"] == 8:
            assert "st.global.v4.b32" in ptx and ("cp.async.cg" in ptx or "ld.global.v4.b32" in ptx)


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp32"), (90, "fp16")])
def test_other_kernels_compile_within_budget(architecture: int, dtype: str, tmp_path: Path) -> None:
    """Depthwise convolutions and the ends of units, for every kind of argument: no spills."""
    from spos_fast.kernels import concatenation, depthwise

    for module, kernels in ((depthwise, DEPTHWISE), (concatenation, OTHERS)):
        tile = {"BLOCK_PIXELS": module.PIXELS, "BLOCK_CHANNELS": module.CHANNELS}
        for name, settings in kernels:
            constants = {"out_scale": None, "out_shift": None} | settings | tile | wide(dtype)
            options = depthwise.OPTIONS if module is depthwise else {}
            assert_within_budget(compiled(getattr(module, name), dtype, constants, architecture, options), tmp_path)


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp32"), (80, "bf16"), (90, "fp32"), (90, "fp16")])
def test_add_relu_compiles_within_budget(architecture: int, dtype: str, tmp_path: Path) -> None:
    """The end of a residual block: few enough registers for five programs of 4 warps, no spills, and 16 bytes at a time
    where 8 divides the channels."""
    from spos_fast.kernels import bn_add_relu

    cubin = tmp_path / "kernel.cubin"
    tile = {"BLOCK_PIXELS": bn_add_relu.PIXELS, "BLOCK_CHANNELS": bn_add_relu.CHANNELS}
    for name, settings in ADD_RELU:
        result = compiled(getattr(bn_add_relu, name), dtype, settings | tile | wide(dtype), architecture, {})
        cubin.write_bytes(result.asm["cubin"])
        ((_, registers, stack),) = resource_usage(cubin)
        assert registers <= 102 and stack == 0, (name, settings, registers, stack)
        if settings["MULTIPLE"] == 8:
            ptx = result.asm["ptx"]
            assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    tile = {"BLOCK_CHUNKS": bn_add_relu.FINISH_CHUNKS, "BLOCK_CHANNELS": bn_add_relu.FINISH_CHANNELS}
    cubin.write_bytes(compiled(bn_add_relu.finish_kernel, dtype, tile, architecture, {}).asm["cubin"])
    ((_, registers, stack),) = resource_usage(cubin)
    assert registers <= 128 and stack == 0


@pytest.mark.parametrize("name", MERGING)
def test_second_stages_compile_within_budget(name: str, tmp_path: Path) -> None:
    """The small launches between two passes: few registers, for their programs are few and wait on one another."""
    from spos_fast.kernels import merging

    tile = {"CHUNKS": merging.CHUNKS, "CHANNELS": merging.CHANNELS, "BLOCK": 256, "EPS": 1e-5}
    if name == "scale_shift_kernel":
        tile["CHANNELS"] = 256
    result = compiled(getattr(merging, name), "fp16", tile | {"width": None}, 80, {})
    assert_within_budget(result, tmp_path)
