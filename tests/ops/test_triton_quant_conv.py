"""The Triton kernels of quant_conv2d: interpreted, and as the compiler makes them without a GPU."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from spos_fast.ops.dispatch import OPS, explain  # noqa: E402
from tests.ops.interpreter import run_interpreted  # noqa: E402
from tests.ops.test_triton_quantization import compiled, usage  # noqa: E402


@pytest.mark.timeout(600)
def test_interpreted() -> None:
    """Exact sums, errors, NaN, no synchronisation: all of interpreted_quant_conv.py."""
    run_interpreted("interpreted_quant_conv.py")


def test_launcher_takes_the_schemas_arguments() -> None:
    """The dispatcher calls it with positional arguments."""
    from spos_fast.kernels import quant_conv

    names = [argument.name for argument in OPS["quant_conv2d"].overload._schema.arguments]
    assert list(inspect.signature(quant_conv.quant_conv2d).parameters) == names


def test_explain_says_what_pytorch_does() -> None:
    """Whoever asks learns that convolutions with groups are PyTorch's."""
    row = next(line for line in explain().splitlines() if line.startswith("quant_conv2d ") and " cuda " in line)
    assert "triton" in row and "groups by PyTorch's" in row


@pytest.mark.parametrize(("architecture", "dtype"), [(80, "fp16"), (80, "fp32"), (90, "bf16")])
def test_compiles_within_budget(architecture: int, dtype: str, tmp_path: Path) -> None:
    """No spills; int8 tensor cores; where 16 divides the channels, loads of 16 bytes that run ahead of the product."""
    import triton.language as tl

    from spos_fast.kernels import quant_conv

    for channels, multiple, absent in (
        (64, 16, {"bias": None}),
        (128, 16, {"partial": None, "sums": None}),
        (40, 8, {}),
        (33, 1, {"bias": None}),
    ):
        rows, columns, depth = quant_conv.blocks(channels, channels, multiple)
        tile = {"BLOCK_PIXELS": rows, "BLOCK_OUT": columns, "BLOCK_IN": depth}
        constants = absent | tile | {"MULTIPLE": multiple, "WIDE": tl.float32}
        result = compiled(quant_conv.convolve_kernel, dtype, constants, architecture, **quant_conv.OPTIONS)
        registers, stack = usage(result, tmp_path)
        assert registers <= 255 and stack == 0, (channels, registers, stack)
        assert result.metadata.shared <= 48 << 10
        ptx = result.asm["ptx"]
        assert re.search(r"mma\S*\.s32\.s8\.s8", ptx)
        assert ("cp.async.cg.shared.global" in ptx) == (multiple == 16)
    tile, options = ({k: v for k, v in quant_conv.SUM_OPTIONS.items() if k.isupper() == upper} for upper in (1, 0))
    registers, stack = usage(compiled(quant_conv.sum_codes_kernel, dtype, tile, architecture, **options), tmp_path)
    assert registers <= 255 and stack == 0
