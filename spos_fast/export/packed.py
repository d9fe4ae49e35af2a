"""Checkpoints whose quantized weights take as many bits as they have.

The file is one of :func:`spos_fast.checkpoint.save_checkpoint`. ``model`` holds the state dict without the weights of
quantized convolutions, and ``packed`` for each of those::

    codes       uint8 [ceil(weights * bits / 8)]: codes 0 to 2^bits - 1, one behind the other, lowest bit first
    shape       [out_channels, in_channels / groups, kh, kw]
    bits        1 to 8
    quantizer   dorefa or lsq
    per_channel whether every output channel has a step of its own

A code c stands for a weight of ``step * (c - 2^(bits - 1))`` with lsq (``step * (2 c - 1)`` if it is a single bit) and
``(2 c - n) / n`` with dorefa, n = 2^bits - 1. Steps are in the state dict as ``weight_step``. A single bit of DoReFa,
the sign times the mean magnitude E, is stored as lsq with the step E, which is the same function of the signs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spos_fast.architecture import Architecture
from spos_fast.checkpoint import load_checkpoint, save_checkpoint
from spos_fast.errors import CheckpointError, InputError
from spos_fast.export.codes import WeightCodes, weight_codes, weight_from_codes
from spos_fast.nn import QuantConv2d
from spos_fast.ops.quantizers import MIN_STEP
from spos_fast.spaces import Space

_KIND = "packed_network"


def save_packed(network: nn.Module, path: str | Path, *, architecture: Architecture | None = None) -> None:
    """Save a network, the weights of its quantized convolutions as integers of as many bits as they have.

    Everything else (other layers, batch norm, steps) is stored as it is. What quantizing drops of the weights is gone:
    the loaded network computes the same, but is no place to go on training from.

    Args:
        network: a plain network, or any module with :class:`spos_fast.nn.QuantConv2d` of a single weight bit-width.
        path: the file; whole or not at all.
        architecture: what the network was built from, so that :func:`load_packed` can build it.

    Raises:
        InputError: no quantized convolutions, one with several bit-widths, or weights that are not float32, or
            NaN or infinite.
        CheckpointError: the file could not be written; one that was there is untouched.
    """
    layers = _layers(network)
    if not layers:
        raise InputError("network: has no quantized convolutions to pack")
    weights = {name: _single(layer, name) for name, layer in layers.items()}
    without = {_of(name, "weight") for name in layers}
    state = {name: value.cpu() for name, value in network.state_dict().items() if name not in without}
    packed = {}
    for name, layer in layers.items():
        codes, bits = weights[name].codes, weights[name].bits
        as_sign = bits == 1 and layer.weight_quantizer == "dorefa"
        if as_sign:
            state[_of(name, "weight_step")] = weights[name].scale[None]
        packed[name] = {
            "codes": torch.from_numpy(pack_bits(codes.numpy(), bits)),
            "shape": list(codes.shape),
            "bits": bits,
            "quantizer": "lsq" if as_sign else layer.weight_quantizer,
            "per_channel": layer.per_channel,
        }
    content = {
        "kind": _KIND,
        "model": state,
        "packed": packed,
        "channels_last": any(_channels_last(value) for value in network.parameters()),
        "space": None if architecture is None else architecture.space,
        "genes": None if architecture is None else list(architecture.genes),
    }
    save_checkpoint(path, {**content, "digest": _digest(content)})


def load_packed(path: str | Path, network: nn.Module | Space) -> nn.Module:
    """Load what :func:`save_packed` wrote; no code is run.

    In evaluation mode the network gives the bits that the saved one gave (on the same machine, in the same memory
    format). Its quantized convolutions get float weights that quantize to the stored integers; those with a single bit
    of DoReFa become LSQ's, which is the same function.

    Args:
        path: the file.
        network: a network as the saved one was built, which is loaded into; or the space of a network that was saved
            with its architecture, which is built then, in evaluation mode.

    Returns:
        The network.

    Raises:
        InputError: a space, and a file without an architecture.
        CheckpointError: missing, damaged or foreign file, or one of another network; nothing is loaded then.
    """
    content = load_checkpoint(path)
    if content.get("kind") != _KIND:
        raise CheckpointError(f"{path}: is no packed network")
    if content.get("digest") != _digest(content):
        raise CheckpointError(f"{path}: is damaged (its contents do not have the stored digest)")
    if isinstance(network, Space):
        if content["space"] is None:
            raise InputError(f"network: {path} holds no architecture; give a network that was built as the saved one")
        if content["space"] != network.name:
            raise CheckpointError(f"{path}: is of space {content['space']!r}, not {network.name!r}")
        network = network.build(network.architecture(content["genes"])).eval()
        if content["channels_last"]:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layers = _layers(network)
    _require_same(path, content, network, layers)
    state = dict(content["model"])
    for name, row in content["packed"].items():
        step = state.get(_of(name, "weight_step"))
        step = None if step is None else step[0]
        state[_of(name, "weight")] = weight_from_codes(_unpacked(row), row["bits"], step, row["per_channel"])
    for name, layer in layers.items():
        if _turns_to_lsq(layer, content["packed"][name]):
            layer.weight_quantizer = "lsq"
            step = state[_of(name, "weight_step")]
            layer.weight_step = nn.Parameter(torch.empty_like(step, device=layer.weight.device))
    network.load_state_dict(state)
    return network


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 0 to 2^bits - 1 as bytes, one behind the other, lowest bit first; the last byte is filled with zeros."""
    planes = codes.reshape(-1, 1).astype(np.uint8) >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(planes, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes that :func:`pack_bits` packed, uint8 [count]."""
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def _single(layer: QuantConv2d, name: str) -> WeightCodes:
    """The codes of a layer that has one bit-width.

    Raises:
        InputError: it has several, or a single bit with the mean magnitude 0, or no numbers.
    """
    if len(layer.weight_bits) > 1:
        raise InputError(
            f"{name}: can have {', '.join(map(str, layer.weight_bits))} weight bits; give a network with one bit-width "
            "a layer, such as Supernet.extract makes"
        )
    weights = weight_codes(layer, 0, name)
    if weights.bits == 1 and bool((weights.scale < MIN_STEP).any()):
        raise InputError(f"{name}: weights of 1 bit have a mean magnitude below {MIN_STEP:.1g}, the least of steps")
    return weights


def _unpacked(row: dict[str, Any]) -> Tensor:
    count = int(np.prod(row["shape"]))
    return torch.from_numpy(unpack_bits(row["codes"].numpy(), row["bits"], count)).view(row["shape"])


def _require_same(
    path: str | Path, content: dict[str, Any], network: nn.Module, layers: dict[str, QuantConv2d]
) -> None:
    """Refuse a file of another network.

    Raises:
        CheckpointError: it is one.
    """
    packed, given, own = content["packed"], content["model"], network.state_dict()
    for name in sorted({*packed, *layers}):
        if name not in packed or name not in layers:
            raise CheckpointError(f"{path}: is of another network ({name} is quantized in one of them only)")
        layer, row = layers[name], packed[name]
        for what, stored, expected in (
            ("bits", row["bits"], layer.weight_bits[0] if len(layer.weight_bits) == 1 else layer.weight_bits),
            ("quantizer", row["quantizer"], "lsq" if _turns_to_lsq(layer, row) else layer.weight_quantizer),
            ("per_channel", row["per_channel"], layer.per_channel),
            ("shape", row["shape"], list(layer.weight.shape)),
        ):
            if stored != expected:
                raise CheckpointError(f"{path}: is of another network ({name} has {what} {stored}, not {expected})")
    shapes = {name: value.shape for name, value in own.items()}
    for name, layer in layers.items():
        shapes.pop(_of(name, "weight"))
        if _turns_to_lsq(layer, packed[name]):
            shapes[_of(name, "weight_step")] = torch.Size([1, layer.out_channels] if layer.per_channel else [1])
    for name in sorted({*given, *shapes}):
        if name not in given or name not in shapes or given[name].shape != shapes[name]:
            raise CheckpointError(f"{path}: is of another network ({name} differs)")


def _turns_to_lsq(layer: QuantConv2d, row: dict[str, Any]) -> bool:
    """Whether the layer has a single bit of DoReFa, which files hold as LSQ."""
    return row["bits"] == 1 and row["quantizer"] == "lsq" and layer.weight_quantizer == "dorefa"


def _layers(network: nn.Module) -> dict[str, QuantConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantConv2d)}


def _of(layer: str, parameter: str) -> str:
    """Name of a layer's parameter in the state dict of the network, which may be the layer itself."""
    return f"{layer}.{parameter}" if layer else parameter


def _channels_last(value: Tensor) -> bool:
    return value.dim() == 4 and not value.is_contiguous()


def _digest(content: Any) -> str:
    """SHA-256 of nested dictionaries and lists of tensors and plain values, of dictionaries without ``digest``."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value.keys() - {"digest", "format", "version"}):
                found.update(repr(key).encode())
                add(value[key])
        else:
            found.update(repr(value).encode())

    add(content)
    return found.hexdigest()
