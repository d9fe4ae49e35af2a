"""Progress on a terminal: a bar where someone watches, a line now and then where nobody does."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from spos_fast.recording import Listener
from spos_fast.scores import Score
from spos_fast.training import Metrics

# Seconds between two lines when the output is no terminal.
_LINE_EVERY = 15.0
_UNITS = {
    **dict.fromkeys(("calibration", "validation"), "image"),
    "supernet": "step",
}


class Console(Listener):
    """Draws what a stage reports on standard error; results go to standard output."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._stage = ""
        self._begun = (0.0, 0)
        self._spoken = 0.0
        self._failed = 0
        self._values = ""  # of the last candidate

    def close(self) -> None:
        """End the bar of the current stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line of results."""
        self.close()
        print(text, flush=True)

    def resumed(self, stage: str, done: int, total: int) -> None:
        """Start the bar of a stage."""
        self.close()
        self._stage, self._begun, self._spoken, self._failed = stage, (time.monotonic(), done), 0.0, 0
        if done >= total:
            self.say(f"{stage}: done before ({total:,} of {total:,})")
            return
        if done:
            self.say(f"{stage}: goes on after {done:,} of {total:,}")
        if self._terminal:
            unit = _UNITS.get(stage, "step" if stage.startswith("retrain/") else "arch")
            self._bar = tqdm(total=total, initial=done, desc=stage, unit=unit, dynamic_ncols=True)

    def decoded(self, part: str, done: int, total: int) -> None:
        """Show how far the images of a search are read."""
        if self._stage != part:
            self.resumed(part, 0, total)
        self._advance(done, total, "images read")

    def metrics(self, stage: str, metrics: Metrics) -> None:
        """Advance the bar of a training stage."""
        values = f"loss {metrics.loss:.3f}, accuracy {metrics.accuracy:.1%}, {metrics.images_per_second:,.0f} images/s"
        self._advance(metrics.step, metrics.steps, values)

    def candidate(self, phase: str, number: int, total: int, score: Score, best: Score) -> None:
        """Advance the bar of a search; candidates that failed (NaN or infinity) are counted."""
        self._failed += score.failed
        failed = f", {self._failed:,} failed" if self._failed else ""
        self._values = f"accuracy {score.accuracy:.2%}, best {best.accuracy:.2%}{failed}"
        if self._bar is not None:
            self._advance(number, total, self._values)

    def generation(self, phase: str, done: int, total: int) -> None:
        """A line of a search: from the first of those scored together, the time that is left could not be told."""
        if self._bar is None:
            self._advance(done, total, self._values)

    def retrained(self, label: str, result: dict[str, Any]) -> None:
        """Say how an architecture came out."""
        bits = f", {result['bitops'] / 2**30:.4g} G BitOps" if "bitops" in result else ""
        self.say(f"{label}: test accuracy {result['test_accuracy']:.2%}, {result['macs'] / 1e6:.2f}M MACs{bits}")

    def _advance(self, done: int, total: int, values: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._spoken < _LINE_EVERY and done < total:
            return
        self._spoken = now
        begun, before = self._begun
        left = (now - begun) / max(done - before, 1) * (total - done)
        print(f"{self._stage}: {done:,} of {total:,}, {values}, {left:,.0f} s left", file=sys.stderr, flush=True)
