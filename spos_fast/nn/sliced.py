"""Convolution and batch norm whose numbers of channels are chosen at every call: the layers of slimmable networks.

Weights are stored at the widest size, under the names of the plain modules; a call uses the first channels of them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast import ops
from spos_fast.errors import InputError


class SlicedConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` that can use the first of its channels only: see :func:`spos_fast.ops.sliced_conv2d`.

    Constructor, attributes and state-dict names are those of ``torch.nn.Conv2d``; ``in_channels`` and ``out_channels``
    are the most that there can be. Only convolutions with ``groups=1`` and depthwise ones can be sliced.
    """

    def forward(
        self, x: Tensor, out_channels: int | Tensor | None = None, *, in_channels: int | Tensor | None = None
    ) -> Tensor:
        """Convolution with the first channels.

        Args:
            x: [N, C, H, W]; all of its C channels are used.
            out_channels: how many channels are made; None for all, or, if depthwise, for C. An int32 tensor [] on x's
                device makes all, of which the absent ones are zero.
            in_channels: uses fewer than C channels; an int32 tensor [] tells how many of them are present.

        Returns:
            [N, out_channels, H', W'].

        Raises:
            InputError: channels that are not there, or a slice of a grouped convolution.
        """
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        return ops.sliced_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            in_channels=in_channels,
            out_channels=out_channels,
        )

    @torch.no_grad()
    def extract(self, in_channels: int | None = None, out_channels: int | None = None) -> nn.Conv2d:
        """A plain convolution with copies of the first channels' weights.

        Args:
            in_channels: channels that go in; None for all.
            out_channels: channels that come out; None for all. For a depthwise convolution one of the two suffices.

        Raises:
            InputError: channels that are not there, or a slice of a grouped convolution.
        """
        depthwise = self.groups > 1 and self.groups == self.in_channels == self.out_channels
        if depthwise:
            in_channels = out_channels if in_channels is None else in_channels
            out_channels = in_channels if out_channels is None else out_channels
        narrow = self.in_channels if in_channels is None else in_channels
        made = self.out_channels if out_channels is None else out_channels
        _check_number("in_channels", narrow, self.in_channels)
        _check_number("out_channels", made, self.out_channels)
        sliced = (narrow, made) != (self.in_channels, self.out_channels)
        if (depthwise and narrow != made) or (sliced and self.groups > 1 and not depthwise):
            raise InputError(
                f"groups: got {self.groups} and a slice of {narrow} to {made} channels; only groups=1 and depthwise "
                "convolutions, as many channels out as in, can be sliced"
            )
        plain = nn.Conv2d(
            narrow,
            made,
            cast("tuple[int, int]", self.kernel_size),
            cast("tuple[int, int]", self.stride),
            cast("tuple[int, int] | str", self.padding),
            cast("tuple[int, int]", self.dilation),
            made if depthwise else self.groups,
            self.bias is not None,
            self.padding_mode,
            self.weight.device,
            self.weight.dtype,
        )
        plain.weight.copy_(self.weight[:made, : plain.weight.shape[1]])
        if plain.bias is not None and self.bias is not None:
            plain.bias.copy_(self.bias[:made])
        return plain.train(self.training)


class SlicedBatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` of the first channels, as many as the input has.

    Constructor, attributes and state-dict names are those of ``torch.nn.BatchNorm2d``; ``num_features`` is the most
    that there can be. In training the running statistics of the channels that are there move, no others'. With
    ``momentum=None`` the average is over the batches that the layer has seen at any width. See
    :func:`spos_fast.ops.sliced_batch_norm`.
    """

    def forward(self, x: Tensor, *, channels: Tensor | None = None) -> Tensor:
        """Batch norm of x, [N, C, H, W] with C at most ``num_features``.

        Args:
            x: the images.
            channels: None, or an int32 tensor [] on x's device: how many of the C channels are present. The others come
                out as zeros.

        Raises:
            InputError: x has more channels than are stored.
        """
        self._check_input_dim(x)
        share = self.momentum
        moves = self.training and self.track_running_stats
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1 / float(self.num_batches_tracked)
        on_batch = self.training or (self.running_mean is None and self.running_var is None)
        running = (self.running_mean, self.running_var) if moves or not self.training else (None, None)
        return ops.sliced_batch_norm(
            x, *running, self.weight, self.bias, on_batch, share or 0.0, self.eps, channels=channels
        )

    @torch.no_grad()
    def extract(self, channels: int | None = None) -> nn.BatchNorm2d:
        """A plain layer with copies of the first channels' parameters and statistics; None for all channels.

        Raises:
            InputError: channels that are not there.
        """
        used = self.num_features if channels is None else channels
        _check_number("channels", used, self.num_features)
        kept: list[Any] = [*self.parameters(), *self.buffers()]
        placed = {"device": kept[0].device, "dtype": kept[0].dtype} if kept else {}
        plain = nn.BatchNorm2d(used, self.eps, self.momentum, self.affine, self.track_running_stats, **placed)
        for name, value in plain.state_dict(keep_vars=True).items():
            mine = getattr(self, name)
            value.copy_(mine[:used] if mine.dim() else mine)
        return plain.train(self.training)


def _check_number(name: str, used: int, stored: int) -> None:
    if not 1 <= used <= stored:
        raise InputError(f"{name} must be from 1 to {stored}, what is stored, got {used}")
