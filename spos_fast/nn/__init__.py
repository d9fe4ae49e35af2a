"""Modules for single-path supernets, slimmable networks and quantized ones."""

from spos_fast.nn.quant import QuantAct, QuantBasicBlock, QuantConv2d, initialize_steps, quantize_model
from spos_fast.nn.sliced import SlicedBatchNorm2d, SlicedConv2d
from spos_fast.nn.steps import hold_unsampled
from spos_fast.nn.units import ShuffleUnit, XceptionUnit

__all__ = [
    "QuantAct",
    "QuantBasicBlock",
    "QuantConv2d",
    "ShuffleUnit",
    "SlicedBatchNorm2d",
    "SlicedConv2d",
    "XceptionUnit",
    "hold_unsampled",
    "initialize_steps",
    "quantize_model",
]
