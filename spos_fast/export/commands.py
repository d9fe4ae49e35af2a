"""``spos-fast export``: a retrained network of a run as a file for others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spos_fast import pipeline
from spos_fast.checkpoint import check_writable
from spos_fast.errors import CheckpointError, InputError
from spos_fast.export.onnx_file import OPSETS, export_onnx, require_onnx
from spos_fast.export.packed import save_packed
from spos_fast.job import Job, make_space
from spos_fast.run import resolve

FORMATS = ("onnx", "packed")


def run(options: argparse.Namespace, device: Any) -> None:
    """The command, with its options read.

    Raises:
        InputError: a network that is not there, a format that does not take it, or a file that cannot be written.
        CheckpointError: the network's checkpoint is damaged.
    """
    if options.format == "onnx":
        require_onnx()
    try:
        check_writable(options.out)
    except CheckpointError as error:
        raise InputError(f"--out: {error}") from None
    label = "evolution" if options.arch == "best" else options.arch
    labels = pipeline.retrained_labels(options.folder)
    if label not in labels:
        known = f"it has {', '.join(labels)}" if labels else f"run `spos-fast retrain --folder {options.folder}` first"
        raise InputError(f"--arch: {options.folder} has no retrained network {label!r}; {known}")
    moved = {"data": {"path": str(Path(options.data_path).expanduser().resolve())}} if options.data_path else {}
    config = resolve(options.folder, {}, moved)
    source = config.data.load(options.workers)
    space = make_space(config, source, options.folder)
    job = Job(options.folder, config, source, space, device, workers=options.workers, tensorboard=False)
    arch, network = pipeline.retrained(job, label)
    if options.format == "onnx":
        export_onnx(
            network,
            options.out,
            input_size=source.input_size,
            in_channels=source.in_channels,
            opset=options.opset,
        )
    else:
        save_packed(network, options.out, architecture=arch)
    print(f"{label} ({arch}): {options.out}, {options.out.stat().st_size:,} bytes")


def add_options(command: argparse.ArgumentParser) -> None:
    """The options that only this command has."""
    command.add_argument("--folder", type=Path, required=True, metavar="FOLDER", help="run folder, retrained")
    command.add_argument(
        "--arch",
        default="best",
        metavar="LABEL",
        help="which retrained network, by the name of its folder in retrain; best (default): what evolution found",
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx (default): quantized layers as QuantizeLinear and DequantizeLinear; packed: a checkpoint whose "
        "weights take as many bits as they have",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it goes")
    command.add_argument(
        "--opset",
        type=int,
        default=OPSETS[-1],
        metavar="N",
        help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default {OPSETS[-1]}; 2-bit types need it)",
    )
    command.add_argument(
        "--data.path", dest="data_path", default="", metavar="PATH", help="where the run's images are, if they moved"
    )
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images (default: by the cores)"
    )
