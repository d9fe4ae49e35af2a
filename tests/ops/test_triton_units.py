"""The Triton launchers of the fused units. Their kernels are those of test_triton_blocks.py."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from spos_fast.ops.dispatch import OPS
from tests.ops.interpreter import run_interpreted

LAUNCHERS = {
    "blocks": ["bn_act_cat", "bn_act_cat_backward", "dw_bnstats", "dw_bnstats_backward", "pw_bnstats",
               "pw_bnstats_backward"],
    "units": ["shuffle_unit", "shuffle_unit_backward", "shuffle_unit_infer", "xception_unit",
              "xception_unit_backward", "xception_unit_infer"],
}  # fmt: skip


@pytest.mark.timeout(1200)
def test_interpreted() -> None:
    """Values, slices, widths, layouts, repeatability, no synchronisation: all of interpreted_units.py."""
    run_interpreted("interpreted_units.py")


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in LAUNCHERS.items() for name in names])
def test_launchers_take_the_schemas_arguments(module: str, name: str) -> None:
    """The dispatcher calls a launcher with positional arguments and leaves out those that equal their defaults."""
    import importlib

    launcher = getattr(importlib.import_module(f"spos_fast.kernels.{module}"), name)
    parameters = inspect.signature(launcher).parameters.values()
    schema = OPS[name].overload._schema.arguments
    assert [p.name for p in parameters] == [argument.name for argument in schema]
    for parameter, argument in zip(parameters, schema, strict=True):
        default = inspect.Parameter.empty if not argument.has_default_value() else argument.default_value
        assert parameter.default == default, parameter.name


# The launchers as they run on a GPU, up to the launch itself.
COMPILE_ONLY = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

driver.set_active(Driver())
compiled, run = set(), JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: compiled.add(run(self, *a, grid=grid, warmup=True, **k).hash)

from spos_fast.kernels import units
from tests.ops.interpreted_units import given, Sizes
counts = []
for mid in (64, 40, 48):
    for rows in (14, 9):
        x, *rest = given("shuffle_unit", Sizes(2, 128, rows, rows, 64, mid, 64, 3), torch.float16)
        out, *saved = units.shuffle_unit(x, *rest)
        units.shuffle_unit_backward(out, x, *saved, *rest)
        counts.append(len(compiled))
assert counts[0] > 10 and len(set(counts)) == 1, counts
"""


@pytest.mark.timeout(600)
def test_other_sizes_are_not_compiled_again() -> None:
    """Units of other widths and images of other sizes run the same code; sizes are no part of it."""
    environment = {**os.environ, "SPOS_FAST_BACKEND": "reference"}
    environment.pop("TRITON_INTERPRET", None)
    code = subprocess.run([sys.executable, "-c", COMPILE_ONLY], env=environment, capture_output=True, text=True)
    assert code.returncode == 0, code.stderr
