"""Convolutions with quantized weights and activations, 1 to 8 bits, and the residual block made of them.

A layer can have several bit-widths for each; a call picks one of them by its index. Weights are stored once, in float;
what depends on the bits (the steps) are vectors with an entry for each bit-width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.nn.plain_quant import fake_quant, quantize_weights
from spos_fast.nn.sliced import SlicedBatchNorm2d, SlicedConv2d
from spos_fast.ops import sliced_conv2d

ACT_QUANTIZERS = ("pact", "pact_residual", "lsq", "lsq+")
WEIGHT_QUANTIZERS = ("dorefa", "lsq")
Bits = int | Sequence[int]
Index = int | Tensor

# Mean magnitude of a standard normal value, and of one behind a ReLU.
_MEAN_NORMAL = math.sqrt(2 / math.pi)
_MEAN_RECTIFIED = 1 / math.sqrt(2 * math.pi)


class QuantAct(nn.Module):
    """Fake-quantizes activations with a learned step: see :func:`spos_fast.ops.fake_quant`.

    Steps start at LSQ's ``2 mean|x| / sqrt(high)`` (a single signed bit: ``mean|x|``) of a standard normal input,
    behind a ReLU unless ``signed``; PACT's clipping level at ``high`` such steps. :func:`initialize_steps` takes them
    from data.

    Args:
        bits: 1 to 8, or a list of all that can be chosen at a call.
        quantizer: pact, pact_residual, lsq or lsq+.
        signed: whether codes are signed (lsq and lsq+ only); otherwise negative values become 0.
        channels: None for one step, or the number of channels for a step each.

    Attributes:
        step: [K], or [K, channels], an entry for each of the K bit-widths: PACT's clipping level or LSQ's step.
        offset: likewise, of lsq+; else None.

    Raises:
        InputError: bits out of range, or a quantizer that is not there.
    """

    bits_vector: Tensor
    offset: nn.Parameter | None

    def __init__(
        self, bits: Bits, *, quantizer: str = "pact", signed: bool = False, channels: int | None = None
    ) -> None:
        super().__init__()
        self.bits = checked_bits("bits", bits)
        _check_name("quantizer", quantizer, ACT_QUANTIZERS)
        if signed and quantizer.startswith("pact"):
            raise InputError(f"signed: {quantizer} clips at 0 and has unsigned codes; use lsq or lsq+")
        self.quantizer, self.signed, self.channels = quantizer, signed, channels
        self.register_buffer("bits_vector", torch.tensor(self.bits, dtype=torch.int32), persistent=False)
        shape = [len(self.bits)] if channels is None else [len(self.bits), channels]
        self.step = nn.Parameter(torch.empty(shape))
        self.register_parameter("offset", nn.Parameter(torch.zeros(shape)) if quantizer == "lsq+" else None)
        self.start_at(torch.tensor(_MEAN_NORMAL if signed else _MEAN_RECTIFIED))

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> None:
        """Set all steps from the mean magnitude of the values, [] or [channels]."""
        starts = start_steps(self.bits, mean, self.signed)
        if self.quantizer.startswith("pact"):
            starts = [start * (2**k - 1) for start, k in zip(starts, self.bits, strict=True)]
        for entry, start in zip(self.step, starts, strict=True):
            entry.copy_(start)

    def forward(self, x: Tensor, index: Index = 0) -> Tensor:
        """The values of x rounded to the codes of the bit-width with this index, an int or an integer tensor []."""
        axis = None if self.channels is None else 1
        return fake_quant(
            x,
            self.step,
            self.bits_vector,
            index=index,
            mode=self.quantizer,
            signed=self.signed,
            offset=self.offset,
            axis=axis,
        )

    def extra_repr(self) -> str:
        """Bits and quantizer."""
        return f"bits={list(self.bits)}, quantizer={self.quantizer}" + (", signed" if self.signed else "")


class QuantConv2d(SlicedConv2d):
    """``torch.nn.Conv2d`` on quantized weights and a quantized input.

    State-dict names are those of ``torch.nn.Conv2d``, and ``act.step`` (``act.offset``) and ``weight_step`` of the
    quantizers that have them. Like :class:`SlicedConv2d` it can use the first of its channels only.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as ``torch.nn.Conv2d`` has
            them.
        weight_bits: 1 to 8, or a list of all that can be chosen at a call.
        act_bits: likewise, of the input.
        weight_quantizer: dorefa or lsq.
        act_quantizer: pact, pact_residual, lsq or lsq+.
        per_channel: whether weights have a step (DoReFa: a maximum) for each output channel.
        signed_act: whether the input can be negative (lsq and lsq+ only); otherwise negative values become 0.
        device, dtype: of the parameters; steps are float32 (float64 for float64).

    Attributes:
        act: the :class:`QuantAct` of the input.
        weight_step: [K], or [K, out_channels], of lsq; else None.

    Raises:
        InputError: bits out of range, or a quantizer that is not there.
    """

    weight_bits_vector: Tensor
    weight_step: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        weight_bits: Bits = 4,
        act_bits: Bits = 4,
        weight_quantizer: str = "dorefa",
        act_quantizer: str = "pact",
        per_channel: bool = False,
        signed_act: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.weight_bits = checked_bits("weight_bits", weight_bits)
        checked_bits("act_bits", act_bits)
        _check_name("weight_quantizer", weight_quantizer, WEIGHT_QUANTIZERS)
        _check_name("act_quantizer", act_quantizer, ACT_QUANTIZERS)
        self.weight_quantizer, self.per_channel = weight_quantizer, per_channel
        steps_dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.act = QuantAct(act_bits, quantizer=act_quantizer, signed=signed_act).to(device, steps_dtype)
        vector = torch.tensor(self.weight_bits, dtype=torch.int32, device=device)
        self.register_buffer("weight_bits_vector", vector, persistent=False)
        self.register_parameter("weight_step", None)
        if weight_quantizer == "lsq":
            shape = [len(self.weight_bits)] + ([out_channels] if per_channel else [])
            self.weight_step = nn.Parameter(torch.empty(shape, device=device, dtype=steps_dtype))
            self.start_weight_steps()

    @torch.no_grad()
    def start_weight_steps(self) -> None:
        """Set the steps of lsq from the weights, as LSQ does: ``2 mean|w| / sqrt(high)``; no others are there."""
        if self.weight_step is None:
            return
        magnitude = self.weight.abs()
        mean = magnitude.mean((1, 2, 3)) if self.per_channel else magnitude.mean()
        for entry, start in zip(self.weight_step, start_steps(self.weight_bits, mean, True), strict=True):
            entry.copy_(start)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, **quantizers: Any) -> QuantConv2d:
        """A quantized convolution with the parameters of a plain one, which it shares.

        Args:
            conv: the plain one.
            quantizers: the keyword arguments of the constructor.
        """
        made = cls(
            conv.in_channels,
            conv.out_channels,
            cast("tuple[int, int]", conv.kernel_size),
            cast("tuple[int, int]", conv.stride),
            cast("tuple[int, int] | str", conv.padding),
            cast("tuple[int, int]", conv.dilation),
            conv.groups,
            conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **quantizers,
        )
        made.padding_mode = conv.padding_mode
        made._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        made.weight, made.bias = conv.weight, conv.bias
        made.start_weight_steps()
        return made.train(conv.training)

    def quantized_weight(
        self, weight_index: Index = 0, *, in_channels: int | None = None, out_channels: int | None = None
    ) -> Tensor:
        """The fake-quantized weights, [out_channels, in_channels / groups, kh, kw], differentiable.

        With fewer channels than are stored they are those of a layer that has no others: what is not used has no part
        in DoReFa's maximum and mean.
        """
        step = self.weight_step
        return quantize_weights(
            self.weight[:out_channels] if self.groups > 1 else self.weight[:out_channels, :in_channels],
            self.weight_bits_vector,
            index=weight_index,
            mode=self.weight_quantizer,
            step=step[:, :out_channels] if step is not None and self.per_channel else step,
            per_channel=self.per_channel,
        )

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        weight_index: Index = 0,
        act_index: Index = 0,
        *,
        in_channels: int | Tensor | None = None,
        out_channels: int | Tensor | None = None,
    ) -> Tensor:
        """Convolution of the quantized input with the quantized weights.

        Args:
            x: [N, C, H, W].
            weight_index: which of the weights' bit-widths, an int or an integer tensor [].
            act_index: which of the input's.
            in_channels, out_channels: see :class:`SlicedConv2d`. Integers slice the weights before they are quantized;
                tensors come after, with the weights quantized whole.

        Returns:
            [N, out_channels, H', W'].

        Raises:
            InputError: channels that are not there, or a slice of a grouped convolution.
        """
        x, padding = self.act(x, act_index), self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        weight = self._weight_of(x, weight_index, in_channels, out_channels)
        depthwise = self.groups == self.out_channels == self.in_channels
        return sliced_conv2d(
            x,
            weight,
            self.bias if self.bias is None else self.bias[: len(weight)],
            self.stride,
            padding,
            self.dilation,
            len(weight) if depthwise else self.groups,
            in_channels=in_channels,
            out_channels=out_channels,
        )

    def _weight_of(
        self, x: Tensor, weight_index: Index, in_channels: int | Tensor | None, out_channels: int | Tensor | None
    ) -> Tensor:
        """The quantized weights of the channels that are used, as far as their numbers are known here."""
        depthwise = self.groups == self.out_channels == self.in_channels
        if isinstance(in_channels, Tensor) or isinstance(out_channels, Tensor) or (self.groups > 1 and not depthwise):
            return self.quantized_weight(weight_index)
        narrow = x.shape[1] if in_channels is None else in_channels
        if depthwise and out_channels is None:
            out_channels = narrow
        return self.quantized_weight(weight_index, in_channels=narrow, out_channels=out_channels)

    def extra_repr(self) -> str:
        """As ``torch.nn.Conv2d``, and the weights' bits and quantizer."""
        return f"{super().extra_repr()}, weight_bits={list(self.weight_bits)}, quantizer={self.weight_quantizer}"


class QuantBasicBlock(nn.Module):
    """The residual block of ResNet-18 and -34 on quantized convolutions, with torchvision's names.

    Both convolutions and the 1x1 shortcut run with the same bits. The block's input is an image behind a ReLU: conv1
    and the shortcut quantize it, each with steps of its own, and the identity shortcut takes it as it is. conv2's
    quantizer clips at 0 and so is the ReLU in between.

    Args:
        in_channels, out_channels: of the block; a shortcut convolution stands where they differ or stride is not 1.
        mid_channels: the most that can be between conv1 and conv2.
        stride: of conv1 and of the shortcut.
        weight_bits, act_bits, weight_quantizer, act_quantizer: see :class:`QuantConv2d`.
        affine: whether normalisation layers have weights and biases.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        stride: int = 1,
        *,
        weight_bits: Bits,
        act_bits: Bits,
        weight_quantizer: str = "dorefa",
        act_quantizer: str = "pact",
        affine: bool = True,
    ) -> None:
        super().__init__()

        def convolution(narrow: int, wide: int, size: int, stride: int) -> QuantConv2d:
            return QuantConv2d(
                narrow,
                wide,
                size,
                stride,
                size // 2,
                bias=False,
                weight_bits=weight_bits,
                act_bits=act_bits,
                weight_quantizer=weight_quantizer,
                act_quantizer=act_quantizer,
            )

        self.conv1 = convolution(in_channels, mid_channels, 3, stride)
        self.bn1 = SlicedBatchNorm2d(mid_channels, affine=affine)
        self.conv2 = convolution(mid_channels, out_channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, affine=affine)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = convolution(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels, affine=affine))

    def forward(self, x: Tensor, setting: tuple[int, Index, Index] | None = None) -> Tensor:
        """The block on x, [N, in_channels, H, W].

        Args:
            x: the image, behind a ReLU.
            setting: the number of mid channels that are used, and the indices of the weights' and the activations'
                bit-widths; None for all channels and index 0.

        Returns:
            [N, out_channels, H', W'], behind a ReLU.
        """
        mid, weight_index, act_index = (self.conv1.out_channels, 0, 0) if setting is None else setting
        y = self.bn1(self.conv1(x, weight_index, act_index, out_channels=mid))
        y = self.bn2(self.conv2(y, weight_index, act_index))
        if self.downsample is not None:
            convolution, norm = self.downsample
            x = norm(convolution(x, weight_index, act_index))
        return functional.relu(y + x)


def quantize_model(
    model: nn.Module,
    *,
    weight_bits: Bits = 4,
    act_bits: Bits = 4,
    skip: Collection[str] | Callable[[str, nn.Conv2d], bool] | None = None,
    **quantizers: Any,
) -> nn.Module:
    """Replace the convolutions of a model, in place, by quantized ones that share their parameters.

    Args:
        model: any module; only its ``torch.nn.Conv2d`` change, not subclasses of them.
        weight_bits, act_bits: of all of them.
        skip: names of convolutions that stay in full precision, or a function of name and convolution that says whether
            one does; None for the first one. Linear layers always stay.
        quantizers: further keyword arguments of :class:`QuantConv2d`. An input is taken to be not negative, as behind a
            ReLU, unless ``signed_act``.

    Returns:
        The model.

    Raises:
        InputError: nothing to replace, or a name that is none of a convolution's.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d}
    if skip is None:
        skip = list(found)[:1]
    if not callable(skip):
        unknown = [name for name in skip if name not in found]
        if unknown:
            raise InputError(f"skip: {', '.join(unknown)}: no convolutions of the model; it has {', '.join(found)}")
    skipped = skip if callable(skip) else lambda name, _: name in skip
    chosen = {name: module for name, module in found.items() if name and not skipped(name, module)}
    if not chosen:
        raise InputError("model: has no torch.nn.Conv2d to replace")
    for name, convolution in chosen.items():
        parent, _, attribute = name.rpartition(".")
        quantized = QuantConv2d.from_float(convolution, weight_bits=weight_bits, act_bits=act_bits, **quantizers)
        setattr(model.get_submodule(parent), attribute, quantized)
    return model


@torch.no_grad()
def initialize_steps(model: nn.Module, images: Tensor) -> None:
    """Set the steps of all quantizers that a forward pass reaches from the values that they see, and the weights'.

    LSQ's rule, ``2 mean|x| / sqrt(high)``, for every bit-width; PACT's clipping level is ``high`` such steps. The
    values are those of the model as it stands, quantizers in front included. One that sees only zeros keeps its steps.

    Args:
        model: with :class:`QuantConv2d` or :class:`QuantAct` in it.
        images: a batch that the model takes.
    """

    def look(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        act, x = cast(QuantAct, layer), arguments[0]
        magnitude = (x if act.signed else x.relu()).abs().to(act.step.dtype)
        mean = magnitude.mean() if act.channels is None else magnitude.mean((0, *range(2, x.dim())))
        if bool((mean > 0).all()):
            act.start_at(mean)

    layers = [layer for layer in model.modules() if isinstance(layer, QuantAct)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        for layer in model.modules():
            if isinstance(layer, QuantConv2d):
                layer.start_weight_steps()
        model(images)
    finally:
        for hook in hooks:
            hook.remove()


def checked_bits(name: str, bits: Bits) -> tuple[int, ...]:
    """One or several bit-widths as an ascending tuple.

    Raises:
        InputError: none, one out of 1 .. 8, or not ascending.
    """
    several = (bits,) if isinstance(bits, int) else tuple(bits)
    if not several or any(not isinstance(k, int) or not 1 <= k <= 8 for k in several):
        raise InputError(f"{name} must be from 1 to 8, or a list of such, got {bits}")
    if list(several) != sorted(set(several)):
        raise InputError(f"{name} must be ascending, each once, got {list(several)}")
    return several


def start_steps(bits: Sequence[int], mean: Tensor, signed: bool) -> list[Tensor]:
    """LSQ's first step for every bit-width from the mean magnitude: 2 mean / sqrt(high).

    A single signed bit is the sign times the step, for which the mean magnitude itself is the best there is.
    """
    if not signed:
        return [2 * mean / math.sqrt(2**k - 1) for k in bits]
    return [mean if k == 1 else 2 * mean / math.sqrt(2 ** (k - 1) - 1) for k in bits]


def _check_name(argument: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InputError(f"{argument} must be one of {', '.join(names)}, got {name}")
