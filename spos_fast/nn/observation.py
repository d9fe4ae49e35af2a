"""What the batch normalisation layers of a network see while it runs, without a second read of their inputs.

Calls of ``torch.nn.functional.batch_norm`` and ``torch.batch_norm`` on a layer's buffers are intercepted, whoever makes
them: the layer itself, or a module that runs a slice of it. The fused blocks report what they have computed anyway.
Layers with a forward of their own that goes neither way are watched by hooks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from spos_fast.errors import InputError
from spos_fast.ops import bn_moments

# Layer; which of its channels (None: all); mean and unbiased variance of the batch there; values a channel.
Receiver = Callable[[_BatchNorm, "slice | Tensor | None", Tensor, Tensor, int], None]

_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# Functions that normalise by statistics that they are given, with the order of their parameters.
_BATCH_NORMS: Mapping[Any, Sequence[str]] = {
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}
# No variance is negative: a layer that still has this one has not moved it.
_UNTOUCHED = -1.0


@contextmanager
def observing(names: Mapping[_BatchNorm, str], receive: Receiver) -> Iterator[None]:
    """Hand the batch statistics of layers to ``receive``, call by call, as long as the context lasts.

    Layers must be in training mode. Those whose statistics are seen as they are computed do not move their own; the
    others may, so the caller puts the buffers back. SyncBatchNorm runs on its own process' batch.

    Args:
        names: the layers, all with running statistics, and what to call them in errors.
        receive: takes the layer, its channels that ran (None for all), float32 or float64 mean and unbiased variance
            ``[channels]``, and the number of values a channel.
    """
    observer = _Observer(names, receive)
    token = _current.set(observer)
    try:
        with ExitStack() as stack:
            for layer in names:
                if "forward" in vars(layer) or type(layer).forward not in _PLAIN_FORWARDS:
                    stack.enter_context(_watched(layer, observer))
                elif isinstance(layer, nn.SyncBatchNorm):
                    stack.enter_context(_without_other_processes(layer))
            stack.enter_context(observer)
            yield
    finally:
        _current.reset(token)


def report(
    norms: Sequence[_BatchNorm], means: Sequence[Tensor], variances: Sequence[Tensor], counts: Sequence[int]
) -> bool:
    """For ops that normalise several layers: whether somebody observes them, who then has their statistics.

    Args:
        norms: the layers.
        means, variances: of the batch, one a layer, of its first channels or of all; variances divided by the count.
        counts: values a channel.
    """
    observer = _current.get()
    if observer is None or not all(norm in observer.names for norm in norms):
        return False
    for norm, mean, var, count in zip(norms, means, variances, counts, strict=True):
        observer.check_count(norm, count)
        channels = None if len(mean) == _size(norm) else slice(0, len(mean))
        observer.hand_over(norm, channels, mean, var * (count / (count - 1)), count)
    return True


def observed() -> bool:
    """Whether anybody observes any layer."""
    return _current.get() is not None


class _Observer(TorchFunctionMode):
    """Looks into every call of batch_norm on the buffers of the observed layers."""

    def __init__(self, names: Mapping[_BatchNorm, str], receive: Receiver) -> None:
        super().__init__()
        self.names = names
        self.calls: defaultdict[_BatchNorm, int] = defaultdict(int)
        self._receive = receive
        self._buffers: defaultdict[int, list[tuple[_BatchNorm, Tensor]]] = defaultdict(list)
        for layer in names:
            if layer.running_mean is not None:
                self._buffers[layer.running_mean.untyped_storage().data_ptr()].append((layer, layer.running_mean))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        parameters = _BATCH_NORMS.get(func)
        if parameters is not None:
            call = {**dict(zip(parameters, args, strict=False)), **(kwargs or {})}
            running_mean = call.get("running_mean")
            found = self._owner(running_mean) if isinstance(running_mean, Tensor) else None
            if found is not None:
                return self._batch_norm(*found, call)
        return func(*args, **(kwargs or {}))

    def hand_over(
        self, layer: _BatchNorm, channels: slice | Tensor | None, mean: Tensor, var: Tensor, count: int
    ) -> None:
        """Statistics of one call go to who wants them."""
        self.calls[layer] += 1
        self._receive(layer, channels, mean, var, count)

    def check_count(self, layer: _BatchNorm, count: int) -> None:
        """Refuse a call that has no variance."""
        if count < 2:
            raise InputError(
                f"batches: layer {self.names[layer]} gets {count or 'no'} value{'s' * (count != 1)} a channel from a "
                "batch, which has no variance; use larger batches, and drop_last=True in a loader whose last is smaller"
            )

    def _batch_norm(self, layer: _BatchNorm, channels: slice | None, call: Mapping[str, Any]) -> Tensor:
        """As in training, whatever the call says: a module that normalises by hand may pass its own training flag."""
        x, running_mean = call["input"], call["running_mean"]
        weight, bias, eps = call.get("weight"), call.get("bias"), call.get("eps", 1e-5)
        count = values_per_channel(x)
        self.check_count(layer, count)
        if running_mean.dtype in (torch.float32, torch.float64):
            # Momentum 1 leaves nothing of the zeros: these are the statistics that the batch is normalised with.
            mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_mean)
            out = functional.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
        else:  # they would be rounded to the half precision of the buffers
            mean, var = _moments(x)
            out = functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        self.hand_over(layer, channels, mean, var, count)
        return out

    def _owner(self, running_mean: Tensor) -> tuple[_BatchNorm, slice | None] | None:
        """The layer that a vector of running means is a view of, and which of its channels."""
        for layer, whole in self._buffers.get(running_mean.untyped_storage().data_ptr(), ()):
            start = running_mean.storage_offset() - whole.storage_offset()
            stop = start + len(running_mean)
            if start >= 0 and stop <= len(whole) and running_mean.stride() == whole.stride():
                return layer, None if len(running_mean) == len(whole) else slice(start, stop)
        return None


_current: ContextVar[_Observer | None] = ContextVar("observer", default=None)


def values_per_channel(x: Tensor) -> int:
    """Of a tensor ``[N, C, ...]``."""
    return x.numel() // x.shape[1]


@contextmanager
def _watched(layer: _BatchNorm, observer: _Observer) -> Iterator[None]:
    """A layer with a forward of its own: if batch_norm was not seen on its buffers, its input is read once more."""
    entered: list[tuple[int, Tensor, Tensor]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mean, var = _statistics(layer)
        entered.append((observer.calls[layer], mean.clone(), var.clone()))
        # A forward may read its statistics, so they stay, but for the variances of a layer that runs some channels.
        if _first(args, kwargs).shape[1] != len(var):
            var.fill_(_UNTOUCHED)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls, mean, var = entered.pop()
        x = _first(args, kwargs)
        new_mean, new_var = _statistics(layer)
        if x.shape[1] == len(var):
            moved = (new_mean != mean) | (new_var != var)
        else:
            moved = new_var != _UNTOUCHED
            new_var.copy_(var)
        if observer.calls[layer] != calls:
            return
        count = values_per_channel(x)
        observer.check_count(layer, count)
        channels, kept = _moved(moved.nonzero().flatten(), x.shape[1], layer, observer.names[layer])
        mean, var = _moments(x)
        if kept is not None:
            mean, var = mean[kept], var[kept]
        observer.hand_over(layer, channels, mean, var, count)

    hooks = (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _moved(moved: Tensor, width: int, layer: _BatchNorm, name: str) -> tuple[slice | Tensor | None, Tensor | None]:
    """The channels of a layer that ran, and which of the input's ``width`` channels they are (None: all), by those that
    its forward has ``moved``. A layer that masks its channels may use any of them, and not all that come in.
    """
    size = _size(layer)
    if width == size:
        # Half precision rounds small steps away: a channel that has not moved may have run.
        exact = _statistics(layer)[1].dtype in (torch.float32, torch.float64)
        return (moved, moved) if exact and 0 < len(moved) < size else (None, None)
    if len(moved) == width:
        return moved, None
    if len(moved) == 0 and width < size:
        return slice(0, width), None
    raise InputError(
        f"model: layer {name}, a {type(layer).__name__}, gets {width} channels and moves {len(moved)} of its {size} "
        "statistics; which belong together cannot be told, so leave it out by modules"
    )


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of an observed layer, which has them."""
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def _size(layer: _BatchNorm) -> int:
    """How many running means a layer has: subclasses may keep several for each of their features."""
    return len(_statistics(layer)[0])


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is called with."""
    return next(iter((*args, *kwargs.values())))


@contextmanager
def _without_other_processes(layer: nn.SyncBatchNorm) -> Iterator[None]:
    """SyncBatchNorm waits for all processes in training mode, and refuses a CPU; its base class does neither."""
    layer.forward = MethodType(_BatchNorm.forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel of ``[N, C, ...]``, at least float32."""
    mean, m2 = bn_moments(x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1))
    return mean[0], m2[0] / (values_per_channel(x) - 1)
