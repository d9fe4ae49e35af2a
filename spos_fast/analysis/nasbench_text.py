"""Pieces of text and numbers as the NAS-Bench-101 report writes them."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from spos_fast.analysis.drawing import short_number
from spos_fast.nasbench import statistics
from spos_fast.nasbench.locality import Autocorrelation


def absent(title: str, why: str) -> str:
    """A card that says what this file cannot show, and why."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card">{head}<p class="missing">Not in this file: {escape(why)}.</p></div>'


def spaced(content: str) -> str:
    """Content with some room above it."""
    return f'<div style="margin-top: 14px">{content}</div>'


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.2f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * value:.2f} points"


def known(value: float, text: str) -> str:
    """The text, or a dash where there is no value."""
    return text if math.isfinite(value) else "–"


def three_correlations(found: statistics.Correlation) -> tuple[str, str, str]:
    """Pearson, Spearman and Kendall."""
    values = (found.pearson, found.spearman, found.kendall)
    return tuple(known(value, f"{value:.3f}") for value in values)  # type: ignore[return-value]


def accuracy_and_interval(entry: Autocorrelation) -> str:
    """Autocorrelation of accuracies."""
    return with_interval(entry.accuracy, entry.accuracy_interval)


def rank_and_interval(entry: Autocorrelation) -> str:
    """Autocorrelation of ranks."""
    return with_interval(entry.rank, entry.rank_interval)


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """A value and its interval."""
    return known(value, f"{two_decimals(value)} ({two_decimals(interval[0])} to {two_decimals(interval[1])})")


def two_decimals(value: float) -> str:
    """Two decimals, without a minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def median_and_range(values: np.ndarray) -> str:
    """A label: that the value is a median, and the range around it."""
    return f"median; {short_number(float(values.min()))} to {short_number(float(values.max()))}"


def listed(parts: object) -> str:
    """Words with commas and an "and"."""
    words = [str(part) for part in parts]  # type: ignore[attr-defined]
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
