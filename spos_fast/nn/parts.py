"""Modules that hand out their batch statistics and take statistics in, with no change to their own buffers.

What :class:`spos_fast.Evaluator` builds its tree of: many architectures run the same module on different inputs, each
with statistics of its own, which the module's one set of running statistics cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.nn import fused
from spos_fast.nn.units import Unit


class Moments(NamedTuple):
    """Statistics of one batch in front of a part's normalisation layers, one layer behind the other.

    Attributes:
        mean: [normalised], float32 (float64 for float64).
        var: likewise, divided by the count.
        counts: values a channel, one a layer.
    """

    mean: Tensor
    var: Tensor
    counts: list[int]


class Folded(NamedTuple):
    """Statistics to normalise with, as a part's modules and as its fused op take them; all [normalised], float32
    (float64 for float64).

    Attributes:
        mean, var: of the layers' inputs.
        scale, shift: ``weight / sqrt(var + eps)`` and ``bias - mean * scale``.
    """

    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor


class Part:
    """A module of a path at one width, to be run on batch statistics or on given ones.

    A part knows the module as it was when the part was made. It must be in evaluation mode, its normalisation layers
    too, and gradients off. Units run as fused ops where those give the same; everything else runs its own forward, with
    other buffers in its normalisation layers for that time. Layers without running statistics normalise by those of
    their batch, as they always do.

    Args:
        module: called with its input, and with ``mid`` unless that is None.
        mid: number of mid channels that it uses.

    Attributes:
        key: equal for parts that run the same.
        norms: normalisation layers with running statistics.
        widths: how many of their channels are used.
    """

    def __init__(self, module: nn.Module, mid: int | None = None) -> None:
        self.module, self.mid = module, mid
        self.key: tuple[nn.Module, int | None] = (module, mid)
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self.norms = [layer for layer in layers if layer.running_mean is not None]
        self.widths = [layer.num_features for layer in self.norms]
        self._block: fused.Block | None = None
        if isinstance(module, Unit) and self.norms == layers:
            self.widths, self._block = module.normalised(mid), module.matched(mid)

    def calibrate(self, x: Tensor) -> tuple[Tensor | None, Moments]:
        """The output for a batch, normalised by the batch's own statistics, and these.

        Returns:
            The output (None where only the statistics are of use), and the statistics.

        Raises:
            InputError: a layer gets a single value a channel, which has no variance, or runs twice.
        """
        block = self._block
        if block is None or not fused.takes(x) or not fused.has_kernel(block.plan.op, x):
            return self._calibrate_modules(x)
        # The least that a layer of the unit can get.
        if x.shape[0] * -(-x.shape[2] // block.stride) * -(-x.shape[3] // block.stride) < 2:
            raise _single_value(x)
        out, mean, var, counts = fused.calibrate(block, x)
        return out, Moments(mean, var, counts)

    def infer(self, x: Tensor, folded: Folded) -> Tensor:
        """The output for a batch, normalised by given statistics."""
        block = self._block
        if block is None or not fused.takes(x) or not fused.has_kernel(f"{block.plan.op}_infer", x):
            return self._infer_modules(x, folded)
        return fused.infer(block, x, folded.scale, folded.shift)

    def _run(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module(x) if self.mid is None else self.module(x, self.mid))

    def _calibrate_modules(self, x: Tensor) -> tuple[Tensor, Moments]:
        counts: dict[nn.Module, int] = {}

        def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if layer in counts:
                raise InputError("net: a normalisation layer runs twice in one forward; its statistics are not defined")
            values = inputs[0].numel() // inputs[0].shape[1]
            if values < 2:
                raise _single_value(inputs[0])
            counts[layer] = values

        fresh = [
            {
                name: torch.ones_like(buffer) if name == "running_var" else torch.zeros_like(buffer)
                for name, buffer in layer.named_buffers(recurse=False)
            }
            for layer in self.norms
        ]
        hooks = [layer.register_forward_pre_hook(count) for layer in self.norms]
        momenta = [layer.momentum for layer in self.norms]
        try:
            with _lent(self.norms, fresh):
                for layer in self.norms:
                    # With momentum 1 the running statistics are the batch's.
                    layer.training, layer.momentum = True, 1.0
                out = self._run(x)
        finally:
            for layer, momentum in zip(self.norms, momenta, strict=True):
                layer.training, layer.momentum = False, momentum
            for hook in hooks:
                hook.remove()
        means, variances = [x.new_zeros(0)], [x.new_zeros(0)]
        taken = [counts.get(layer, 2) for layer in self.norms]  # a layer that does not run keeps mean 0, variance 1
        for buffers, width, values in zip(fresh, self.widths, taken, strict=True):
            means.append(buffers["running_mean"][:width])
            variances.append(buffers["running_var"][:width] * ((values - 1) / values))  # torch's is the unbiased one
        return out, Moments(torch.cat(means), torch.cat(variances), taken)

    def _infer_modules(self, x: Tensor, folded: Folded) -> Tensor:
        pairs = zip(folded.mean.split(self.widths), folded.var.split(self.widths), strict=True)
        with _lent(self.norms, [{"running_mean": mean, "running_var": var} for mean, var in pairs]):
            return self._run(x)


class HeadPart(Part):
    """The end of a network: a last convolution, then a classifier.

    A pointwise convolution with normalisation and ReLU runs as the ops ``pw_bnstats`` and ``bn_act_cat``. As nothing
    comes behind its normalisation that takes statistics, calibration stops there.

    Args:
        last: the convolution with its normalisation.
        classifier: the rest, from its output to logits.
    """

    def __init__(self, last: nn.Module, classifier: nn.Module) -> None:
        super().__init__(nn.Sequential(last, classifier))
        self.key, self.classifier = (last, None), classifier
        found = fused.match_pointwise(last) if isinstance(last, nn.Sequential) else None
        # None unless the last convolution does what the ops do.
        self._convolution = found[0] if found is not None and [found[1]] == self.norms else None

    def calibrate(self, x: Tensor) -> tuple[Tensor | None, Moments]:
        """The statistics for a batch; no output."""
        convolution = self._convolution
        if convolution is None or not fused.takes(x) or not fused.has_kernel("pw_bnstats", x):
            return self._calibrate_modules(x)
        z, mean, m2 = ops.pw_bnstats(x, convolution.weight)
        values = z.numel() // z.shape[1]
        if values < 2:
            raise _single_value(z)
        return None, Moments(mean, m2 / values, [values])

    def infer(self, x: Tensor, folded: Folded) -> Tensor:
        """Logits for a batch, normalised by given statistics."""
        convolution = self._convolution
        if convolution is None or not fused.takes(x) or not fused.has_kernel("bn_act_cat", x):
            return self._infer_modules(x, folded)
        z = functional.conv2d(x, convolution.weight)
        return cast(Tensor, self.classifier(ops.bn_act_cat(z, folded.scale, folded.shift)))


@contextmanager
def _lent(layers: Sequence[nn.Module], buffers: Sequence[dict[str, Tensor]]) -> Iterator[None]:
    """Layers with other buffers for some time."""
    own = [{name: getattr(layer, name) for name in lent} for layer, lent in zip(layers, buffers, strict=True)]
    try:
        _give(layers, buffers)
        yield
    finally:
        _give(layers, own)


def _give(layers: Sequence[nn.Module], buffers: Sequence[dict[str, Tensor]]) -> None:
    for layer, given in zip(layers, buffers, strict=True):
        for name, value in given.items():
            setattr(layer, name, value)


def _single_value(x: Tensor) -> InputError:
    return InputError(
        f"calibration: a normalisation layer gets a batch of shape {list(x.shape)}, one value a channel, which has no "
        "variance; give more images"
    )
