"""Modules for single-path supernets."""

from spos_fast.nn.units import ShuffleUnit, XceptionUnit

__all__ = ["ShuffleUnit", "XceptionUnit"]
