"""The Triton launchers of the fused units. Their kernels are those of test_triton_blocks.py."""

from __future__ import annotations

import inspect

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
