"""Timing: contenders in turn, A B A B, in one process; medians; roofs of this machine from the same run."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Run = Callable[[], Any]


def interleaved(
    runs: Mapping[str, Run], device: torch.device, *, seconds: float = 1.0, least: int = 7, most: int = 60
) -> dict[str, list[float]]:
    """Seconds of one run of each contender, once a round, all contenders in every round, in an order drawn each time.

    On the CPU a sample is as many runs as take the fastest contender a millisecond, the same number for all, after one
    run that is not timed (unless a run takes longer than a tenth of a second): what ran before is then the same for
    all. On a GPU it is one run between two events, after the L2 cache was overwritten, as its inputs would come from
    memory in a network.

    Args:
        runs: what to time, by name; each was built and run once before.
        device: where they run.
        seconds: for all contenders together.
        least, most: rounds.
    """
    clock = _cuda_sampler(device) if device.type == "cuda" else _cpu_sampler(runs)
    names = list(runs)
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for number in range(most):
            if number >= least and time.perf_counter() - started > seconds:
                break
            order.shuffle(names)
            for name in names:
                samples[name].append(clock(runs[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


LONG = 0.1  # seconds of a run beyond which no run is spent on warming up


def _cpu_sampler(runs: Mapping[str, Run]) -> Callable[[Run], float]:
    def once(run: Run, repeats: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    estimates = [once(run) for run in runs.values()]
    if max(estimates) < LONG:
        estimates = [min(once(run) for _ in range(2)) for run in runs.values()]
    # A millisecond for the fastest, but not more than 50 for the slowest.
    repeats = max(1, min(int(1e-3 / max(min(estimates), 1e-7)), int(50e-3 / max(estimates))))

    def sample(run: Run) -> float:
        if max(estimates) < LONG:
            run()
        return once(run, repeats)

    return sample


def _cuda_sampler(device: torch.device) -> Callable[[Run], float]:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(size, 1 << 24), dtype=torch.int8, device=device)

    def sample(run: Run) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        scratch.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    return sample


def wait_for_quiet(limit: float = 3.0, quiet: float = 0.1) -> None:
    """Wait until other processes, compilers that we started among them, take less than ``quiet`` cores.

    At most ``limit`` seconds: what goes on then is in the record (``other_work``).
    """
    end = time.monotonic() + limit
    while time.monotonic() < end:
        watch = OtherWork()
        time.sleep(0.25)
        if (watch.share() or 0.0) < quiet:
            return


class OtherWork:
    """How much of the processors other processes take while this one measures."""

    def __init__(self) -> None:
        self._wall, self._all, self._own = time.monotonic(), *_processor_seconds()

    def share(self) -> float | None:
        """Since the start, in cores: 1.0 is one core busy with something else; None where the system does not tell."""
        everyone, own = _processor_seconds()
        if everyone is None or self._all is None:
            return None
        return max(0.0, (everyone - self._all) - (own - self._own)) / max(time.monotonic() - self._wall, 1e-3)


def _processor_seconds() -> tuple[float | None, float]:
    """Busy seconds of all processors and of this process."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, interrupts, soft, *_ = map(int, file.readline().split()[1:])
        everyone = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        everyone = None
    return everyone, sum(os.times()[:2])


def spread(samples: list[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles, interpolated."""
    p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "samples": len(samples)}


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is: the ratio of the medians, and the quantiles of the ratios round by round."""
    rounds = spread([a / b for a, b in zip(theirs, ours, strict=True)])
    return rounds | {"median": spread(theirs)["median"] / spread(ours)["median"]}


def roofs(device: torch.device) -> dict[str, Any]:
    """What this machine can do now, the best of several tries.

    ``copy_bytes_per_second``: of a large copy, bytes read and written. ``matrix_flops_per_second``: of a large matrix
    product, by dtype.
    """
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    copies = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=1.0, least=5)["copy"]
    result: dict[str, Any] = {"copy_bytes_per_second": 2 * size / min(copies), "matrix_flops_per_second": {}}
    width, dtypes = (
        (8192, (torch.float32, torch.float16, torch.bfloat16)) if device.type == "cuda" else (1536, (torch.float32,))
    )
    for dtype in dtypes:
        # Random values: zeros draw less power and run faster than data does.
        a = torch.randn(width, width, device=device).to(dtype)
        b = torch.randn(width, width, device=device).to(dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return a @ b

        times = interleaved({"product": product}, device, seconds=1.0, least=5, most=20)["product"]
        result["matrix_flops_per_second"][str(dtype).removeprefix("torch.")] = 2 * width**3 / min(times)
    return result


def floor_seconds(bytes_moved: int, flops: int, dtype: str, roof: Mapping[str, Any]) -> tuple[float, str]:
    """The least time that the roofs allow, and what sets it: ``"bytes"`` or ``"flops"``; (0, "") without either."""
    rates = roof["matrix_flops_per_second"]
    by_bytes = bytes_moved / roof["copy_bytes_per_second"]
    by_flops = flops / rates[dtype] if dtype in rates else 0.0
    if by_bytes == by_flops == 0:
        return 0.0, ""
    return max((by_bytes, "bytes"), (by_flops, "flops"))
