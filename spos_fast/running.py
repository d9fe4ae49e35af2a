"""Running statistics of many normalisation layers at once, in flat vectors: one update a batch for all of them.

Only sums, products, quotients and roots of vectors, each rounded by itself: a channel's bits do not depend on where in
the vector it stands, which a fused multiply-add in a kernel's body but not in its tail would break.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from spos_fast.calibration import _EMA_MOMENTUM, Mode
from spos_fast.nn.parts import Folded, Moments, Part


class RunningStatistics:
    """Statistics of parts, merged batch by batch as :func:`spos_fast.recalibrate` does, in float64.

    Args:
        parts: whose statistics they are; a part may occur many times.
        mode: how batches are averaged.
        device: where they lie.
    """

    def __init__(self, parts: Sequence[Part], mode: Mode, device: torch.device) -> None:
        self.parts, self.mode, self.device = parts, mode, device
        self.sizes = [sum(part.widths) for part in parts]
        total = sum(self.sizes)
        self.mean = torch.zeros(total, dtype=torch.float64, device=device)
        # The variance; in mode pooled the sum of squared distances from the mean.
        self.spread = torch.full_like(self.mean, 0.0 if mode == "pooled" else 1.0)
        self.batches, self.count = 0, torch.zeros_like(self.mean)
        self._layers = [layer for part in parts for layer in part.norms]
        self._layer_widths = [width for part in parts for width in part.widths]
        self._widths = torch.tensor(self._layer_widths, dtype=torch.int64, device=device)
        self._counts: dict[tuple[int, ...], Tensor] = {}  # batches have one or two sizes

    def merge(self, moments: Sequence[Moments]) -> None:
        """Add the moments of one batch, one of each part."""
        mean = torch.cat([each.mean for each in moments]).double()
        var = torch.cat([each.var for each in moments]).double()
        counts = tuple(count for each in moments for count in each.counts)
        if counts not in self._counts:
            self._counts[counts] = self._per_channel(counts)
        count = self._counts[counts]
        self.batches += 1
        if self.mode == "pooled":
            total = self.count + count
            delta = mean - self.mean
            self.spread += var * count + delta.square() * (self.count * count / total)
            self.mean += delta * (count / total)
            self.count = total
        else:
            share = _EMA_MOMENTUM if self.mode == "ema" else 1 / self.batches
            self.mean += (mean - self.mean) * share
            self.spread += (var * (count / (count - 1)) - self.spread) * share

    def fold(self) -> list[Folded]:
        """What the parts normalise by, one of each part."""
        var = self.spread / (self.count - 1) if self.mode == "pooled" else self.spread
        scale = 1 / (var + self._per_channel([layer.eps for layer in self._layers])).sqrt()
        shift = -self.mean * scale
        if any(layer.affine for layer in self._layers):
            scale = scale * self._affine("weight", 1.0)
            shift = self._affine("bias", 0.0) - self.mean * scale
        flat = [value.float().split(self.sizes) for value in (self.mean, var, scale, shift)]
        return [Folded(*values) for values in zip(*flat, strict=True)]

    def finite(self) -> Tensor:
        """For every part whether its statistics are numbers: bool ``[parts]``."""
        bad = ~(self.mean.isfinite() & self.spread.isfinite())
        ends = torch.tensor(self.sizes).cumsum(0).to(self.device)
        before = functional.pad(bad.cumsum(0), (1, 0))
        return before[ends] == before[ends - torch.tensor(self.sizes, device=self.device)]

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        """One value a layer, float64 for each of the layer's channels."""
        each = torch.tensor(values, dtype=torch.float64, device=self.device)
        return each.repeat_interleave(self._widths, output_size=len(self.mean))

    def _affine(self, name: str, default: float) -> Tensor:
        """Weights or biases of the layers' channels that are used."""
        pairs = zip(self._layers, self._layer_widths, strict=True)
        given = ((getattr(layer, name), width) for layer, width in pairs)
        parts = [self.mean.new_full((width,), default) if own is None else own[:width] for own, width in given]
        return torch.cat([part.detach().double() for part in parts])
