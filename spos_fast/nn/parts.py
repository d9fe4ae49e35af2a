"""Modules that hand out their batch statistics and take statistics in, with no change to their own buffers.

What :class:`spos_fast.Evaluator` builds its tree of: many architectures run the same module on different inputs, each
with statistics of its own, which the module's one set of running statistics cannot hold.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.nn import fused
from spos_fast.nn.observation import observing
from spos_fast.nn.units import Unit
from spos_fast.supernet import Supernet
from spos_fast.threads import one_thread

# A module that lends its buffers to one path can run in one thread at a time.
_lending = threading.RLock()


class Moments(NamedTuple):
    """Statistics of one batch in front of a part's normalisation layers, in their order.

    Attributes:
        mean: vectors, float32 (float64 for float64); neighbouring layers with equal counts stand in one.
        var: likewise, divided by the count.
        counts: values a channel, one a vector.
    """

    mean: list[Tensor]
    var: list[Tensor]
    counts: list[int]


class Statistics(NamedTuple):
    """What a part's normalisation layers normalise by, one layer behind the other; all [normalised].

    Attributes:
        mean, var: of the layers' inputs, float64.
        scale: ``weight / sqrt(var + eps)``, float32; None for parts that do not fuse.
        shift: likewise ``bias - mean * scale``.
    """

    mean: Tensor
    var: Tensor
    scale: Tensor | None
    shift: Tensor | None


class Part:
    """A module of a path with one setting, to be run on batch statistics or on given ones.

    A part knows the module as it was when the part was made. It must be in evaluation mode, its normalisation layers
    too, and gradients off. Units run as fused ops where those give the same; everything else runs its own forward, with
    other buffers in its normalisation layers for that time. Layers without running statistics normalise by those of
    their batch, as they always do.

    Args:
        module: called with its input, and with ``setting`` unless that is None. If it has a method ``running``, that
            gives the modules inside of it that run with a setting: the others' normalisation layers are left alone.
        setting: how it runs; a unit's number of mid channels.

    Attributes:
        key: equal for parts that run the same.
        norms: normalisation layers with running statistics that run.
        widths: how many of their channels are used.
        fuses: whether :meth:`infer` normalises by scale and shift, if the images allow it.
    """

    def __init__(self, module: nn.Module, setting: int | tuple[int, ...] | None = None) -> None:
        self.module, self.setting = module, setting
        self.key: tuple[nn.Module, int | tuple[int, ...] | None] = (module, setting)
        roots: list[nn.Module] = [module]
        if setting is not None and hasattr(module, "running"):
            roots = cast(Any, module).running(setting)
        layers = [layer for root in roots for layer in root.modules() if isinstance(layer, _BatchNorm)]
        self.norms = [layer for layer in layers if layer.running_mean is not None]
        self.widths = [layer.num_features for layer in self.norms]
        self._block: fused.Block | None = None
        own_forward = type(module).forward is not Unit.forward or fused.changed(module)
        if isinstance(module, Unit) and not own_forward and self.norms == layers:
            mid = cast("int | None", setting)
            self.widths, self._block = module.normalised(mid), module.matched(mid)
        self.fuses = self._block is not None

    def concurrent(self, images: Tensor) -> bool:
        """Whether several threads can run the part at once: on the CPU, as ops, for which no layer lends its buffers.

        Args:
            images: some that go into the network, channels last.
        """
        # One op stands for all: they have kernels together or none has.
        on_kernels = images.device.type == "cpu" and fused.takes(images) and fused.has_kernel("pw_bnstats", images)
        return self.fuses and on_kernels

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights and biases of all normalisation layers, one behind the other; None without."""
        gamma, beta = (
            [getattr(layer, name)[:width] for layer, width in zip(self.norms, self.widths, strict=True) if layer.affine]
            for name in ("weight", "bias")
        )
        return (torch.cat(gamma), torch.cat(beta)) if gamma else (None, None)

    def calibrate(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor | None, Moments]]:
        """For batches of one shape the outputs, normalised by the batch's own statistics, and these.

        Several batches run as one call of the fused op.

        Returns:
            For each batch the output (None where only the statistics are of use) and the statistics.

        Raises:
            InputError: a layer gets a single value a channel, which has no variance, or runs twice.
        """
        block, groups, x = self._block, len(inputs), inputs[0]
        if block is None or not _taken(inputs) or not fused.has_kernel(block.plan.op, x):
            return [self._calibrate_modules(x) for x in inputs]
        # The least that a layer of the unit can get.
        if x.shape[0] * -(-x.shape[2] // block.stride) * -(-x.shape[3] // block.stride) < 2:
            raise single_value(x)
        out, mean, var, counts = fused.calibrate(block, _stacked(inputs), groups)
        if groups == 1:
            return [(out, self._moments(mean, var, counts))]
        vectors = zip(mean.unbind(), var.unbind(), strict=True)
        moments = [self._moments(m, v, counts) for m, v in vectors]
        return list(zip(out.split(len(x)), moments, strict=True))

    def _moments(self, mean: Tensor, var: Tensor, counts: list[int]) -> Moments:
        """Those of a unit, whose layers have one count or, in front of the stride and behind it, several."""
        first, last = counts[0], counts[-1]
        if first == last:
            return Moments([mean], [var], [first])
        changes = [at for at in range(1, len(counts)) if counts[at] != counts[at - 1]]
        sizes = [sum(self.widths[a:b]) for a, b in itertools.pairwise((0, *changes, len(counts)))]
        return Moments(list(mean.split(sizes)), list(var.split(sizes)), [counts[a] for a in (0, *changes)])

    def infer(self, inputs: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[Tensor]:
        """For batches of one shape the outputs, each normalised by given statistics."""
        block, groups, x = self._block, len(inputs), inputs[0]
        if block is None or not _taken(inputs) or not fused.has_kernel(f"{block.plan.op}_infer", x):
            return [self._infer_modules(*pair) for pair in zip(inputs, statistics, strict=True)]
        if groups == 1:
            given = statistics[0]
            return [fused.infer(block, x, cast(Tensor, given.scale), cast(Tensor, given.shift))]
        scales, shifts = ([cast(Tensor, getattr(each, name)) for each in statistics] for name in ("scale", "shift"))
        made = fused.infer(block, _stacked(inputs), torch.stack(scales), torch.stack(shifts), groups)
        return list(made.split(len(x)))

    def _run(self, x: Tensor) -> Tensor:
        # Others read x too, and a module may write to its input, or return it for the next one to write to.
        x = x.clone()
        return cast(Tensor, self.module(x) if self.setting is None else self.module(x, self.setting))

    def _calibrate_modules(self, x: Tensor) -> tuple[Tensor, Moments]:
        with _lending:
            return self._calibrate_lending(x)

    def _calibrate_lending(self, x: Tensor) -> tuple[Tensor, Moments]:
        seen: dict[_BatchNorm, tuple[Tensor, Tensor, int]] = {}

        def take(layer: _BatchNorm, channels: slice | Tensor | None, mean: Tensor, var: Tensor, count: int) -> None:
            if layer in seen:
                raise InputError("net: a normalisation layer runs twice in one forward; its statistics are not defined")
            if channels is not None:  # of those that do not run, mean 0 and variance 1
                some = mean, var
                mean, var = mean.new_zeros(layer.num_features), var.new_ones(layer.num_features)
                mean[channels], var[channels] = some
            seen[layer] = mean, var * ((count - 1) / count), count

        if not self.norms:
            return self._run(x), Moments([], [], [])
        running = set(self.norms)
        names = {layer: name for name, layer in self.module.named_modules() if layer in running}
        copies = [{name: value.clone() for name, value in layer.named_buffers(recurse=False)} for layer in self.norms]
        try:
            with _lent(self.norms, copies), observing(names, take):
                for layer in self.norms:
                    layer.training = True
                out = self._run(x)
        finally:
            for layer in self.norms:
                layer.training = False
        # Of a layer that did not run nothing is read.
        unseen = [(torch.zeros_like(copy["running_mean"]), torch.ones_like(copy["running_var"]), 2) for copy in copies]
        made = [seen.get(layer, kept) for layer, kept in zip(self.norms, unseen, strict=True)]
        means = [mean[:width] for (mean, _, _), width in zip(made, self.widths, strict=True)]
        variances = [var[:width] for (_, var, _), width in zip(made, self.widths, strict=True)]
        return out, Moments(means, variances, [count for *_, count in made])

    def _infer_modules(self, x: Tensor, statistics: Statistics) -> Tensor:
        means, variances = statistics.mean.split(self.widths), statistics.var.split(self.widths)
        with _lending:
            buffers = []
            for layer, mean, var in zip(self.norms, means, variances, strict=True):
                dtype = cast(Tensor, layer.running_mean).dtype
                buffers.append({"running_mean": mean.to(dtype), "running_var": var.to(dtype)})
            with _lent(self.norms, buffers):
                return self._run(x)


class HeadPart(Part):
    """The end of a supernet: its last convolution, then its classifier.

    A pointwise convolution with normalisation and ReLU runs with the ops ``pw_bnstats`` and ``bn_normalize``. Nothing
    behind its normalisation takes statistics, so calibration stops there; where there is no last convolution
    (``nn.Identity``), before it begins.

    Args:
        net: whose end it is.
    """

    def __init__(self, net: Supernet) -> None:
        last, self.classifier = net.conv_last, _Classifier(net)
        super().__init__(nn.Sequential(last, self.classifier))
        self.key, self._net = (last, None), net
        found = fused.match_pointwise(last) if type(last) is nn.Sequential else None
        # None unless the last convolution does what the ops do.
        self._convolution = found[0] if found is not None and [found[1]] == self.norms else None
        self.fuses = self._convolution is not None
        untouched = not any(map(fused.changed, (last, *self.classifier.modules())))
        self._only_classifies = type(last) is nn.Identity and not self.norms and untouched

    def concurrent(self, images: Tensor) -> bool:
        """Likewise; the classifier must be made of layers that threads can share, with nobody looking on."""
        net = self._net
        if type(net).classify is not Supernet.classify or "classify" in vars(net):
            return False
        kinds = (nn.Linear, nn.Sequential, nn.Dropout, nn.Identity, nn.Flatten)
        layers = [*net.dropout.modules(), *net.classifier.modules()]
        shared = self._only_classifies or super().concurrent(images)
        return shared and all(type(x) in kinds and not fused.changed(x) for x in layers)

    def calibrate(self, inputs: Sequence[Tensor]) -> list[tuple[Tensor | None, Moments]]:
        """For each batch its statistics, and no output."""
        convolution, x = self._convolution, inputs[0]
        if self._only_classifies:
            return [(None, Moments([], [], [])) for _ in inputs]
        if convolution is None or not _taken(inputs) or not fused.has_kernel("pw_bnstats", x):
            return [self._calibrate_modules(x) for x in inputs]
        values = x.numel() // x.shape[1]
        if values < 2:
            raise single_value(x)
        made = [ops.pw_bnstats(x, convolution.weight) for x in inputs]
        return [(None, Moments([mean], [m2 / values], [values])) for _, mean, m2 in made]

    def infer(self, inputs: Sequence[Tensor], statistics: Sequence[Statistics]) -> list[Tensor]:
        """Logits for each batch, normalised by given statistics."""
        convolution, x = self._convolution, inputs[0]
        if self._only_classifies:
            return [self._classify(x.clone()) for x in inputs]  # a classifier may write to its input
        if convolution is None or not _taken(inputs) or not fused.has_kernel("bn_normalize", x):
            return [self._infer_modules(*pair) for pair in zip(inputs, statistics, strict=True)]
        logits = []
        for x, given in zip(inputs, statistics, strict=True):
            on_cpu = x.device.type == "cpu"
            z = ops.pw_bnstats(x, convolution.weight).z if on_cpu else functional.conv2d(x, convolution.weight)
            scale, shift = cast(Tensor, given.scale), cast(Tensor, given.shift)
            y = ops.bn_normalize(z, scale[None], shift[None], relu=True)
            logits.append(self._classify(y))
        return logits

    def _classify(self, x: Tensor) -> Tensor:
        # On the CPU bits must not depend on how many threads there are, as oneDNN's and MKL's do.
        with one_thread() if x.device.type == "cpu" else nullcontext():
            return cast(Tensor, self.classifier(x))


class _Classifier(nn.Module):
    """What a supernet has behind its last convolution."""

    def __init__(self, net: Supernet) -> None:
        super().__init__()
        self.dropout, self.classifier = net.dropout, net.classifier
        self._classify = net.classify

    def forward(self, x: Tensor) -> Tensor:
        return self._classify(x)


def _taken(inputs: Sequence[Tensor]) -> bool:
    """Whether the ops take all the inputs, as groups of one batch."""
    return all(x.shape == inputs[0].shape and fused.takes(x) for x in inputs)


def _stacked(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat(list(inputs))


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


def single_value(x: Tensor) -> InputError:
    """The error of a batch that leaves a normalisation layer one value a channel."""
    return InputError(
        f"calibration: a normalisation layer gets a batch of shape {list(x.shape)}, one value a channel, which has no "
        "variance; give more images"
    )
