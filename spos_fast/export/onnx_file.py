"""Networks with quantized layers as ONNX files."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spos_fast import __version__
from spos_fast.checkpoint import check_writable, write_whole
from spos_fast.errors import InputError
from spos_fast.export.layers import graph_module, stored_types
from spos_fast.supernet import Supernet

OPSETS = range(21, 26)


def export_onnx(
    network: nn.Module, path: str | Path, *, input_size: int, in_channels: int = 3, opset: int = OPSETS[-1]
) -> None:
    """Write a network as an ONNX file, its quantized layers as QuantizeLinear and DequantizeLinear (QDQ).

    Weights of :class:`spos_fast.nn.QuantConv2d` are stored as integers: int8 for 5 to 8 bits, int4 for 3 and 4, int2
    for 1 and 2 (opsets before 25 have no 2-bit types: int4). Activations are uint8, uint4 and uint2 likewise. The rest
    is PyTorch's exporter's. The graph is the network in evaluation mode, in float32, with the input ``images``
    ``[batch, in_channels, input_size, input_size]``, any batch, and the output ``logits``. Its results are those of the
    network to float rounding, except that a value on the border between two codes may fall to either side.

    Args:
        network: a plain network (:meth:`spos_fast.supernet.Supernet.extract`, ``space.build``), or any module that
            takes images; it is not changed.
        path: the file.
        input_size: height and width of the images.
        in_channels: their channels.
        opset: 21 to 25, the version of the ONNX operators.

    Raises:
        InputError: onnx or onnxscript is not installed, an opset that is not there, a supernet, weights that are no
            floats or no numbers, or a module that PyTorch cannot export.
        CheckpointError: the file could not be written; one that was there is untouched.
    """
    require_onnx()
    if opset not in OPSETS:
        raise InputError(f"opset: got {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    for name, value in (("input_size", input_size), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: got {value!r}; expected a positive integer")
    if isinstance(network, Supernet):
        raise InputError("network: is a supernet; extract an architecture first")
    check_writable(path)
    plain = copy.deepcopy(network).cpu().eval()
    # Units run as modules on this format, as one op of ours on channels_last.
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    graph = graph_module(plain, opset).eval()
    model = _exported(graph, torch.zeros(2, in_channels, input_size, input_size), opset)
    _narrow(model, stored_types(graph))
    _finish(model)
    write_whole(path, model.SerializeToString())


def require_onnx() -> None:
    """Say what to install where there is no ONNX.

    Raises:
        InputError: onnx or onnxscript is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"onnx: exporting needs {' and '.join(missing)}; pip install 'spos-fast[export]'")


def _exported(graph: nn.Module, images: torch.Tensor, opset: int) -> Any:
    """The ONNX model of a module by PyTorch's exporter.

    Raises:
        InputError: it cannot be exported.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of operators of packages that are not installed
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except InputError:
        raise
    except Exception as error:  # the exporter wraps whatever the model raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, InputError):
            raise cause from None
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise InputError(f"network: PyTorch could not export it to ONNX ({first})") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model_proto


def _narrow(model: Any, types: dict[str, int]) -> None:
    """Store weight codes, which the exporter has as int8, in their narrow types."""
    import numpy as np
    from onnx import helper, numpy_helper

    for stored in model.graph.initializer:
        if stored.name in types:
            kind = np.dtype(helper.tensor_dtype_to_np_dtype(types[stored.name]))
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(kind), stored.name))
    for value in model.graph.value_info:
        if value.name in types:
            value.type.tensor_type.elem_type = types[value.name]


def _finish(model: Any) -> None:
    """What the file says of itself, and that it is valid."""
    import onnx
    from onnx import helper

    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    model.producer_name, model.producer_version = "spos_fast", __version__
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with the paths of this machine
    onnx.checker.check_model(model, full_check=True)
