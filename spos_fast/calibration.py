"""Batch-normalisation recalibration: statistics of a network from a fixed set of images.

A supernet's own running statistics mix all its paths and rank candidates at random; every candidate needs statistics of
its own (arXiv 1904.00420, section 3.4).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from spos_fast.errors import InputError
from spos_fast.nn.observation import observing

Mode = Literal["cumulative", "pooled", "ema"]
MODES: tuple[str, ...] = get_args(Mode)

# The published search resets the statistics and lets PyTorch's default momentum average over 200 batches.
_EMA_MOMENTUM = 0.1


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    mode: Mode = "cumulative",
    *,
    set_path: Callable[[Any], Any] | None = None,
    inputs: Hashable | Callable[[Any], Any] = None,
    images: int | None = None,
    device: str | torch.device | None = None,
    modules: Iterable[nn.Module] | None = None,
    forward: Callable[[Any], Any] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Set the statistics of batch normalisation from ``batches``, in one pass and without gradients.

    Takes any PyTorch model: BatchNorm1d, 2d, 3d and SyncBatchNorm, their subclasses, and layers that another module
    runs as a slice. Normalisation runs on batch statistics meanwhile, everything else (dropout, instance norm) as in
    evaluation. Statistics are merged in float64.

    All layers are recalibrated, whether they were in training or in evaluation mode; ``modules`` leaves some out, which
    then run on the statistics that they have. Layers, and channels of a layer, that no batch reaches keep theirs. A
    layer that is called several times in a forward counts every call as a batch (``pooled``: takes all values alike).
    Training flags, hooks and momenta are restored. If anything fails, Ctrl-C included, nothing has changed but the path
    that ``set_path`` has set.

    In several processes each one recalibrates with its own batches, SyncBatchNorm and DistributedDataParallel too: give
    all of them the same ones.

    Args:
        model: any network; only its normalisation layers change.
        batches: what the network is called with: tensors, tuples or lists that begin with one (also nested), dicts with
            ``inputs``. Any device and dtype that the model takes. Read once.
        mode: ``"cumulative"``: average of the batches' means and unbiased variances, all batches alike (momentum None).
            ``"pooled"``: mean and unbiased variance over all values of all batches, exact whatever their sizes.
            ``"ema"``: exponential average with momentum 0.1 from mean 0 and variance 1 on, as the published search.
        set_path: called once with the model before anything else: chooses the path of a supernet.
        inputs: where in a batch the network's input is: a key or an index, or a function of the batch.
        images: use at most that many images; the last batch is cut. Default: all. Fewer are no error.
        device: moves the inputs there, tensors in dicts, tuples and lists too; default: they stay where they are.
        modules: where to look for normalisation layers; default all of ``model``. A supernet's path is enough.
        forward: runs the network on one input; default ``model`` itself.
        allow_nonfinite: keep statistics that came out NaN or infinite, instead of refusing them.

    Raises:
        InputError: unknown mode, no normalisation layer with running statistics, none that runs, a lazy one that has
            not run yet, DataParallel on several devices, no batch, a batch that is no tensor, a layer that gets a
            single value a channel, statistics that are NaN or infinite, a scripted or traced model, inputs that cannot
            be moved to ``device``.
    """
    if mode not in MODES:
        raise InputError(f"mode: got {mode!r}; expected one of {', '.join(MODES)}")
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise InputError(f"images: got {images!r}; expected a positive number, or None for all")
    if isinstance(batches, Tensor):
        raise InputError("batches: got one tensor; expected batches, such as a DataLoader or images.split(128)")
    model = _unwrapped(model)
    if set_path is not None:
        set_path(model)
    roots = [model] if modules is None else list(modules)
    norms = list(dict.fromkeys(m for root in roots for m in root.modules() if isinstance(m, _BatchNorm)))
    names = _names(model, norms, roots, given=modules is not None)
    statistics = {layer: _Statistics(layer, mode) for layer in names}
    everything = dict.fromkeys(module for root in (model, *roots) for module in root.modules())

    with _as_before(everything, names), _eagerly():
        for module in everything:
            module.training = False
        for layer in norms:  # those without statistics too: a module may run them in its own layers' place
            layer.training = True
        for layer in names:
            layer.track_running_stats = True
        count = 0
        with observing(names, lambda layer, *seen: statistics[layer].take(*seen)):
            for x in _inputs(batches, inputs, images, device):
                (forward or model)(x)
                count += 1
        if count == 0:
            raise InputError("batches: there is none; recalibration needs at least one batch of images")
        results = {layer: made.result() for layer, made in statistics.items() if made.calls}
        if not results:
            raise InputError(f"model: none of its {len(names)} normalisation layers runs on the batches")
        if not allow_nonfinite:
            _check_finite(results, names)
    changes = []
    for layer, (seen, mean, var) in results.items():
        for buffer, value in ((layer.running_mean, mean), (layer.running_var, var)):
            assert buffer is not None
            changes.append((buffer, torch.where(seen, value, buffer.double()).to(buffer)))
        if layer.num_batches_tracked is not None:
            changes.append(
                (layer.num_batches_tracked, torch.full_like(layer.num_batches_tracked, statistics[layer].calls))
            )
    _change(changes)


class _Statistics:
    """Of everything that one layer has seen, channel by channel, in float64."""

    def __init__(self, layer: _BatchNorm, mode: Mode) -> None:
        assert layer.running_mean is not None
        zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)  # may hold more than num_features
        self.calls = 0
        self._mode = mode
        # Pooled: values, mean, squared distances from it. Cumulative: calls, sums. Exponential: calls, averages.
        self._weight, self._mean = zeros, zeros.clone()
        self._var = torch.ones_like(zeros) if mode == "ema" else zeros.clone()

    def take(self, channels: slice | Tensor | None, mean: Tensor, var: Tensor, count: int) -> None:
        """One call: mean and unbiased variance of ``count`` values for each of the channels; None: of all of them."""
        self.calls += 1
        if channels is None:
            self._merge(self._weight, self._mean, self._var, mean, var, count)
            return
        weight, kept, spread = self._weight[channels], self._mean[channels], self._var[channels]
        self._merge(weight, kept, spread, mean, var, count)
        self._weight[channels], self._mean[channels], self._var[channels] = weight, kept, spread

    def _merge(self, weight: Tensor, kept: Tensor, spread: Tensor, mean: Tensor, var: Tensor, count: int) -> None:
        if self._mode == "pooled":  # Chan, Golub and LeVeque (1979)
            share = count / weight.add_(count)
            delta = mean - kept
            kept.addcmul_(delta, share)
            spread.add_(var, alpha=count - 1)
            spread.add_(delta.square_().mul_(1 - share), alpha=count)
            return
        weight.add_(1)
        alpha = 1.0
        if self._mode == "ema":
            alpha = _EMA_MOMENTUM
            kept.mul_(1 - alpha)
            spread.mul_(1 - alpha)
        kept.add_(mean, alpha=alpha)
        spread.add_(var, alpha=alpha)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which channels were seen, their mean and their unbiased variance."""
        seen = self._weight > 0
        if self._mode == "ema":
            return seen, self._mean, self._var
        if self._mode == "pooled":
            return seen, self._mean, self._var / (self._weight - 1)
        return seen, self._mean / self._weight, self._var / self._weight


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without the wrappers of several devices: they split batches, and copy buffers between processes."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise InputError(
            f"model: got DataParallel on {len(model.device_ids)} devices, of which only the first would be heard; pass "
            "model.module"
        )
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _names(model: nn.Module, norms: list[_BatchNorm], roots: Sequence[nn.Module], given: bool) -> dict[_BatchNorm, str]:
    """The layers of ``roots`` (``given`` as modules) that have running statistics, with their names.

    Raises:
        InputError: there is none, or one that does not know its channels yet, or one in scripted code.
    """
    argument = "modules" if given else "model"
    for module in (module for root in roots for module in root.modules()):
        if isinstance(module, torch.jit.ScriptModule) and (module is model or "BatchNorm" in module.original_name):
            raise InputError(
                f"{argument}: got a scripted or traced {module.original_name}, which cannot be looked into; "
                "recalibrate the module that it was made from"
            )
    known: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    names = {
        layer: known.get(layer) or type(layer).__name__
        for layer in norms
        if layer.running_mean is not None and layer.running_var is not None
    }
    if not names:
        raise InputError(
            f"{argument}: has no batch normalisation with running statistics, so there is nothing to recalibrate"
        )
    for layer, name in names.items():
        if layer.running_mean is not None and is_lazy(layer.running_mean):
            raise InputError(
                f"model: {name} is a {type(layer).__name__} that does not know its channels; run the model once before"
            )
    return names


@contextmanager
def _as_before(modules: Iterable[nn.Module], layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Training flags of the modules and everything of the layers are put back."""
    flags = [(module, module.training) for module in modules]
    tracked = [(layer, layer.track_running_stats) for layer in layers]
    buffers = [
        (layer, name, buffer, buffer.clone()) for layer in layers for name, buffer in layer.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
        for layer, tracks in tracked:
            layer.track_running_stats = tracks
        for layer, name, buffer, _ in buffers:
            if getattr(layer, name) is not buffer:  # some forwards put another tensor in its place
                setattr(layer, name, buffer)
        _put_back([(buffer, value) for _, _, buffer, value in buffers])


def _change(changes: list[tuple[Tensor, Tensor]]) -> None:
    """Give all of the tensors their new values; if that is interrupted, none."""
    before = [(tensor, tensor.clone()) for tensor, _ in changes]
    try:
        for tensor, value in changes:
            tensor.copy_(value)
    except BaseException:
        _put_back(before)
        raise


def _put_back(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give tensors their old values. An interruption has to wait: each is tried again, and then the others follow."""
    failure: BaseException | None = None
    for tensor, value in before:
        for _ in range(2):
            try:
                tensor.copy_(value)
                break
            except BaseException as error:
                failure = error
    if failure is not None:
        raise failure


def _eagerly() -> Any:
    """Compiled parts of the model run as they were written: compiled code cannot be looked into."""
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _inputs(
    batches: Iterable[Any], where: Hashable | Callable[[Any], Any], images: int | None, device: Any
) -> Iterator[Any]:
    left = images
    for batch in batches:
        x = where(batch) if callable(where) else _tensor(batch, where)
        if left is not None:
            if not isinstance(x, Tensor):
                raise InputError(f"images: cannot be counted in a {type(x).__name__}; let inputs return a tensor")
            x = x[:left]
            left -= len(x)
        yield x if device is None else _on(x, device)
        if left == 0:
            return


def _on(x: Any, device: Any) -> Any:
    """An input, and the tensors of a container, on the device."""
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    if hasattr(x, "to"):
        return x.to(device)
    if isinstance(x, Mapping):
        return {key: _on(value, device) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_on(value, device) for value in x))
    if isinstance(x, (tuple, list)):
        return type(x)(_on(value, device) for value in x)
    if x is None or isinstance(x, (str, bytes, int, float)):
        return x
    raise InputError(f"device: a {type(x).__name__} cannot be moved; let inputs return tensors, or do it in forward")


def _tensor(batch: Any, where: Hashable) -> Tensor:
    """The network's input in a batch: at ``where``, or what a tuple or list begins with."""
    part = batch
    if where is not None:
        try:
            part = batch[where]
        except (KeyError, IndexError, TypeError):
            keys = f" with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
            raise InputError(f"inputs: got {where!r}, which is not in a batch: {type(batch).__name__}{keys}") from None
    while isinstance(part, (tuple, list)) and part:
        part = part[0]
    if isinstance(part, Mapping):
        raise InputError(f"batches: got a dict; name the images in it by inputs, one of {', '.join(map(repr, part))}")
    if not isinstance(part, Tensor):
        raise InputError(
            f"batches: got a {type(part).__name__}; expected tensors, or tuples that begin with one (see inputs)"
        )
    return part


def _check_finite(results: Mapping[_BatchNorm, Any], names: Mapping[_BatchNorm, str]) -> None:
    # A sum is finite where all of its terms are. One transfer from the device for all layers.
    sums = [torch.where(seen, mean + var, 0).sum() for seen, mean, var in results.values()]
    finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().tolist()
    wrong = [names[layer] for layer, fine in zip(results, finite, strict=True) if not fine]
    if wrong:
        raise InputError(
            f"batches: NaN or infinite values reach {len(wrong)} of {len(results)} normalisation layers, {wrong[0]} "
            "among them; clean the images (or the weights), or keep such statistics with allow_nonfinite=True"
        )
