"""The SPOS ShuffleNetV2 path in plain PyTorch functions, over a dictionary of tensors with the published names.

Same mathematics as spos_fast.nn and spos_fast.supernet, none of their code: when those run on fused kernels, these
stay what eager PyTorch does. Names are looked up once (``unit_layers``, ``network_layers``), not in every forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]
Split = Callable[[Tensor], tuple[Tensor, Tensor]]


class Layer(NamedTuple):
    """A convolution and the statistics of the normalisation behind it (None where they are folded into it)."""

    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class Unit(NamedTuple):
    """One choice block: its branches (no projection at stride 1) and stride."""

    main: list[Layer]
    projection: list[Layer]
    stride: int


class Path(NamedTuple):
    """A whole network: stem, blocks, head, classifier."""

    stem: Layer
    units: list[Unit]
    head: Layer
    classifier: Tensor


def split_by_reshape(x: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd channels as the published code takes them: view, transpose, view; channels_last is lost."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels // 2, 2, height * width).permute(1, 0, 2)
    x = x.reshape(2, -1, channels // 2, height, width)
    return x[0], x[1]


def split_by_slices(x: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd channels as slices, which keep channels_last."""
    return x[:, ::2], x[:, 1::2]


def layer(state: State, conv: str, norm: str) -> Layer:
    """The tensors of a convolution and of the normalisation behind it, by their prefixes."""
    named = (f"{conv}.weight", f"{conv}.bias", f"{norm}.running_mean", f"{norm}.running_var")
    return Layer(state[named[0]], *(state.get(name) for name in named[1:]))


def unit_layers(state: State, prefix: str, stride: int) -> Unit:
    """The block whose names start with ``prefix``."""

    def branch_layers(name: str) -> list[Layer]:
        convs = [key for key, value in state.items() if key.startswith(f"{prefix}{name}.") and value.dim() == 4]
        places = sorted(int(key.removesuffix(".weight").rpartition(".")[2]) for key in convs)
        return [layer(state, f"{prefix}{name}.{at}", f"{prefix}{name}.{at + 1}") for at in places]

    return Unit(branch_layers("branch_main"), branch_layers("branch_proj"), stride)


def network_layers(state: State, prefixes: Sequence[str], strides: Sequence[int]) -> Path:
    """The path through the blocks with these prefixes, such as ``features.4.2.``."""
    units = [unit_layers(state, prefix, stride) for prefix, stride in zip(prefixes, strides, strict=True)]
    stem, head = layer(state, "first_conv.0", "first_conv.1"), layer(state, "conv_last.0", "conv_last.1")
    return Path(stem, units, head, state["classifier.0.weight"])


def conv_norm(
    x: Tensor, layer: Layer, training: bool, momentum: float, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """Convolution and normalisation; in training the running statistics move."""
    x = functional.conv2d(x, layer.weight, layer.bias, stride, padding, 1, groups)
    if layer.mean is None:
        return x
    return functional.batch_norm(x, layer.mean, layer.var, None, None, training, momentum)


def branch(x: Tensor, layers: Sequence[Layer], stride: int, training: bool, momentum: float = 0.1) -> Tensor:
    """One branch: ReLU after the 1x1 convolutions, the stride in the first depthwise one."""
    for layer in layers:
        kernel = layer.weight.shape[2]
        if kernel == 1:
            x = functional.relu_(conv_norm(x, layer, training, momentum))
        else:
            x = conv_norm(x, layer, training, momentum, stride, kernel // 2, layer.weight.shape[0])
            stride = 1
    return x


def unit(x: Tensor, block: Unit, training: bool, split: Split, momentum: float = 0.1) -> Tensor:
    """One choice block, batch statistics if training."""
    if block.projection:
        passed = branch(x, block.projection, block.stride, training, momentum)
    else:
        passed, x = split(x)
    return torch.cat((passed, branch(x, block.main, block.stride, training, momentum)), 1)


def network(
    images: Tensor, path: Path, training: bool, split: Split, momentum: float = 0.1, dropout: float = 0.1
) -> Tensor:
    """Images ``[N, 3, H, W]`` to logits.

    Args:
        images: the batch.
        path: of :func:`network_layers`.
        training: batch statistics, whose running averages move, and dropout.
        split: one of the split functions.
        momentum: of the running averages.
        dropout: probability before the classifier.
    """
    x = functional.relu_(conv_norm(images, path.stem, training, momentum, 2, 1))
    for block in path.units:
        x = unit(x, block, training, split, momentum)
    x = functional.relu_(conv_norm(x, path.head, training, momentum))
    x = functional.dropout(x.mean((2, 3)), dropout, training)
    return functional.linear(x, path.classifier)


def folded(layers: Sequence[Layer], epsilon: float = 1e-5) -> list[Layer]:
    """The layers for inference: running statistics multiplied into the convolutions."""
    result = []
    for weight, bias, mean, var in layers:
        assert bias is None and mean is not None and var is not None
        factor = (var + epsilon).rsqrt()
        scaled = (weight * factor[:, None, None, None].to(weight.dtype)).contiguous(memory_format=format_of(weight))
        result.append(Layer(scaled, (-mean * factor).to(weight.dtype), None, None))
    return result


def format_of(x: Tensor) -> torch.memory_format:
    """NCHW or channels_last; NCHW where both fit."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last
