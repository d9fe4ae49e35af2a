"""The cases under pytest-benchmark: one group a case, one benchmark a contender.

    pytest bench/ -k bn_moments --benchmark-json out.json
    pytest bench/ -k bn_moments --benchmark-compare

Here every contender is timed by itself, one after the other; ``python -m bench`` times them in turn and is the one to
quote. A contender whose outputs differ from ours fails instead of being timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bench import verify
from bench.registry import OURS, Case, cases, disagreement

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every contender of every case."""
    compiled = metafunc.config.getoption("--compile-peers")
    pairs = [(case, name) for case in cases(DEVICE.type) for name in case.all_contenders(compiled)]
    metafunc.parametrize(("case", "contender"), pairs, ids=[f"{case.name} | {name}" for case, name in pairs])


@functools.lru_cache(maxsize=1)
def _our_outputs(case: Case) -> Any:
    return case.contenders[OURS](case.inputs(DEVICE))()


@functools.lru_cache
def _verdicts(tests: tuple[str, ...]) -> dict[str, str]:
    return verify.run_tests(tests)


@pytest.mark.timeout(1800)
def test_case(case: Case, contender: str, benchmark: Any) -> None:
    """Time one contender; its outputs must be ours.

    pytest-benchmark shows how the benchmarks of a group compare, so peers are timed only where the case's tests are
    green.
    """
    if contender != OURS:
        red = {test: verdict for test, verdict in _verdicts(case.tests).items() if verdict != "green"}
        if red:
            pytest.skip(f"no comparison: {red}")
    run = case.contenders[contender](case.inputs(DEVICE))
    outputs = run()
    if case.tolerance is not None and contender != OURS and OURS in case.contenders:
        convert = case.convert.get(contender, lambda given: given)
        difference = disagreement(convert(outputs), _our_outputs(case))
        assert difference <= case.tolerance, f"{contender} differs from ours by {difference:.1e}"

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, items=case.items)
    if case.slow:
        benchmark.pedantic(timed, rounds=3, warmup_rounds=1)
    else:
        benchmark(timed)
