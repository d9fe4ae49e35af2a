"""Quantized layers as they go into an ONNX graph: QuantizeLinear and DequantizeLinear around plain operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spos_fast.errors import InputError
from spos_fast.export.codes import act_grid, weight_codes
from spos_fast.nn import QuantAct, QuantConv2d

# Of the ONNX integer types, by bits: the number that the format has for the unsigned and for the signed one
# (onnx.TensorProto.DataType).
TYPES = {2: (25, 26), 4: (21, 22), 8: (2, 3)}
# Buffers with this ending hold weights as int8, to be stored in the narrow type.
WEIGHT_CODES = "weight_codes"


def narrow_type(bits: int, opset: int) -> int:
    """Bits of the narrowest ONNX integer type for a bit-width; 2-bit types came with opset 25."""
    return next(size for size in TYPES if size >= bits and (size > 2 or opset >= 25))


class GraphAct(nn.Module):
    """Rounds to a grid by QuantizeLinear and DequantizeLinear; narrower codes than the type's are clipped in front.

    A single signed bit has no zero, which QuantizeLinear would give: there the sign is taken.
    """

    step: Tensor
    least: Tensor
    most: Tensor
    offset: Tensor | None

    def __init__(self, act: QuantAct, index: int, opset: int, name: str) -> None:
        super().__init__()
        grid = act_grid(act, index, name)
        self.opset, self.signed, self.bits = opset, grid.signed, grid.bits
        self.size = narrow_type(grid.bits, opset)
        self.axis = 1 if grid.step.dim() else None
        self.register_buffer("step", grid.step)
        least, most = (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) if grid.signed else (0, 2**grid.bits - 1)
        self.register_buffer("least", _spread(grid.step * least))
        self.register_buffer("most", _spread(grid.step * most))
        self.register_buffer("offset", None if grid.offset is None else _spread(grid.offset))

    def forward(self, x: Tensor) -> Tensor:
        """The values of x, [N, C, ...], on the grid."""
        if self.offset is None:
            return self._rounded(x)
        return self._rounded(x - self.offset) + self.offset

    def _rounded(self, x: Tensor) -> Tensor:
        if self.signed and self.bits == 1:
            step = _spread(self.step)
            return torch.where(x >= 0, step, -step)
        if self.bits < self.size:
            x = self._clipped(x)
        inner = torch.int8 if self.signed else torch.uint8
        attributes = {} if self.axis is None else {"axis": self.axis}
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (x, self.step),
            {"output_dtype": TYPES[self.size][self.signed], **attributes},
            dtype=inner,
            shape=x.shape,
            version=self.opset,
        )
        return _dequantized(codes, self.step, self.axis, self.opset)

    def _clipped(self, x: Tensor) -> Tensor:
        if self.axis is not None:
            return torch.maximum(torch.minimum(x, self.most), self.least)
        bounds = (x, self.least, self.most)
        return torch.onnx.ops.symbolic("Clip", bounds, dtype=x.dtype, shape=x.shape, version=self.opset)


class GraphWeight(nn.Module):
    """A convolution's weights: integers in the narrowest type, through DequantizeLinear.

    DoReFa's grid is odd multiples of a half step, -n, -n + 2, .. n with n = 2^k - 1. Where these integers fit the type
    that k bits have, they are stored as they are; with 2, 4 and 8 bits they need one bit more, and c with
    2 c + 1 equal to them is stored, and half a step added behind.
    """

    weight_codes: Tensor
    scale: Tensor
    shift: Tensor | None

    def __init__(self, layer: QuantConv2d, index: int, opset: int, name: str) -> None:
        super().__init__()
        weights = weight_codes(layer, index, name)
        self.opset = opset
        self.size = narrow_type(weights.bits, opset)
        self.axis = 0 if weights.scale.dim() else None
        fits = weights.bits < self.size
        codes = weights.codes - 2 ** (weights.bits - 1)
        scale, shift = weights.scale, None
        if weights.odd and fits:
            codes = 2 * weights.codes - (2**weights.bits - 1)
        elif weights.odd:
            scale, shift = 2 * weights.scale, weights.scale.view([-1, 1, 1, 1] if weights.scale.dim() else [])
        self.register_buffer(WEIGHT_CODES, codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self) -> Tensor:
        """The weights as floats, [out_channels, in_channels / groups, kh, kw]."""
        weight = _dequantized(self.weight_codes, self.scale, self.axis, self.opset)
        return weight if self.shift is None else weight + self.shift


class GraphConv2d(QuantConv2d):
    """A :class:`QuantConv2d` as a float convolution of a :class:`GraphAct` and a :class:`GraphWeight`."""

    name: str
    weights: nn.ModuleList
    acts: nn.ModuleList

    @classmethod
    def of(cls, layer: QuantConv2d, opset: int, name: str) -> GraphConv2d:
        """The layer as it goes into a graph."""
        act = layer.act
        made = cls.from_float(
            layer,
            weight_bits=layer.weight_bits,
            act_bits=act.bits,
            weight_quantizer=layer.weight_quantizer,
            act_quantizer=act.quantizer,
            per_channel=layer.per_channel,
            signed_act=act.signed,
        )
        assert isinstance(made, cls)
        made.name = name
        made.weights = nn.ModuleList(GraphWeight(layer, index, opset, name) for index in range(len(layer.weight_bits)))
        made.acts = nn.ModuleList(GraphAct(act, index, opset, name) for index in range(len(act.bits)))
        return made

    @property
    def on_codes(self) -> bool:
        """No: blocks that fold their layers into one another look at this, and call the layers instead."""
        return False

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        weight_index: int | Tensor = 0,
        act_index: int | Tensor = 0,
        *,
        in_channels: int | Tensor | None = None,
        out_channels: int | Tensor | None = None,
    ) -> Tensor:
        """As :meth:`QuantConv2d.forward`, with indices that are known and all channels."""
        if isinstance(weight_index, Tensor) or isinstance(act_index, Tensor):
            raise InputError(f"{self.name}: an index of bit-widths must be an int in a graph, not a tensor")
        if in_channels not in (None, self.in_channels) or out_channels not in (None, self.out_channels):
            raise InputError(f"{self.name}: runs as a slice of its channels; extract a plain network first")
        x, padding = self.acts[act_index](x), self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = functional.pad(x, self._reversed_padding_repeated_twice, mode), (0, 0)
        weight = self.weights[weight_index]()
        return functional.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class GraphQuantAct(QuantAct):
    """A :class:`QuantAct` that stands alone, as a :class:`GraphAct`."""

    def __init__(self, act: QuantAct, opset: int, name: str) -> None:
        super().__init__(act.bits, quantizer=act.quantizer, signed=act.signed, channels=act.channels)
        self.name = name
        self.acts = nn.ModuleList(GraphAct(act, index, opset, name) for index in range(len(act.bits)))

    def forward(self, x: Tensor, index: int | Tensor = 0) -> Tensor:
        """As :meth:`QuantAct.forward`, with an index that is known."""
        if isinstance(index, Tensor):
            raise InputError(f"{self.name}: an index of bit-widths must be an int in a graph, not a tensor")
        made: Tensor = self.acts[index](x)
        return made


def graph_module(module: nn.Module, opset: int, name: str = "", made: dict[int, nn.Module] | None = None) -> nn.Module:
    """The module with its quantized layers as they go into a graph; modules that have some are changed in place.

    Args:
        module: any module.
        opset: of the graph.
        name: what it is called in errors.
        made: what modules have become, by ``id``; a layer that is used twice stays one.
    """
    made = {} if made is None else made
    if id(module) not in made:
        if isinstance(module, QuantConv2d):
            made[id(module)] = GraphConv2d.of(module, opset, name or "network")
        elif isinstance(module, QuantAct):
            made[id(module)] = GraphQuantAct(module, opset, name or "network")
        else:
            for child, value in module._modules.items():
                if value is not None:
                    module._modules[child] = graph_module(value, opset, f"{name}.{child}".lstrip("."), made)
            made[id(module)] = module
    return made[id(module)]


def stored_types(module: nn.Module) -> dict[str, int]:
    """For every buffer of weight codes, by its name in the state dict, the ONNX type that it is stored in."""
    return {
        f"{name}.{WEIGHT_CODES}": TYPES[layer.size][1]
        for name, layer in module.named_modules()
        if isinstance(layer, GraphWeight)
    }


def _dequantized(codes: Tensor, step: Tensor, axis: int | None, opset: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, step),
        {} if axis is None else {"axis": axis},
        dtype=torch.float32,
        shape=codes.shape,
        version=opset,
    )


def _spread(values: Tensor) -> Tensor:
    """A value for each channel so that it broadcasts against images; a single one stays."""
    return values.view(1, -1, 1, 1) if values.dim() else values
