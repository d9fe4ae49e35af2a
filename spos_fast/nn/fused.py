"""When a choice block's modules can be run as one fused op, and running them so.

The modules stay what they are: parameters, buffers and state-dict names do not change, and running statistics move as
``torch.nn.BatchNorm2d`` moves them. ``calibrate`` and ``infer`` leave even those alone: statistics go out and come in
as tensors.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from spos_fast import ops
from spos_fast.nn.observation import observed, report
from spos_fast.ops.dispatch import OPS

_CONV, _NORM, _RELU = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
_FORWARDS = (_CONV.forward, _NORM.forward, _RELU.forward)  # what the ops stand in for
_PROJECTION = (_CONV, _NORM, _CONV, _NORM, _RELU)


@dataclass(frozen=True)
class Plan:
    """A block that an op computes.

    Attributes:
        op: name of the op in training; with ``_infer`` behind it, of the one with statistics folded in.
        layers: types of the branch's modules.
        depthwise: for every convolution of the branch whether it is depthwise.
        sliced: for every normalisation layer of the branch whether its channels are mid channels.
    """

    op: str
    layers: tuple[type[nn.Module], ...]
    depthwise: tuple[bool, ...]
    sliced: tuple[bool, ...]

    def strides(self, stride: int, projection: nn.Sequential | None) -> Iterator[tuple[bool, int]]:
        """Of every convolution whether it is depthwise, and its stride: the unit's in a branch's first depthwise."""
        first = self.depthwise.index(True)
        for position, depthwise in enumerate(self.depthwise):
            yield depthwise, stride if position == first else 1
        if projection is not None:
            yield True, stride
            yield False, 1


SHUFFLE = Plan(
    "shuffle_unit",
    (_CONV, _NORM, _RELU, _CONV, _NORM, _CONV, _NORM, _RELU),
    depthwise=(False, True, False),
    sliced=(True, True, False),
)
XCEPTION = Plan(
    "xception_unit",
    _PROJECTION * 3,
    depthwise=(True, False) * 3,
    sliced=(False, True, True, True, True, False),
)


def run(
    plan: Plan, x: Tensor, branch: nn.Sequential, projection: nn.Sequential | None, stride: int, mid: int | None = None
) -> Tensor | None:
    """The block's output by its op; None where only the modules will do.

    The op runs on images that are channels last, float32 or (on a GPU) under autocast, on devices that have a kernel:
    with batch statistics in all layers, or with running statistics in all layers where no gradient is wanted. Hooks on
    the branches or in them would not fire, and replaced forwards not be called, so they keep the modules; as does
    torch.compile, which fuses by itself.

    Args:
        plan: which block it is.
        x: [N, C, H, W].
        branch, projection: the block's branches.
        stride: of the block.
        mid: how many mid channels are used, the first ones; None for all. Running statistics move inside of the slice.
    """
    block = match(plan, branch, projection, stride, mid) if takes(x) else None
    if block is None:
        return None
    on_batch = list(map(_on_batch_statistics, block.norms))
    if all(on_batch) and has_kernel(plan.op, x):
        return _train(block, x, _wants_gradients(x, block))
    if not any(on_batch) and not _wants_gradients(x, block) and has_kernel(f"{plan.op}_infer", x):
        return _evaluate(block, x)
    return None


def match(
    plan: Plan, branch: nn.Sequential, projection: nn.Sequential | None, stride: int, mid: int | None = None
) -> Block | None:
    """The block's layers as its op takes them; None if the modules do something else than the op.

    Args: see :func:`run`. Whether the op takes the images (:func:`takes`) and has a kernel for them is not looked at.
    """
    branches = (branch,) if projection is None else (branch, projection)
    layers: list[nn.Module] = []
    for each in branches:
        if type(each) is not nn.Sequential or changed(each):
            return None
        layers += each.__dict__["_modules"].values()
    if tuple(map(type, layers)) != plan.layers + (() if projection is None else _PROJECTION):
        return None
    norms: list[nn.BatchNorm2d] = []
    weights: list[Tensor] = []
    strides = plan.strides(stride, projection)
    for layer in layers:
        if changed(layer):
            return None
        if isinstance(layer, _NORM):
            norms.append(layer)
        elif isinstance(layer, _CONV):
            weights.append(layer.weight)
            if not usual(layer, weights[-1], next(strides)):
                return None
    eps, affine = norms[0].eps, norms[0].affine
    for norm in norms:
        if norm.eps != eps or norm.affine != affine:
            return None
    return Block(plan, norms, weights, stride, mid)


def match_pointwise(layers: nn.Sequential) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The convolution and the normalisation of pointwise convolution, BN, ReLU; None if the modules are others, or do
    something else than the ops.
    """
    if tuple(map(type, layers)) != (_CONV, _NORM, _RELU) or any(map(changed, (layers, *layers))):
        return None
    convolution, norm = cast("nn.Conv2d", layers[0]), cast("nn.BatchNorm2d", layers[1])
    if not usual(convolution, convolution.weight, (False, 1)):
        return None
    return convolution, norm


def takes(x: Tensor) -> bool:
    """Whether the ops stand in for modules on x: channels-last images, nothing that wants to see the modules run."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() != 4 or not x.numel() or not _fits(x):
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return not _has_any_global_hook() and (_CONV.forward, _NORM.forward, _RELU.forward) == _FORWARDS


class Block(NamedTuple):
    """A block's layers: main branch, then projection."""

    plan: Plan
    norms: list[nn.BatchNorm2d]
    weights: list[Tensor]
    stride: int
    mid: int | None

    @property
    def used(self) -> int:
        """How many mid channels are used."""
        return self.weights[len(self.plan.sliced) - 1].shape[1] if self.mid is None else self.mid

    @property
    def arguments(self) -> list[Tensor | None]:
        """The weights as both ops take them: None for a projection that is not there."""
        projected = len(self.weights) > len(self.plan.sliced)
        return [*self.weights] if projected else [*self.weights, None, None]

    @property
    def main(self) -> list[Tensor]:
        """The main branch's weights, one for each of its normalisation layers."""
        return self.weights[: len(self.plan.sliced)]

    def keywords(self) -> dict[str, Any]:
        """Arguments of both ops that have names."""
        beside = self.weights[len(self.plan.sliced) :]
        return dict(projection=tuple(beside) if beside else None, mid=self.mid, stride=self.stride)

    def widths(self) -> list[int]:
        """Channels that are used of every normalisation layer."""
        return widths(self.plan, self.norms, self.mid)


def widths(plan: Plan, norms: Sequence[_BatchNorm], mid: int | None) -> list[int]:
    """How many channels a block uses of each of its normalisation layers, main branch before projection."""
    sliced = itertools.chain(plan.sliced, itertools.repeat(False))
    pairs = zip(norms, sliced, strict=False)
    return [mid if mid is not None and inner else norm.num_features for norm, inner in pairs]


def calibrate(block: Block, x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The block on batch statistics, which are handed out instead of moving the running ones.

    Args:
        block: its layers.
        x: [groups * N, C, H, W], which the op takes.
        groups: runs of N images, each with statistics of its own.

    Returns:
        The output; mean and variance (divided by the count) in front of the normalisation layers, both [groups,
        normalised], or [normalised] for one group, one layer behind the other; for every layer how many values a
        channel has.
    """
    norms, stride = block.norms, block.stride
    samples, _, height, width = x.shape
    samples //= groups
    counts = [samples * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)] * len(norms)
    for position in range(block.plan.depthwise.index(True)):  # layers in front of the stride
        counts[position] = samples * height * width
    gamma = beta = None
    if norms[0].affine:
        widths = block.widths()
        gamma, beta = (_joined([getattr(norm, name) for norm in norms], widths) for name in ("weight", "bias"))
    if torch.is_grad_enabled() or counts[-1] < 2:  # too few are refused
        keywords = block.keywords() | dict(eps=norms[0].eps, groups=groups)
        made = getattr(ops, block.plan.op)(x, *block.main, gamma, beta, **keywords)
        return made.out, made.mean, made.var, counts
    late = block.used, None, stride, norms[0].eps, False, groups
    out, _, mean, var = below_autograd(block.plan.op, x, *block.arguments, gamma, beta, *late)
    return out, mean, var, counts


def infer(block: Block, x: Tensor, scale: Tensor, shift: Tensor, groups: int = 1) -> Tensor:
    """The block with a scale and a shift in place of its normalisation layers; shapes as :func:`calibrate` gives."""
    late = block.used, None, block.stride, groups
    return cast(Tensor, below_autograd(f"{block.plan.op}_infer", x, *block.arguments, scale, shift, *late))


def below_autograd(op: str, *arguments: Any) -> Any:
    """Call an op where no gradient is wanted. What the public functions would check, :func:`match` has seen."""
    with torch._C._AutoDispatchBelowAutograd():
        return OPS[op].overload(*arguments)


def _evaluate(block: Block, x: Tensor) -> Tensor:
    """The block on running statistics."""
    norms = block.norms
    mean, var = ([norm.__dict__["_buffers"][name] for norm in norms] for name in ("running_mean", "running_var"))
    gamma, beta = _affine(norms)
    if has_kernel("unit_eval", x):
        given = x, block.weights, mean, var, gamma, beta, block.used, block.stride, norms[0].eps
        return cast(Tensor, below_autograd("unit_eval", *given))
    widths = None if block.mid is None else block.widths()
    scale = _joined(var, widths).add_(norms[0].eps).rsqrt_()
    if gamma:
        scale.mul_(_joined(gamma, widths))
    shift = _joined(mean, widths).mul_(scale).neg_()
    if beta:
        shift.add_(_joined(beta, widths))
    return infer(block, x, scale, shift)


def _train(block: Block, x: Tensor, wants_gradients: bool) -> Tensor:
    """The block on batch statistics, which move the running ones."""
    kept = None if observed() or not has_kernel("unit_train", x) else _running(block.norms)
    if kept is None:  # somebody observes the layers, or one has a rule of its own
        out, mean, var, counts = calibrate(block, x)
        widths = block.widths()
        move_statistics(block.norms, mean.split(widths), var.split(widths), counts)
        return out
    momenta, *running = kept
    torch.autograd.graph.increment_version([*running[0], *running[1], *running[2]])
    if not wants_gradients and x.shape[0] * -(-x.shape[2] // block.stride) * -(-x.shape[3] // block.stride) > 1:
        late = block.used, block.stride, block.norms[0].eps
        affine = _affine(block.norms)
        return cast(Tensor, below_autograd("unit_train", x, block.weights, *running, *affine, momenta, *late))
    out, mean, var, counts = calibrate(block, x)
    below_autograd("bn_update_running", *running, mean, var, block.widths(), counts, momenta)
    return out


def _affine(norms: Sequence[nn.BatchNorm2d]) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' weights and biases; empty lists if they have none."""
    if not norms[0].affine:
        return [], []
    return [norm.weight for norm in norms], [norm.bias for norm in norms]


def _running(norms: Sequence[nn.BatchNorm2d]) -> tuple[list[float], list[Tensor], list[Tensor], list[Tensor]] | None:
    """Momenta, running means, running variances and counters, if all layers move them by a fixed share."""
    momenta, means, variances, counters = [], [], [], []
    for norm in norms:
        own = norm.__dict__
        buffers, momentum = own["_buffers"], own["momentum"]
        mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        moves = own["training"] and own["track_running_stats"]
        if not moves or momentum is None or mean is None or var is None:
            return None
        if counter is not None and counter.dtype != torch.int64:
            return None
        if mean.dtype != torch.float32 or var.dtype != torch.float32:
            return None
        momenta.append(momentum)
        means.append(mean)
        variances.append(var)
        if counter is not None:
            counters.append(counter)
    return momenta, means, variances, counters


@torch.no_grad()
def move_statistics(
    norms: Sequence[nn.BatchNorm2d], means: Sequence[Tensor], variances: Sequence[Tensor], counts: Sequence[int]
) -> None:
    """Move layers' running statistics as their own forwards do, or hand the batch's to who recalibrates them.

    Args:
        norms: the layers.
        means, variances: of the batch, one a layer, of its first channels or of all; variances divided by the count.
        counts: values a channel.
    """
    if report(norms, means, variances, counts):
        return
    counters = [norm.num_batches_tracked for norm in norms if norm.training and norm.track_running_stats]
    tracked = [counter for counter in counters if counter is not None]
    if tracked:
        torch._foreach_add_(tracked, 1)
    running: list[Tensor] = []
    values: list[Tensor] = []
    kept: list[float] = []
    taken: list[float] = []
    for norm, mean, var, count in zip(norms, means, variances, counts, strict=True):
        moves = norm.training and norm.track_running_stats
        if not moves or norm.running_mean is None or norm.running_var is None:
            continue
        share = norm.momentum
        if share is None:  # the average of all batches
            share = 1 / float(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0
        whole = len(mean) == norm.num_features
        running += [value if whole else value[: len(mean)] for value in (norm.running_mean, norm.running_var)]
        values += [mean, var]
        kept += [1 - share] * 2
        taken += [share, share * count / (count - 1)]
    if running:
        torch._foreach_mul_(running, kept)
        torch._foreach_add_(running, torch._foreach_mul(values, taken))


def _joined(vectors: list[Any], widths: Sequence[int] | None) -> Tensor:
    """One vector behind the other; of each its first values, if ``widths`` says how many."""
    return torch.cat(
        vectors if widths is None else [vector[:width] for vector, width in zip(vectors, widths, strict=True)]
    )


def _fits(x: Tensor) -> bool:
    """On a CPU autocast keeps the modules: PyTorch's own bfloat16 convolutions use instructions that ours do not."""
    if torch.is_autocast_enabled(x.device.type):
        return x.device.type != "cpu" and x.dtype in (torch.float32, torch.get_autocast_dtype(x.device.type))
    return x.dtype == torch.float32


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether x's device has a kernel for the op, rather than the reference in plain PyTorch."""
    choice = OPS[op].choices.get(x.device.type)
    return choice is not None and choice.kernel != "reference"


def _wants_gradients(x: Tensor, block: Block) -> bool:
    if not torch.is_grad_enabled():
        return False
    affine = [value for norm in block.norms if norm.affine for value in (norm.weight, norm.bias)]
    return any(value.requires_grad for value in (x, *block.weights, *affine))


def _on_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    own = vars(norm)
    return own["training"] or (own["_buffers"]["running_mean"] is None and own["_buffers"]["running_var"] is None)


_hooks = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_form = operator.itemgetter("stride", "padding", "dilation", "groups", "padding_mode")


def usual(convolution: nn.Conv2d, weight: Tensor, expected: tuple[bool, int]) -> bool:
    """Whether a convolution is as the units make it; its attributes may have been changed, or another put in place."""
    depthwise, stride = expected
    channels, _, height, width = weight.shape
    own, padding = convolution.__dict__, width // 2
    return (
        height == width
        and (width % 2 == 1 if depthwise else width == 1)
        and _form(own) == ((stride, stride), (padding, padding), (1, 1), channels if depthwise else 1, "zeros")
        and own["_parameters"]["bias"] is None
        and weight.dtype == torch.float32
    )


def changed(module: nn.Module) -> bool:
    """Whether somebody hooked into a module, or gave it a forward of its own."""
    own = module.__dict__
    return "forward" in own or any(_hooks(own))
