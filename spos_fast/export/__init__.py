"""Networks with quantized layers as files for others: ONNX, and checkpoints whose size shrinks with the bits."""

from spos_fast.export.onnx_file import export_onnx
from spos_fast.export.packed import load_packed, save_packed

__all__ = ["export_onnx", "load_packed", "save_packed"]
