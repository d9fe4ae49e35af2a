"""Modules for single-path supernets and slimmable networks."""

from spos_fast.nn.sliced import SlicedBatchNorm2d, SlicedConv2d
from spos_fast.nn.units import ShuffleUnit, XceptionUnit

__all__ = ["ShuffleUnit", "SlicedBatchNorm2d", "SlicedConv2d", "XceptionUnit"]
