"""Measures cases and turns what came out into plain values and a file."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, measure
from bench.peers.compiled import forget_compiled, graphed
from bench.registry import OURS, Case, Run, disagreement, tensors_of
from spos_fast.checkpoint import write_whole

GREEN, NO_KERNEL = "green", "no kernel of ours yet"
GRAPH = ", CUDA graph"  # behind the name of a contender that is replayed from one
FIELDS = ("name", "op", "shape", "dtype", "bytes", "flops", "items", "unit", "headline", "note")


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

    ``ratios`` and with them the best peer, the one that ours gains least on, are there only if every test of the case
    is green and every peer's outputs agree with ours; ``verdict`` says so in words. Whatever goes wrong becomes a red
    verdict: the other cases are still to come.
    """
    result: dict[str, Any] = {field: getattr(case, field) for field in FIELDS}
    floor, bound = measure.floor_seconds(case.bytes, case.flops, case.dtype, roof)
    result |= {
        "tests": list(case.tests),
        "verdict": _verdict(case, verdicts),
        "compile_peers": compiled or not case.has_compile_peers,
        "floor_seconds": floor,
        "bound": bound,
        "seconds": {},
        "failed": {},
        "other_work": None,
        "peak_bytes": {},
    }
    try:
        runs, wrong = _build(case, device, compiled, result["failed"])
        if wrong and result["verdict"] == GREEN:
            result["verdict"] = f"red: {wrong}"
        if runs:
            _time(case, device, runs, seconds, result)
    except Exception as error:
        result["verdict"] = f"red: {_reason(error)}"
        result.pop("ratios", None)
    return result


def is_ours(name: str) -> bool:
    """Whether a contender is ours, replayed from a CUDA graph or not."""
    return name in (OURS, OURS + GRAPH)


def _time(case: Case, device: torch.device, runs: Mapping[str, Run], seconds: float, result: dict[str, Any]) -> None:
    measure.wait_for_quiet()
    watch = measure.OtherWork()
    limits = dict(least=7, most=9) if case.slow else dict(least=9, most=400)
    samples = measure.interleaved(runs, device, seconds=seconds, **limits)
    times = {name: measure.spread(values) for name, values in samples.items()}
    result |= {"seconds": times, "other_work": watch.share()}
    if device.type == "cuda":
        result["peak_bytes"] = {name: _peak_bytes(run) for name, run in runs.items() if not name.endswith(GRAPH)}
    ours = min((name for name in times if is_ours(name)), key=lambda name: times[name]["median"], default=None)
    peers = [name for name in times if not is_ours(name)]
    if peers:
        result["best_peer"] = min(peers, key=lambda name: times[name]["median"])
    if ours is not None:
        median = times[ours]["median"]
        result["ours"] = ours
        result["rates"] = {
            "bytes_per_second": case.bytes / median,
            "flops_per_second": case.flops / median,
            "items_per_second": case.items / median,
            "percent_of_roof": 100 * result["floor_seconds"] / median,
        }
        if result["verdict"] == GREEN:
            result["ratios"] = {name: measure.ratio(samples[name], samples[ours]) for name in peers}


def _build(case: Case, device: torch.device, compiled: bool, failed: dict[str, str]) -> tuple[dict[str, Run], str]:
    """Contenders ready to run, on a GPU each also as a CUDA graph; and what is wrong with their outputs, or "".

    A contender that this PyTorch cannot run goes to ``failed`` with the reason.
    """
    forget_compiled()
    given = case.inputs(device)
    runs: dict[str, Run] = {}
    ours: Any = None
    wrong = ""
    for name, bind in case.all_contenders(compiled).items():
        try:
            run = bind(given)
            output = run()
        except Exception as error:
            failed[name] = _reason(error)
            if name == OURS:
                wrong = f"{OURS} failed: {failed[name]}"
            continue
        runs[name] = run
        if name == OURS:
            ours = output
        elif case.tolerance is not None and ours is not None:
            difference = disagreement(case.convert.get(name, lambda given: given)(output), ours)
            if difference > case.tolerance:
                wrong = wrong or f"{name} differs from ours by {difference:.1e}, more than {case.tolerance:.0e}"
        if device.type == "cuda" and case.graphs:
            try:
                runs[name + GRAPH] = _checked_graph(run, output)
            except Exception as error:
                failed[name + GRAPH] = _reason(error)
    return runs, wrong


def _checked_graph(run: Run, wanted: Any) -> Run:
    """The run as a CUDA graph that writes what the plain run gave; one that missed a kernel would be fast."""
    wanted = [tensor.clone() for tensor in tensors_of(wanted)]
    replay = graphed(run)
    for tensor in tensors_of(replay()):
        tensor.fill_(torch.nan)
    difference = disagreement(tensors_of(replay()), wanted)
    if difference > 1e-2:  # kernels with atomics do not repeat to the bit
        raise RuntimeError(f"the replay differs from the plain run by {difference:.1e}")
    return replay


def _peak_bytes(run: Run) -> int:
    """Most memory that one run takes beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _verdict(case: Case, verdicts: Mapping[str, str]) -> str:
    if OURS not in case.contenders:
        return NO_KERNEL
    if not case.tests:
        return "red: the case names no test"
    for test in case.tests:
        if verdicts.get(test, "not run") != GREEN:
            return f"{verdicts.get(test, 'not run')}: {test}"
    return GREEN


@contextlib.contextmanager
def fastest_cudnn() -> Iterator[None]:
    """Let cuDNN try its algorithms on every new shape, for all contenders alike."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
        # First everything without the compilers, then whole tasks last: what is short of time is short of those only.
        dear = sorted((case for case in cases if case.has_compile_peers), key=lambda case: case.task)
        work = [(case, False) for case in cases] + [(case, True) for case in dear]
    done: dict[str, dict[str, Any]] = {}
    with fastest_cudnn():
        for case, with_compilers in work:
            if budget is not None and time.monotonic() - started > budget:
                record["left_out"].append(case.name + (", torch.compile" if case.name in done else ""))
                continue
            measured = measure_case(case, device, record["roofs"], verdicts, compiled=with_compilers, seconds=seconds)
            done[case.name] = measured
            record["cases"] = list(done.values())
            raise_roofs(record)
            if on_case is not None:
                on_case(record, measured)
    return record


def raise_roofs(record: dict[str, Any]) -> None:
    """Raise the roofs of matrix rates to the fastest contender of any case, and count all shares of the roof anew.

    A machine that is shared with others has minutes of twice the speed of others; the products that were timed at the
    start then are no roof.
    """
    roofs = record["roofs"]["matrix_flops_per_second"]
    for case in record["cases"]:
        if case["dtype"] in roofs and case["seconds"]:
            fastest = min(spread["median"] for spread in case["seconds"].values())
            roofs[case["dtype"]] = max(roofs[case["dtype"]], case["flops"] / fastest)
    for case in record["cases"]:
        case["floor_seconds"], case["bound"] = measure.floor_seconds(
            case["bytes"], case["flops"], case["dtype"], record["roofs"]
        )
        if "rates" in case:
            median = case["seconds"][case["ours"]]["median"]
            case["rates"]["percent_of_roof"] = 100 * case["floor_seconds"] / median


def write(record: Mapping[str, Any], folder: Path, *, complete: bool) -> Path:
    """Write a record as ``<device>-<date>.json``; the file appears whole or not at all.

    While cases are still to come (not ``complete``) the name ends in ``.partial.json``: a run that is stopped neither
    replaces an earlier record nor loses its own.
    """
    name = f"{environment.slug(record['environment']['device'])}-{record['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial.json"
    path = folder / f"{name}.json" if complete else partial
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    if complete:
        partial.unlink(missing_ok=True)
    return path
