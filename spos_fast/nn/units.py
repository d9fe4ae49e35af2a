"""The choice blocks of the SPOS ShuffleNetV2 space (arXiv 1904.00420, figure 5 and table 2).

Parameter names are those of the published code (``branch_main.<i>``, ``branch_proj.<i>``): its checkpoints load.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spos_fast import ops
from spos_fast.errors import InputError
from spos_fast.nn import fused


def _pointwise(channels_in: int, channels_out: int, **factory: Any) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, bias=False, **factory)


def _depthwise(channels: int, kernel_size: int, stride: int, **factory: Any) -> nn.Conv2d:
    padding = kernel_size // 2
    return nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False, **factory)


class Unit(nn.Module):
    """Two branches that are concatenated.

    With ``stride=1`` and as many output as input channels the input is split: even channels pass through, odd channels
    go through ``branch_main`` (the channel shuffle of the published code). Otherwise both branches see the whole input:
    ``branch_proj`` keeps its channels, ``branch_main`` makes the rest.

    A unit can run with fewer mid channels than it has: it is the unit that the first of them would make, and the others
    are neither read nor written (their gradient is zero, their running statistics do not move).
    """

    plan: fused.Plan
    branch_main: nn.Sequential
    branch_proj: nn.Sequential | None

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("mid_channels", mid_channels),
        ):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: got {value!r}; expected a positive integer")
        if stride not in (1, 2):
            raise InputError(f"stride: got {stride}; expected 1 or 2")
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size: got {kernel_size}; expected an odd number such as 3, 5 or 7")
        self.mid_channels, self.stride = mid_channels, stride
        self.splits = stride == 1 and in_channels == out_channels
        if self.splits and in_channels % 2:
            raise InputError(f"in_channels: got {in_channels}; a unit that splits its input needs an even number")
        if not self.splits and out_channels <= in_channels:
            raise InputError(
                f"out_channels: got {out_channels} for {in_channels} input channels and stride {stride}; "
                "a unit that does not split its input must widen it"
            )
        self.branch_in = in_channels // 2 if self.splits else in_channels
        self.branch_out = out_channels - self.branch_in

    def _projection(self, kernel_size: int, stride: int, affine: bool, **factory: Any) -> nn.Sequential | None:
        if self.splits:
            return None
        channels = self.branch_in
        return nn.Sequential(
            _depthwise(channels, kernel_size, stride, **factory),
            nn.BatchNorm2d(channels, affine=affine, **factory),
            _pointwise(channels, channels, **factory),
            nn.BatchNorm2d(channels, affine=affine, **factory),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, mid: int | None = None) -> Tensor:
        """Shapes ``[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]``.

        Channels-last input runs as one fused op where that gives the same (``spos_fast.nn.fused``);
        ``SPOS_FAST_BACKEND=reference`` switches it off.

        Args:
            x: images.
            mid: how many of the mid channels are used; None is all of them.

        Raises:
            TypeError: ``mid`` is no integer. (Widths on the device are for :func:`spos_fast.ops.shuffle_unit`.)
            InputError: ``mid`` is not 1 to ``mid_channels``.
        """
        if isinstance(mid, Tensor) or not (mid is None or hasattr(mid, "__index__")):
            raise TypeError(
                f"mid must be an int, got {type(mid).__name__}; widths that only the device knows go to spos_fast.ops"
            )
        if mid is not None and not isinstance(mid, (int, torch.SymInt)):
            mid = operator.index(mid)  # numpy's integers
        if mid is not None and not 1 <= mid <= self.mid_channels:
            raise InputError(f"mid: got {mid}; expected 1 to {self.mid_channels} channels")
        mid = self.used(mid)
        out = fused.run(self.plan, x, self.branch_main, self.branch_proj, self.stride, mid)
        return out if out is not None else self._plainly(x, mid)

    def matched(self, mid: int | None = None) -> fused.Block | None:
        """The unit's layers as its fused op takes them; None where the modules must run."""
        return fused.match(self.plan, self.branch_main, self.branch_proj, self.stride, self.used(mid))

    def normalised(self, mid: int | None = None) -> list[int]:
        """How many channels are used of every normalisation layer, main branch before projection."""
        layers = [*self.branch_main, *(self.branch_proj or ())]
        return fused.widths(self.plan, [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)], self.used(mid))

    def used(self, mid: int | None) -> int | None:
        """``mid`` with None for all of the mid channels."""
        return None if mid == self.mid_channels else mid

    def _plainly(self, x: Tensor, mid: int | None) -> Tensor:
        # Slices keep the memory format; the view-and-transpose form of the shuffle would leave channels_last.
        passed, narrow = (x[:, ::2], x[:, 1::2]) if self.branch_proj is None else (self.branch_proj(x), x)
        made = self.branch_main(narrow) if mid is None else _run_slice(self.branch_main, narrow, mid)
        return torch.cat((passed, made), 1)


def _run_slice(branch: nn.Sequential, x: Tensor, mid: int) -> Tensor:
    """The main branch of a unit with ``mid`` of its mid channels, on views of its parameters and statistics."""
    last = max(position for position, layer in enumerate(branch) if isinstance(layer, nn.Conv2d))
    for position, layer in enumerate(branch):
        if isinstance(layer, nn.Conv2d):
            # A depthwise convolution makes as many channels as come in, the last one as many as it has.
            made = None if layer.groups > 1 or position == last else mid
            padding = cast("tuple[int, int]", layer.padding)
            x = ops.sliced_conv2d(x, layer.weight, None, layer.stride, padding, groups=layer.groups, out_channels=made)
        elif isinstance(layer, nn.BatchNorm2d):
            # The layer itself runs, so that its momentum, its counter and its hooks are honoured.
            tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
            cut = {name: tensor[: x.shape[1]] for name, tensor in tensors if tensor.dim()}
            x = functional_call(layer, cut, (x,))
        else:
            x = layer(x)
    return x


class ShuffleUnit(Unit):
    """ShuffleNetV2 unit with a ``kernel_size`` depthwise convolution (choices k3, k5 and k7 of the paper).

    ``branch_main`` is 1x1 conv, BN, ReLU; depthwise conv, BN; 1x1 conv, BN, ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        mid_channels: channels between the two 1x1 convolutions, at most.
        kernel_size: odd size of the depthwise kernel.
        stride: 1 or 2.
        affine: whether batch normalisation learns a scale and a shift (off in a supernet).
        device: of the parameters, as for torch.nn's layers.
        dtype: of the parameters.

    Raises:
        InputError: sizes that no such unit has.
    """

    plan = fused.SHUFFLE

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        kernel_size: int,
        stride: int = 1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, mid_channels, kernel_size, stride)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.branch_main = nn.Sequential(
            _pointwise(self.branch_in, mid_channels, **factory),
            nn.BatchNorm2d(mid_channels, affine=affine, **factory),
            nn.ReLU(inplace=True),
            _depthwise(mid_channels, kernel_size, stride, **factory),
            nn.BatchNorm2d(mid_channels, affine=affine, **factory),
            _pointwise(mid_channels, self.branch_out, **factory),
            nn.BatchNorm2d(self.branch_out, affine=affine, **factory),
            nn.ReLU(inplace=True),
        )
        self.branch_proj = self._projection(kernel_size, stride, affine, **factory)


class XceptionUnit(Unit):
    """The Xception choice: three depthwise 3x3 convolutions, each followed by a 1x1 convolution.

    Args and errors as :class:`ShuffleUnit`, without ``kernel_size``.
    """

    plan = fused.XCEPTION

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int,
        stride: int = 1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, mid_channels, 3, stride)
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        layers: list[nn.Module] = []
        widths = (self.branch_in, mid_channels, mid_channels, self.branch_out)
        for position, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            layers += [
                _depthwise(narrow, 3, stride if position == 0 else 1, **factory),
                nn.BatchNorm2d(narrow, affine=affine, **factory),
                _pointwise(narrow, wide, **factory),
                nn.BatchNorm2d(wide, affine=affine, **factory),
                nn.ReLU(inplace=True),
            ]
        self.branch_main = nn.Sequential(*layers)
        self.branch_proj = self._projection(3, stride, affine, **factory)
