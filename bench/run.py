"""Measures cases and turns what came out into plain values, lines and a file."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, measure
from bench.peers.compiled import graphed
from bench.registry import OURS, Case, Run, disagreement
from spos_fast.checkpoint import write_whole

GREEN, NO_KERNEL = "green", "no kernel of ours yet"
GRAPH = ", CUDA graph"  # behind the name of a contender that is replayed from one


def measure_case(
    case: Case,
    device: torch.device,
    roof: Mapping[str, Any],
    verdicts: Mapping[str, str],
    *,
    compiled: bool,
    seconds: float,
) -> dict[str, Any]:
    """Everything about one case, as plain values.

    ``ratios`` and ``best_peer`` are there only if every test of the case is green and every peer's outputs agree with
    ours; ``verdict`` says so in words.
    """
    runs, outputs, failed = _build(case, device, compiled)
    verdict = _verdict(case, verdicts)
    if OURS in runs and case.tolerance is not None:
        for name, output in outputs.items():
            difference = disagreement(output, outputs[OURS])
            if difference > case.tolerance:
                verdict = f"red: {name} differs from ours by {difference:.1e}, more than {case.tolerance:.0e}"
    del outputs
    limits = dict(least=5, most=9) if case.slow else dict(least=9, most=400)
    measure.wait_for_quiet()
    watch = measure.OtherWork()
    samples = measure.interleaved(runs, device, seconds=seconds, **limits) if runs else {}
    other_work = watch.share()
    times = {name: measure.spread(values) for name, values in samples.items()}
    fields = ("name", "op", "shape", "dtype", "bytes", "flops", "items", "unit", "headline", "note")
    floor, bound = measure.floor_seconds(case.bytes, case.flops, case.dtype, roof)
    result: dict[str, Any] = {field: getattr(case, field) for field in fields}
    result |= {
        "tests": list(case.tests),
        "verdict": verdict,
        "compile_peers": compiled or not case.has_compile_peers,
        "seconds": times,
        "other_work": other_work,
        "failed": failed,
        "floor_seconds": floor,
        "bound": bound,
        "peak_bytes": {name: _peak_bytes(run) for name, run in runs.items() if device.type == "cuda"},
    }
    ours = min((name for name in times if is_ours(name)), key=lambda name: times[name]["median"], default=None)
    peers = [name for name in times if not is_ours(name)]
    if ours is not None:
        result |= {"ours": ours, "rates": _rates(case, times[ours]["median"], floor)}
        if verdict == GREEN:
            result["ratios"] = {name: measure.ratio(samples[name], samples[ours]) for name in peers}
    if peers:
        result["best_peer"] = min(peers, key=lambda name: times[name]["median"])
    return result


def is_ours(name: str) -> bool:
    """Whether a contender is ours, replayed from a CUDA graph or not."""
    return name in (OURS, OURS + GRAPH)


def _rates(case: Case, seconds: float, floor: float) -> dict[str, float]:
    return {
        "bytes_per_second": case.bytes / seconds,
        "flops_per_second": case.flops / seconds,
        "items_per_second": case.items / seconds,
        "percent_of_roof": 100 * floor / seconds,
    }


def _peak_bytes(run: Run) -> int:
    """Most memory that one run takes beyond what is held before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _build(case: Case, device: torch.device, compiled: bool) -> tuple[dict[str, Run], dict[str, Any], dict[str, str]]:
    """Contenders ready to run, on a GPU each also as a CUDA graph; what each first gave; why others did not work."""
    given = case.inputs(device)
    runs: dict[str, Run] = {}
    outputs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, bind in case.all_contenders(compiled).items():
        try:
            run = bind(given)
            outputs[name] = run()
        except Exception as error:  # a peer that this PyTorch cannot run is news, not the end of the table
            failed[name] = _reason(error)
            continue
        runs[name] = run
        if device.type == "cuda" and case.graphs:
            try:
                runs[name + GRAPH] = graphed(run)
            except Exception as error:
                failed[name + GRAPH] = _reason(error)
    return runs, outputs, failed


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _verdict(case: Case, verdicts: Mapping[str, str]) -> str:
    if OURS not in case.contenders:
        return NO_KERNEL
    if not case.tests:
        return "red: the case names no test"
    for test in case.tests:
        if verdicts.get(test, "not run") != "green":
            return f"{verdicts.get(test, 'not run')}: {test}"
    return GREEN


def run(
    cases: Sequence[Case],
    device: torch.device,
    verdicts: Mapping[str, str],
    *,
    compiled: bool,
    seconds: float,
    budget: float | None = None,
    on_case: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure all cases; the whole record, which :func:`write` takes.

    Args:
        cases: what to measure, in this order.
        device: where.
        verdicts: of the tests, from bench.verify.
        compiled: torch.compile peers too.
        seconds: of timing per case.
        budget: seconds after which no further case is begun; those left out are named in the record.
        on_case: called with the record so far and with what was added, so that nothing is lost.
    """
    started = time.monotonic()
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": environment.describe(device),
        "roofs": measure.roofs(device),
        "cases": [],
        "left_out": [],
    }
    work = [(case, compiled) for case in cases]
    if compiled and budget is not None:
        # First everything without the compilers: what is short of time is then short of those only.
        work = [(case, False) for case in cases] + [(case, True) for case in cases if case.has_compile_peers]
    done: dict[str, dict[str, Any]] = {}
    for case, with_compilers in work:
        if budget is not None and time.monotonic() - started > budget:
            record["left_out"].append(case.name + (", torch.compile" if case.name in done else ""))
            continue
        measured = measure_case(case, device, record["roofs"], verdicts, compiled=with_compilers, seconds=seconds)
        done[case.name] = measured
        record["cases"] = list(done.values())
        if on_case is not None:
            on_case(record, measured)
    return record


def write(record: Mapping[str, Any], folder: Path) -> Path:
    """Write a record as ``<device>-<date>.json``; the file appears whole or not at all."""
    name = f"{environment.slug(record['environment']['device'])}-{record['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / name, (json.dumps(record, indent=1) + "\n").encode())
    return folder / name
