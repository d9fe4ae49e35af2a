"""Latency of architectures on one device: a measured table of blocks, and how well it predicts whole networks."""

from spos_fast.latency.measure import measure
from spos_fast.latency.prediction import Prediction, compare
from spos_fast.latency.settings import LatencySettings
from spos_fast.latency.table import LatencyTable, Spread

__all__ = ["LatencySettings", "LatencyTable", "Prediction", "Spread", "compare", "measure"]
