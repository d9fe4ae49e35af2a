"""Convolution with quantized weights and a quantized input, 1 to 8 bits.

A layer can have several bit-widths for each; a call picks one of them by its index. Weights are stored once, in float;
what depends on the bits (the steps) are vectors with an entry for each bit-width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.nn import fused
from spos_fast.nn.quant_act import Bits, Index, QuantAct, check_name, checked_bits, keeping_precision, start_steps
from spos_fast.nn.sliced import SlicedConv2d
from spos_fast.ops import BNStats, PackedConv2d, integer_conv, quant_conv2d, quantize_weights, sliced_conv2d
from spos_fast.ops.quant_codes import ACTIVATION_MODES
from spos_fast.ops.quantize_weights import MODES as WEIGHT_MODES
from spos_fast.ops.quantizers import MODES


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
        device, dtype: of the parameters; steps are float32 (float64 for float64), and stay so after ``half()``.

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
        check_name("weight_quantizer", weight_quantizer, WEIGHT_MODES)
        check_name("act_quantizer", act_quantizer, MODES)
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

    def quantized_weight(self, weight_index: Index = 0, in_channels: Any = None, out_channels: Any = None) -> Tensor:
        """The fake-quantized weights, [out_channels, in_channels / groups, kh, kw], differentiable.

        Args:
            weight_index: which bit-width.
            in_channels, out_channels: the slice that is quantized; None or a tensor: all that is stored.
        """
        weight: Tensor = self.weight
        step: Tensor | None = self.weight_step
        if self._depthwise and not isinstance(in_channels, Tensor):
            out_channels = in_channels if out_channels is None else out_channels
        if isinstance(out_channels, int):
            weight = weight[:out_channels]
            step = step[:, :out_channels] if step is not None and self.per_channel else step
        if isinstance(in_channels, int) and not self._depthwise:
            weight = weight[:, :in_channels]
        return quantize_weights(
            weight,
            self.weight_bits_vector,
            index=weight_index,
            mode=self.weight_quantizer,
            step=step,
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
            in_channels, out_channels: see :class:`SlicedConv2d`. Weights are sliced, then quantized: a slice is the
                convolution that :meth:`extract` gives. With a tensor the whole weight is quantized.

        Returns:
            [N, out_channels, H', W'].

        Raises:
            InputError: channels that are not there, or a slice of a grouped convolution.
        """
        if self.on_codes and not isinstance(in_channels, Tensor) and not isinstance(out_channels, Tensor):
            made = self.convolve(x, weight_index, act_index, in_channels=in_channels, out_channels=out_channels)
            return cast(Tensor, made)
        x, padding = self.act(x, act_index), self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        narrow = x.shape[1] if in_channels is None else in_channels
        weight = self.quantized_weight(weight_index, narrow, out_channels)
        bias = self.bias
        if bias is not None and weight.shape[0] != bias.shape[0]:
            bias = bias[: weight.shape[0]]
        return sliced_conv2d(
            x,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            weight.shape[0] if self._depthwise else self.groups,
            in_channels=in_channels,
            out_channels=out_channels,
        )

    @torch.no_grad()
    def extract(self, in_channels: int | None = None, out_channels: int | None = None) -> QuantConv2d:
        """A layer with copies of the first channels' weights and of all steps, and the same bit-widths.

        Args, raises: see :meth:`SlicedConv2d.extract`.
        """
        made = QuantConv2d.from_float(
            super().extract(in_channels, out_channels),
            weight_bits=self.weight_bits,
            act_bits=self.act.bits,
            weight_quantizer=self.weight_quantizer,
            act_quantizer=self.act.quantizer,
            per_channel=self.per_channel,
            signed_act=self.act.signed,
        )
        made.act.load_state_dict(self.act.state_dict())
        if made.weight_step is not None and self.weight_step is not None:
            made.weight_step.copy_(self.weight_step[:, : made.out_channels] if self.per_channel else self.weight_step)
        return made

    @property
    def on_codes(self) -> bool:
        """Whether :func:`spos_fast.ops.quant_conv2d` computes it, and nobody wants to see the quantizer run."""
        act = self.act
        return (
            act.quantizer in ACTIVATION_MODES
            and not act.signed
            and not isinstance(self.padding, str)
            and self.padding_mode == "zeros"
            and (torch.compiler.is_compiling() or not fused.changed(act))
        )

    def on_integers(self, weight_index: int) -> bool:
        """Whether it runs on integers on the CPU with these weights: with bits that do not depend on threads."""
        bits, most = self.weight_bits[weight_index], max(self.act.bits)
        whole = integer_conv.on_integers(self.weight, bits, self.weight_quantizer, most)
        return self.on_codes and whole and integer_conv.available()

    def convolve(
        self,
        x: Tensor,
        weight_index: Index = 0,
        act_index: Index = 0,
        *,
        in_channels: int | None = None,
        out_channels: int | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        statistics: bool = False,
    ) -> Tensor | BNStats:
        """:func:`spos_fast.ops.quant_conv2d` with this layer's parameters, where :attr:`on_codes`.

        Args:
            x, weight_index, act_index, in_channels, out_channels: as for :meth:`forward`, but no tensors of channels.
            scale, shift: of the batch norm in front of the layer, [channels used].
            statistics: whether to give the batch statistics of the result too.
        """
        return quant_conv2d(
            x,
            self.weight,
            self.bias,
            act_index=act_index,
            weight_index=weight_index,
            scale=scale,
            shift=shift,
            statistics=statistics,
            in_channels=in_channels,
            out_channels=out_channels,
            **self._own_arguments,
        )

    def packed(
        self, weight_index: int = 0, in_channels: int | None = None, out_channels: int | None = None
    ) -> PackedConv2d:
        """The layer with one bit-width and slice of its weights, quantized and packed once: for many evaluations.

        Args:
            weight_index: which of the weights' bit-widths.
            in_channels, out_channels: as for :meth:`forward`; None for all.

        Raises:
            InputError: the layer does not run on codes (see :attr:`on_codes`), or channels that are not there.
        """
        if not self.on_codes:
            raise InputError("packed: the layer needs unsigned codes, zero padding in numbers, and no hooks on act")
        return PackedConv2d(
            self.weight,
            self.bias,
            weight_index=weight_index,
            in_channels=self.in_channels if in_channels is None else in_channels,
            out_channels=out_channels,
            **self._own_arguments,
        )

    @property
    def _own_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`spos_fast.ops.quant_conv2d` that are the same at every call."""
        return dict(
            act_step=self.act.step,
            act_bits=self.act.bits_vector,
            act_mode=self.act.quantizer,
            weight_step=self.weight_step,
            weight_bits=self.weight_bits_vector,
            weight_mode=self.weight_quantizer,
            per_channel=self.per_channel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    @property
    def _depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantConv2d:
        step = self.weight_step
        own = () if step is None else (step, step.grad)
        kept = keeping_precision(fn)
        return super()._apply(lambda value: kept(value) if any(value is each for each in own) else fn(value), recurse)

    def extra_repr(self) -> str:
        """As ``torch.nn.Conv2d``, and the weights' bits and quantizer."""
        return f"{super().extra_repr()}, weight_bits={list(self.weight_bits)}, quantizer={self.weight_quantizer}"
