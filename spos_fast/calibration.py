"""Batch-normalisation recalibration: statistics of a network from a fixed set of images.

A supernet's own running statistics mix all its paths and rank candidates at random; every candidate needs statistics of
its own (arXiv 1904.00420, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spos_fast.errors import InputError
from spos_fast.ops import bn_moments

Mode = Literal["cumulative", "pooled", "ema"]
MODES: tuple[str, ...] = get_args(Mode)

# The published search resets the statistics and lets PyTorch's default momentum average over 200 batches.
_EMA_MOMENTUM = 0.1


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    mode: Mode = "cumulative",
    *,
    modules: Iterable[nn.Module] | None = None,
    forward: Callable[[Tensor], Any] | None = None,
) -> None:
    """Reset the statistics of batch normalisation and set them from ``batches``, without gradients.

    Normalisation runs on batch statistics meanwhile; everything else (dropout) as in evaluation. Training flags and
    momenta are restored. If anything fails, the old statistics are put back.

    Args:
        model: any network; only its normalisation layers change.
        batches: image batches, or tuples that start with one. Any device and dtype that the model takes.
        mode: ``"cumulative"``: average of the batches' means and unbiased variances, all batches alike (momentum None).
            ``"pooled"``: mean and unbiased variance over all values of all batches, exact whatever their sizes.
            ``"ema"``: exponential average with momentum 0.1, as the published search.
        modules: where to look for normalisation layers; default all of ``model``. A supernet's path is enough.
        forward: runs the network on one batch; default ``model`` itself.

    Raises:
        InputError: unknown mode, no normalisation layer with running statistics, or no batch.
    """
    if mode not in MODES:
        raise InputError(f"mode: got {mode!r}; expected one of {', '.join(MODES)}")
    roots = [model] if modules is None else list(modules)
    layers = list(dict.fromkeys(m for root in roots for m in root.modules() if isinstance(m, _BatchNorm)))
    layers = [layer for layer in layers if layer.running_mean is not None]
    if not layers:
        raise InputError(
            "model: has no batch normalisation with running statistics, so there is nothing to recalibrate"
        )

    flags = [(module, module.training) for root in roots for module in root.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    pools = [_Pool() for _ in layers] if mode == "pooled" else []
    hooks = [layer.register_forward_pre_hook(pool.hook) for layer, pool in zip(layers, pools, strict=False)]
    done = False
    try:
        for module, _ in flags:
            module.training = False
        for layer in layers:
            layer.training = True
            layer.reset_running_stats()
            # Pooled statistics are set at the end; momentum 0 keeps the layer from spending time on its own.
            layer.momentum = {"cumulative": None, "ema": _EMA_MOMENTUM, "pooled": 0.0}[mode]
        count = 0
        with torch.no_grad():
            for batch in batches:
                (forward or model)(batch if isinstance(batch, Tensor) else batch[0])
                count += 1
        if count == 0:
            raise InputError("batches: there is none; recalibration needs at least one batch of images")
        for layer, pool in zip(layers, pools, strict=False):
            pool.write(layer)
        done = True
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in flags:
            module.training = training
        if not done:
            for layer, buffers in zip(layers, before, strict=True):
                for name, value in buffers.items():
                    getattr(layer, name).copy_(value)


class _Pool:
    """Moments of everything that one layer has seen, merged by Chan's rule in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        self.mean: Tensor | None = None
        self.m2: Tensor | None = None

    def hook(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        mean, m2 = bn_moments(x.reshape(*x.shape[:2], -1, 1) if x.dim() != 4 else x)
        mean, m2, count = mean[0].double(), m2[0].double(), x.numel() // x.shape[1]
        if self.mean is None or self.m2 is None:
            self.mean, self.m2 = mean, m2
        else:
            total = self.count + count
            delta = mean - self.mean
            self.mean = self.mean + delta * (count / total)
            self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.count += count
        self.batches += 1

    def write(self, layer: _BatchNorm) -> None:
        if self.mean is None or self.m2 is None:
            return
        # A layer that runs as a slice has seen its first channels only.
        layer.running_mean[: len(self.mean)] = self.mean  # type: ignore[index]
        layer.running_var[: len(self.mean)] = self.m2 / max(self.count - 1, 1)  # type: ignore[index]
        layer.num_batches_tracked.fill_(self.batches)  # type: ignore[union-attr]
