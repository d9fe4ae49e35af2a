"""Quantized convolutions whose weights stay quantized and packed between calls, for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spos_fast.errors import InputError
from spos_fast.ops.blocks import BNStats
from spos_fast.ops.channels import check_image
from spos_fast.ops.integer_conv import Filters, pack, quantized_convolution
from spos_fast.ops.quant_call import as_call


class PackedConv2d:
    """:func:`spos_fast.ops.quant_conv2d` without gradients, for many calls with the same weights and bits.

    Weights are quantized and packed at the first call, and again where the images' channels (for oneDNN, their size)
    change. They are those of that time: an object is of no use once they have moved. On the CPU.

    Args:
        weight: [stored out, stored in / groups, kh, kw].
        bias: [stored out] or None.
        arguments: the keyword arguments of :func:`spos_fast.ops.quant_conv2d`, all of them, but those of a call and
            ``statistics``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, **arguments: Any) -> None:
        self._weight, self._bias, self._arguments = weight, bias, arguments
        self._filters: Filters | None = None

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        act_index: int | Tensor = 0,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        out_scale: Tensor | None = None,
        out_shift: Tensor | None = None,
        relu: bool = False,
        statistics: bool = False,
    ) -> Tensor | BNStats:
        """The convolution of x, between two batch norms.

        Args:
            x: [N, C, H, W], not empty.
            act_index: which of the activations' bit-widths.
            scale, shift: [channels used], of the batch norm in front, applied to x on load; or None.
            out_scale, out_shift: [C_out], of the batch norm behind, which then costs nothing; or None.
            relu: whether to clip the result at 0.
            statistics: whether to give the batch statistics of the result too.

        Returns:
            [N, C_out, H', W'], dtype of x, channels last; with ``statistics`` (z, mean, m2), see :class:`BNStats`.

        Raises:
            TypeError, InputError: as :func:`spos_fast.ops.quant_conv2d`.
        """
        if (out_scale is None) != (out_shift is None):
            raise InputError("out_scale and out_shift must be given both or not at all")
        arguments = self._arguments | dict(act_index=act_index, scale=scale, shift=shift, statistics=False)
        call = as_call(x, self._weight, self._bias, **arguments)
        check_image("x", x)
        filters = self._filters
        if filters is None or call.x.shape[1 : 1 + len(filters.size)] != filters.size:
            most = int(call.act_bits.max())
            filters = self._filters = pack(call.weight, *call.weights, call.settings, most, call.x.shape)
        bias = call.bias if out_scale is None or call.bias is None else call.bias * out_scale
        if out_shift is not None:
            bias = out_shift if bias is None else bias + out_shift
        out, mean, m2, *_ = quantized_convolution(
            call.x,
            call.activation,
            filters,
            bias,
            out_scale=out_scale,
            relu=relu,
            statistics=statistics,
        )
        return BNStats(out, mean, m2) if statistics else out
