"""The latency table: one JSON file with the time of every choice of every layer, and what it was measured on."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spos_fast.checkpoint import read_json, write_json
from spos_fast.errors import CheckpointError, InputError
from spos_fast.latency.settings import LatencySettings, describe_machine, describe_versions
from spos_fast.spaces import CostTable, Space

FORMAT, VERSION = "spos_fast_latency", 1
NANOSECONDS = 1_000_000  # in a millisecond
QUANTILES = ("p20", "median", "p80")


@dataclass(frozen=True)
class Spread:
    """Quantiles of timings, in nanoseconds: int64 arrays with one axis for each gene of a layer (none for the ends).

    Attributes:
        p20, median, p80: 20 %, 50 % and 80 % of the timings took no longer.
    """

    p20: np.ndarray
    median: np.ndarray
    p80: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray) -> Spread:
        """Quantiles along the first axis of timings in seconds."""
        quantiles = np.quantile(samples, (0.2, 0.5, 0.8), axis=0)
        return cls(*np.maximum(np.rint(quantiles * 1e9), 1).astype(np.int64))


@dataclass(frozen=True)
class LatencyTable:
    """Times of the parts of a space's networks on one device. What a network takes is predicted by their sum.

    Attributes:
        space: ``{"name": ..., "config": ...}`` of the space that was measured.
        settings: how its networks ran.
        machine: device and host, by :func:`spos_fast.latency.settings.describe_machine`.
        versions: of what ran the networks.
        stem, head: what every network pays: everything before the first block and after the last.
        layers: one a layer; the axes are the layer's genes.
        networks: result of :func:`spos_fast.latency.compare`, as plain values; None if it was not asked for.
    """

    space: dict[str, Any]
    settings: LatencySettings
    machine: dict[str, str]
    versions: dict[str, str]
    stem: Spread
    head: Spread
    layers: tuple[Spread, ...]
    networks: dict[str, Any] | None = None

    def cost_table(self) -> CostTable:
        """The medians as a metric: milliseconds, counted in nanoseconds."""
        fixed = int(self.stem.median) + int(self.head.median)
        return CostTable(fixed, tuple(layer.median for layer in self.layers), NANOSECONDS)

    def attach(self, space: Space, warn: Callable[[str], Any] | None = None) -> None:
        """Give a space this table: its costs then have ``latency_ms``, and constraints on it can be met.

        Args:
            space: the space that was measured, or an equal one.
            warn: hears, one sentence each, in what this machine differs from the one of the table; ``warnings.warn``
                by default.

        Raises:
            InputError: the table is of another space; the message names the first difference.
        """
        self.check_space(space)
        for difference in self.differences():
            (warn or warnings.warn)(f"latency table: {difference}; its milliseconds hold for the device it names")
        space.cost_tables["latency_ms"] = self.cost_table()

    def check_space(self, space: Space) -> None:
        """Refuse another space than the one that was measured.

        Raises:
            InputError: it is another one.
        """
        own, other = self.space["config"], plain_config(space)
        for key in sorted({*own, *other}):
            if own.get(key) != other.get(key):
                raise InputError(
                    f"latency table: it was measured with {key} {own.get(key)!r}, and the space has "
                    f"{other.get(key)!r}; measure this one with `spos-fast latency`"
                )
        if self.space["name"] != space.name:
            raise InputError(f"latency table: it is of space {self.space['name']!r}, not {space.name!r}")
        if len(self.layers) != len(space.layer_shapes):
            raise InputError(f"latency table: it has {len(self.layers)} layers; expected {len(space.layer_shapes)}")
        for number, (layer, shape) in enumerate(zip(self.layers, space.layer_shapes, strict=True), 1):
            if layer.median.shape != shape:
                raise InputError(
                    f"latency table: layer {number} has entries of shape {layer.median.shape}; expected {shape}"
                )

    def differences(self) -> list[str]:
        """In what this machine and its software differ from those of the table, in words."""
        device = torch.device(self.machine["device_type"])
        if device.type == "cuda" and not torch.cuda.is_available():
            return [f"it was measured on {self.machine['device']}, and this machine has no GPU"]
        here = {**describe_machine(device), **describe_versions()}
        there = {**self.machine, **self.versions}
        named = {"device": "device", "torch": "PyTorch", "spos_fast": "spos_fast"}
        return [
            f"it was measured with {words} {there[key]!r}, and here is {here[key]!r}"
            for key, words in named.items()
            if there[key] != here[key]
        ]

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            CheckpointError: it could not be written.
        """
        write_json(path, self.plain())

    def plain(self) -> dict[str, Any]:
        """The table as values that JSON can hold."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "space": self.space,
            "settings": dataclasses.asdict(self.settings),
            "machine": self.machine,
            "versions": self.versions,
            "unit": "ns",
            "stem": _plain_spread(self.stem),
            "head": _plain_spread(self.head),
            "layers": [_plain_spread(layer) for layer in self.layers],
            "networks": self.networks,
        }

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Read a file that :meth:`write` wrote.

        Raises:
            CheckpointError: missing or damaged file, another format or version, or missing entries.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a latency table; `spos-fast latency` writes one")
        if content.get("version") != VERSION:
            raise CheckpointError(f"{path}: format version {content.get('version')!r}; this program reads {VERSION}")
        try:
            return cls._from_plain(content)
        except KeyError as error:
            raise CheckpointError(f"{path}: damaged, {error.args[0]} is missing") from None
        except (TypeError, ValueError, AttributeError, InputError) as error:
            raise CheckpointError(f"{path}: damaged, {error}") from None

    @classmethod
    def _from_plain(cls, content: Mapping[str, Any]) -> LatencyTable:
        space, networks = dict(content["space"]), content["networks"]
        if not isinstance(space["name"], str) or not isinstance(space["config"], dict):
            raise ValueError("space is not one")
        return cls(
            space=space,
            settings=LatencySettings(**content["settings"]),
            machine={key: str(content["machine"][key]) for key in ("device_type", "device", "host", "system")},
            versions={key: str(content["versions"][key]) for key in ("spos_fast", "torch", "numpy", "python")},
            stem=_spread(content["stem"], "stem"),
            head=_spread(content["head"], "head"),
            layers=tuple(_spread(layer, f"layer {n}") for n, layer in enumerate(content["layers"], 1)),
            networks=None if networks is None else dict(networks),
        )


def plain_config(space: Space) -> dict[str, Any]:
    """The configuration of a space as it comes back from a JSON file."""
    config: dict[str, Any] = json.loads(json.dumps(space.config()))
    return config


def _plain_spread(spread: Spread) -> dict[str, Any]:
    return {name: getattr(spread, name).tolist() for name in QUANTILES}


def _spread(entries: Any, name: str) -> Spread:
    parts = []
    for quantile in QUANTILES:
        values = np.array(entries[quantile])
        if values.dtype.kind != "i" or not (values > 0).all():
            raise ValueError(f"{name} has entries that are missing or no positive integers")
        parts.append(values.astype(np.int64))
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"{name} has entries that are missing")
    return Spread(*parts)
