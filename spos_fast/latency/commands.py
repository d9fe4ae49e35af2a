"""``spos-fast latency``: measure, compare with whole networks, write the table."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spos_fast.checkpoint import check_writable, read_json
from spos_fast.config import Config
from spos_fast.errors import CheckpointError, InputError
from spos_fast.latency.measure import measure
from spos_fast.latency.prediction import Prediction, compare
from spos_fast.latency.settings import LatencySettings
from spos_fast.latency.table import FORMAT, LatencyTable
from spos_fast.spaces import Space

# Height and width, channels and classes of images, by data set: measuring needs no data.
IMAGES = {"digits": (8, 1, 10), "cifar10": (32, 3, 10), "cifar100": (32, 3, 100), "imagenet": (224, 3, 1000)}
_LINE_EVERY = 10.0  # seconds between two lines of progress


def run(options: argparse.Namespace, config: Config, device: Any) -> None:
    """The command, with its options read and its settings put together.

    Raises:
        InputError: options that make no measurement, or a file that cannot be written; before anything is measured.
    """
    settings = LatencySettings(
        batch_size=options.batch_size,
        dtype=options.dtype,
        compiled=options.compiled,
        threads=options.threads,
        rounds=options.rounds,
        warmup=options.warmup,
        seed=config.seed,
    )
    if options.networks < 0 or options.networks == 1:
        raise InputError(f"--networks: got {options.networks}; expected 0 for none, or at least 2")
    space = _space(config, options.num_classes)
    check_output(options.out)
    table = measure(space, settings, device=device, progress=_Lines("blocks"))
    _describe(table)
    if options.networks:
        prediction = compare(space, table, options.networks, device=device, progress=_Lines("networks"))
        _describe_prediction(prediction)
        table = replace(table, networks=prediction.plain())
    table.write(options.out)
    print(f"latency table: {options.out}")


def add_options(command: argparse.ArgumentParser) -> None:
    """The options that only this command has."""
    defaults = LatencySettings()
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the table goes (JSON)")
    command.add_argument("--folder", type=Path, metavar="FOLDER", help="run folder whose space is measured")
    command.add_argument("--dtype", default=defaults.dtype, metavar="TYPE", help="float32 (default), float16, bfloat16")
    command.add_argument("--compiled", action="store_true", help="put blocks through torch.compile (takes minutes)")
    for name, default, text in (
        ("--batch-size", defaults.batch_size, "images of one inference"),
        ("--rounds", defaults.rounds, "timed rounds; in each every choice of every layer runs once"),
        ("--warmup", defaults.warmup, "rounds that are not timed"),
        ("--networks", 50, "random whole networks that the predictions are compared with; 0: none"),
        ("--num-classes", None, "classes, if not those of the data set's public version"),
    ):
        shown = "" if default is None else f" (default {default})"
        command.add_argument(name, type=int, default=default, metavar="N", help=text + shown)


def check_output(path: Path) -> None:
    """Refuse a file that could not be written in the end, or that is no table and would be lost.

    Raises:
        InputError: it is one.
    """
    try:
        check_writable(path)
    except CheckpointError as error:
        raise InputError(f"--out: {error}") from None
    if path.exists():
        try:
            content = read_json(path)
        except CheckpointError:
            content = None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"--out: {path} exists and is no latency table; name another file")


def _space(config: Config, num_classes: int | None) -> Space:
    if config.data.name not in IMAGES:
        raise InputError(f"data.name: got {config.data.name!r}; expected one of {', '.join(IMAGES)}")
    size, channels, classes = IMAGES[config.data.name]
    if config.data.name == "imagenet":
        size = config.data.input_size
    classes = classes if num_classes is None else num_classes
    return config.space.make(input_size=size, in_channels=channels, num_classes=classes)


def _describe(table: LatencyTable) -> None:
    costs = table.cost_table()
    entries = sum(layer.median.size for layer in table.layers)
    spreads = [layer.p80 / layer.p20 for layer in (table.stem, *table.layers, table.head)]
    ratio = float(np.median(np.concatenate([spread.reshape(-1) for spread in spreads])))
    print(
        f"{entries} choices of {len(table.layers)} layers on {table.machine['device']}: networks of "
        f"{costs.smallest / costs.per_unit:.3f} to {costs.largest / costs.per_unit:.3f} ms; "
        f"80 % quantile / 20 % quantile of an entry: {ratio:.2f} (median)"
    )
    if ratio > 1.3:
        print("other work disturbed the timings; measure again on an idle machine", file=sys.stderr)


def _describe_prediction(prediction: Prediction) -> None:
    measured = prediction.measured
    print(
        f"{len(measured)} random networks, measured {min(measured):.3f} to {max(measured):.3f} ms: rank correlation "
        f"{prediction.spearman:.3f} (Spearman), {prediction.kendall:.3f} (Kendall); mean relative error of the "
        f"prediction {prediction.mean_error:.1%}, of which shared by all {prediction.bias:+.1%}"
    )


class _Lines:
    """Progress as a line now and then."""

    def __init__(self, what: str) -> None:
        self.what, self.spoken = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.spoken > _LINE_EVERY:
            self.spoken = time.monotonic()
            print(f"{self.what}: round {done:,} of {total:,}", file=sys.stderr, flush=True)
