"""Data sets: training streams that resume bit for bit, and fixed calibration, validation and test sets."""

from spos_fast.data.images import Images, Normalization
from spos_fast.data.source import DataSource, load

__all__ = ["DataSource", "Images", "Normalization", "load"]
