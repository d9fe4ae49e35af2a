"""The ShuffleNetV2 space of SPOS (arXiv 1904.00420, table 2): search of blocks, channels, bits, or all jointly."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.nn import ShuffleUnit, XceptionUnit
from spos_fast.nn.quant import QuantConv2d
from spos_fast.nn.quant_units import QuantUnit
from spos_fast.nn.steps import step_entries
from spos_fast.nn.units import Unit
from spos_fast.spaces.base import CostTable, Space, scaled_channels
from spos_fast.spaces.bits import Bits, bit_names, bit_pairs, candidates_of
from spos_fast.supernet import Network, Step, Supernet

KERNEL_SIZES = (3, 5, 7)
CHOICES = ("shuffle_k3", "shuffle_k5", "shuffle_k7", "xception")
WIDEST = 2.0


@dataclass(frozen=True)
class _Block:
    """Sizes of one choice block.

    Attributes:
        in_channels, out_channels, stride: as of the units.
        mid_channels: at every ratio of the search.
        input_size: height and width of what comes in.
        candidates: which of :data:`CHOICES` it is chosen from.
    """

    in_channels: int
    out_channels: int
    mid_channels: tuple[int, ...]
    stride: int
    input_size: int
    candidates: tuple[int, ...]

    @property
    def output_size(self) -> int:
        return -(-self.input_size // self.stride)

    def module(self, choice: int, mid: int, affine: bool) -> Unit:
        if choice < len(KERNEL_SIZES):
            return ShuffleUnit(self.in_channels, self.out_channels, mid, KERNEL_SIZES[choice], self.stride, affine)
        return XceptionUnit(self.in_channels, self.out_channels, mid, self.stride, affine)

    def convolutions(self, choice: int, mid: int) -> list[tuple[int, int]]:
        """(weights, output height) of every convolution; without bias, MACs are weights x output area."""
        splits = self.stride == 1 and self.in_channels == self.out_channels
        narrow = self.in_channels // 2 if splits else self.in_channels
        wide = self.out_channels - narrow
        size, out = self.input_size, self.output_size
        if choice < len(KERNEL_SIZES):
            kernel = KERNEL_SIZES[choice] ** 2
            layers = [(narrow * mid, size), (kernel * mid, out), (mid * wide, out)]
        else:
            kernel = 9
            layers = [(kernel * narrow, out), (narrow * mid, out), (kernel * mid, out), (mid * mid, out)]
            layers += [(kernel * mid, out), (mid * wide, out)]
        if not splits:
            layers += [(kernel * narrow, out), (narrow * narrow, out)]
        return layers


class ShuffleNetV2(Space):
    """Single-path ShuffleNetV2: one of four choice blocks in every layer (``4**20`` networks with the defaults).

    The defaults are the paper's network for 224 x 224 ImageNet. The first block of a stage widens the channels and
    applies the stage's stride; the others keep both.

    With ``channels`` every layer has a second gene: the width of the block, as a ratio to its usual mid channels (half
    of its output channels). The published ratios are 0.2 to 1.6 in steps of 0.2. With ``blocks`` too, only the widths
    are searched. With ``bits`` every layer has a last gene: the bit-widths of the weights and the activations of all
    convolutions of the block; stem, last convolution and classifier stay in full precision. A layer's genes stand
    together: block, width, bits, block, ... Weights of a block are stored once, at the widest ratio and in full
    precision; a narrower one uses the first channels.

    Args:
        input_size: height and width of the images, in pixels.
        num_classes: number of logits.
        in_channels: channels of the images.
        stem_channels: output channels of the 3x3 stem.
        stem_stride: 1 or 2.
        stage_channels: output channels of every stage; even, and each more than the one before.
        stage_repeats: choice blocks of every stage.
        stage_strides: 1 or 2 for every stage.
        head_channels: output channels of the last 1x1 convolution.
        dropout: probability of dropout before the classifier.
        init: ``"published"`` for the published code's initial weights, or ``"pytorch"`` for PyTorch's. The published
            depthwise kernels start with a deviation of 1 whatever their size, which normalisation hides but which
            probably slows the large ones: in schedules of a few passes over CIFAR-10 PyTorch's were better by points.
        channels: ratios that a block's mid channels are searched in, ascending, at most 2; None searches no widths.
            :func:`scaled_channels` rounds.
        blocks: the choice of every layer, by index, for a search of widths only: one a layer, or a single one for all
            (``(0,)`` is the paper's: shuffle_k3 everywhere). None searches the blocks.
        bits: searched pairs (bits of weights, bits of activations), 1 to 8 each; None quantizes nothing.
        uniform_bits: with ``bits``, the pairs of the uniform networks that :meth:`baselines` compares with. No search
            draws those that are not in ``bits``.
        weight_quantizer: with ``bits``, ``"lsq"`` or ``"dorefa"``; see :class:`spos_fast.nn.quant_units.QuantUnit`.
        act_quantizer: with ``bits``, ``"lsq"`` or ``"lsq+"``.

    Raises:
        InputError: sizes that give no network.
    """

    name = "shufflenet_v2"

    def __init__(
        self,
        *,
        input_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_channels: int = 16,
        stem_stride: int = 2,
        stage_channels: Sequence[int] = (64, 160, 320, 640),
        stage_repeats: Sequence[int] = (4, 4, 8, 4),
        stage_strides: Sequence[int] = (2, 2, 2, 2),
        head_channels: int = 1024,
        dropout: float = 0.1,
        init: str = "published",
        channels: Sequence[float] | None = None,
        blocks: Sequence[int] | None = None,
        bits: Sequence[Bits] | None = None,
        uniform_bits: Sequence[Bits] = ((3, 3),),
        weight_quantizer: str = "lsq",
        act_quantizer: str = "lsq",
    ) -> None:
        self._config: dict[str, Any] = dict(
            input_size=input_size,
            num_classes=num_classes,
            in_channels=in_channels,
            stem_channels=stem_channels,
            stem_stride=stem_stride,
            stage_channels=tuple(stage_channels),
            stage_repeats=tuple(stage_repeats),
            stage_strides=tuple(stage_strides),
            head_channels=head_channels,
            dropout=dropout,
            init=init,
            channels=_listed("channels", channels, float, "ratios such as 0.2, 0.4, 0.6"),
            blocks=_listed("blocks", blocks, operator.index, "indices of choices, such as (0,)"),
        )
        if bits:  # a space without them has the configuration that it always had
            self._config |= dict(
                bits=bit_pairs("bits", bits),
                uniform_bits=bit_pairs("uniform_bits", uniform_bits),
                weight_quantizer=weight_quantizer,
                act_quantizer=act_quantizer,
            )
        self._check_config()
        self.input_size, self.num_classes, self.in_channels = input_size, num_classes, in_channels
        self.ratios: tuple[float, ...] = self._config["channels"] or (1.0,)
        self._blocks = tuple(self._make_blocks())
        self.bits: tuple[Bits, ...] = self._config.get("bits", ())
        further = tuple(pair for pair in self._config.get("uniform_bits", ()) if pair not in self.bits)
        self._pairs = self.bits + further  # by index of the gene
        self._weight_bits, self._act_bits, self._indices = candidates_of(self._pairs)
        self.kinds = ("block",) * (not self._config["blocks"]) + ("width",) * bool(self._config["channels"])
        # Genes of one kind of search mean nothing in another.
        if "width" in self.kinds:
            self.name = f"{type(self).name}+widths" if "block" in self.kinds else f"{type(self).name}_widths"
        if self.bits:
            self.name += "+bits" if self.kinds else "_bits"
            self.kinds += ("bits",)
        names = {
            "block": CHOICES,
            "width": tuple(f"{ratio:g}x" for ratio in self.ratios),
            "bits": bit_names(self.bits),
        }
        self.choices = tuple(names[kind] for _ in self._blocks for kind in self.kinds)
        self.references = {"bits": bit_names(further)}
        self.cost_tables = self._make_cost_tables()

    def config(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return dict(self._config)

    def __repr__(self) -> str:
        return f"ShuffleNetV2({', '.join(f'{key}={value!r}' for key, value in self._config.items())})"

    def supernet(self) -> Supernet:
        """A freshly initialised supernet, batch normalisation without scale and shift as published."""
        first_conv, conv_last, classifier = self._ends(affine=False)
        features = [
            [self._quantized(block.module(choice, block.mid_channels[-1], affine=False)) for choice in block.candidates]
            for block in self._blocks
        ]
        net = Supernet(
            first_conv,
            features,
            conv_last,
            classifier,
            self._config["dropout"],
            route=self._route,
            build=self.build,
            entries=(lambda block, setting: step_entries(block, *setting[1:])) if self.bits else None,  # type: ignore[index]
        )
        self._initialize(net)
        return net

    def build(self, arch: Architecture) -> Network:
        """A freshly initialised stand-alone network, batch normalisation with scale and shift, with the architecture's
        bits only.

        Raises:
            InputError: the architecture is not of this space.
        """
        first_conv, conv_last, classifier = self._ends(affine=True)
        features = [
            self._quantized(block.module(block.candidates[choice], mid, affine=True), bits)
            for block, choice, mid, bits in self._chosen(arch)
        ]
        net = Network(first_conv, features, conv_last, classifier, self._config["dropout"])
        self._initialize(net)
        return net

    def baselines(self) -> dict[str, Architecture]:
        """Each choice block everywhere, at the ratio nearest to 1; or that ratio everywhere if no blocks are searched.
        With ``bits`` each of these at all ``uniform_bits``.
        """
        width = min(range(len(self.ratios)), key=lambda index: abs(self.ratios[index] - 1))
        usual: dict[str, tuple[int, ...]] = {"": ()}
        if "block" in self.kinds:
            there = (width,) if "width" in self.kinds else ()
            usual = {name: (choice, *there) for choice, name in enumerate(CHOICES)}
        elif "width" in self.kinds:
            usual = {f"{self.ratios[width]:g}x": (width,)}
        if self.bits:
            pairs = self._config["uniform_bits"]
            usual = {
                f"{name}_{bits}".lstrip("_"): (*genes, self._pairs.index(pair))
                for name, genes in usual.items()
                for bits, pair in zip(bit_names(pairs), pairs, strict=True)
            }
        return {f"all_{name}": self.everywhere(*genes) for name, genes in usual.items()}

    def _chosen(self, arch: Architecture) -> list[tuple[_Block, int, int, int]]:
        """For every layer its sizes, the index of its candidate block, its mid channels, and the index of its bits."""
        genes, of_kind = self.architecture(arch).genes, {}
        for position, kind in enumerate(self.kinds):
            of_kind[kind] = genes[position :: len(self.kinds)]
        fixed = (0,) * len(self._blocks)  # what is not searched has one candidate
        of_layer = zip(self._blocks, *(of_kind.get(kind, fixed) for kind in ("block", "width", "bits")), strict=True)
        return [(block, choice, block.mid_channels[width], bits) for block, choice, width, bits in of_layer]

    def _route(self, arch: Architecture) -> list[Step]:
        """For every layer the index of its candidate block, and its mid channels; with bits, these and the indices of
        the weights' and the activations' bit-widths.
        """
        return [
            (choice, (mid, *self._indices[bits]) if self.bits else mid) for _, choice, mid, bits in self._chosen(arch)
        ]

    def _quantized(self, unit: Unit, pair: int | None = None) -> nn.Module:
        """The unit with all searched bits, or with those of one pair; the unit itself in a space without bits."""
        if not self.bits:
            return unit
        return QuantUnit(
            unit,
            weight_bits=self._weight_bits if pair is None else self._pairs[pair][0],
            act_bits=self._act_bits if pair is None else self._pairs[pair][1],
            weight_quantizer=self._config["weight_quantizer"],
            act_quantizer=self._config["act_quantizer"],
        )

    def _initialize(self, net: nn.Module) -> None:
        if self._config["init"] == "published":
            _initialize_as_published(net)
        for module in net.modules():
            if isinstance(module, QuantConv2d):
                module.start_weight_steps()

    def _ends(self, affine: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        stem, head, last = self._config["stem_channels"], self._config["head_channels"], self._blocks[-1].out_channels
        first_conv = nn.Sequential(
            nn.Conv2d(self.in_channels, stem, 3, self._config["stem_stride"], 1, bias=False),
            nn.BatchNorm2d(stem, affine=affine),
            nn.ReLU(inplace=True),
        )
        conv_last = nn.Sequential(
            nn.Conv2d(last, head, 1, bias=False), nn.BatchNorm2d(head, affine=affine), nn.ReLU(inplace=True)
        )
        return first_conv, conv_last, nn.Sequential(nn.Linear(head, self.num_classes, bias=False))

    def _make_blocks(self) -> Iterator[_Block]:
        config = self._config
        channels, size = config["stem_channels"], -(-self.input_size // config["stem_stride"])
        fixed: list[tuple[int, ...]] = [(choice,) for choice in config["blocks"] or ()]
        candidates = itertools.cycle(fixed or [tuple(range(len(CHOICES)))])
        for width, repeats, first_stride in zip(
            config["stage_channels"], config["stage_repeats"], config["stage_strides"], strict=True
        ):
            for repeat in range(repeats):
                mids = tuple(scaled_channels(width // 2, ratio) for ratio in self.ratios)
                stride = first_stride if repeat == 0 else 1
                block = _Block(channels, width, mids, stride, size, next(candidates))
                yield block
                channels, size = width, block.output_size

    def _make_cost_tables(self) -> dict[str, CostTable]:
        config, last = self._config, self._blocks[-1]
        stem = (9 * self.in_channels * config["stem_channels"], self._blocks[0].input_size)
        head = (last.out_channels * config["head_channels"], last.output_size)
        classifier = (config["head_channels"] * self.num_classes, 1)
        shape = [len(self.candidates(gene)) for gene in range(len(self.kinds))]

        def table(measure: Callable[[list[tuple[int, int]]], int], quantized: bool = False) -> CostTable:
            layers = []
            for block in self._blocks:
                worth = [weights * activations if quantized else 1 for weights, activations in self._pairs or [(1, 1)]]
                genes = itertools.product(block.candidates, block.mid_channels, worth)
                costs = [measure(block.convolutions(choice, mid)) * each for choice, mid, each in genes]
                layers.append(np.array(costs, dtype=np.int64).reshape(shape))
            return CostTable(0 if quantized else measure([stem, head, classifier]), tuple(layers))

        def macs(convolutions: list[tuple[int, int]]) -> int:
            return sum(weights * size**2 for weights, size in convolutions)

        tables = {
            "macs": table(macs),
            "params": table(lambda convolutions: sum(weights for weights, _ in convolutions)),
        }
        return tables | {"bitops": table(macs, quantized=True)} if self.bits else tables

    def _check_config(self) -> None:
        config = self._config
        for name in ("input_size", "num_classes", "in_channels", "stem_channels", "head_channels"):
            if not isinstance(config[name], int) or config[name] < 1:
                raise InputError(f"{name}: got {config[name]!r}; expected a positive integer")
        if config["stem_stride"] not in (1, 2):
            raise InputError(f"stem_stride: got {config['stem_stride']!r}; expected 1 or 2")
        if not 0 <= config["dropout"] < 1:
            raise InputError(f"dropout: got {config['dropout']!r}; expected 0 <= dropout < 1")
        if config["init"] not in ("published", "pytorch"):
            raise InputError(f"init: got {config['init']!r}; expected published or pytorch")
        stages = len(config["stage_channels"])
        if stages == 0:
            raise InputError("stage_channels: got none; expected at least one stage")
        for name in ("stage_repeats", "stage_strides"):
            if len(config[name]) != stages:
                raise InputError(f"{name}: got {len(config[name])} values for {stages} stage_channels")
        before = config["stem_channels"]
        for width in config["stage_channels"]:
            if not isinstance(width, int) or width % 2 or width <= before:
                raise InputError(f"stage_channels: got {width!r} after {before}; expected an even, larger number")
            before = width
        for repeats in config["stage_repeats"]:
            if not isinstance(repeats, int) or repeats < 1:
                raise InputError(f"stage_repeats: got {repeats!r}; expected positive integers")
        for stride in config["stage_strides"]:
            if stride not in (1, 2):
                raise InputError(f"stage_strides: got {stride!r}; expected 1 or 2")
        self._check_search()

    def _check_search(self) -> None:
        """Refuse widths and blocks that make no search."""
        channels, blocks = self._config["channels"], self._config["blocks"]
        narrowest = self._config["stage_channels"][0] // 2
        before = 0.0
        for ratio in channels or ():
            if not before < ratio <= WIDEST:
                raise InputError(f"channels: got {ratio!r} after {before:g}; expected rising ratios up to {WIDEST:g}")
            before = ratio
        for width in self._config["stage_channels"]:
            mids = [scaled_channels(width // 2, ratio) for ratio in channels or ()]
            for place, (mid, wider) in enumerate(itertools.pairwise(mids)):
                if 0 < mid == wider:
                    equal = f"{channels[place]:g} and {channels[place + 1]:g}"
                    raise InputError(f"channels: {equal} both give {mid} channels in a stage of {width // 2}")
        if channels and scaled_channels(narrowest, channels[0]) < 1:
            raise InputError(f"channels: {channels[0]:g} leaves none of the first stage's {narrowest} mid channels")
        for name, known in (
            ("weight_quantizer", "dorefa or lsq"),
            ("act_quantizer", "lsq or lsq+, as PACT clips at 0"),
        ):
            if name in self._config and self._config[name] not in known.split(",")[0].split(" or "):
                raise InputError(f"{name}: got {self._config[name]!r}; expected {known}")
        if blocks is None:
            return
        if channels is None and "bits" not in self._config:
            raise InputError("blocks: with all of them fixed nothing is left to search; give channels or bits too")
        layers = sum(self._config["stage_repeats"])
        if len(blocks) not in (1, layers):
            raise InputError(f"blocks: got {len(blocks)}; expected one for each of the {layers} layers, or one for all")
        for choice in blocks:
            if not isinstance(choice, int) or not 0 <= choice < len(CHOICES):
                raise InputError(f"blocks: got {choice!r}; expected 0 to {len(CHOICES) - 1} ({', '.join(CHOICES)})")


def _listed(name: str, values: Any, kind: Callable[[Any], Any], wanted: str) -> tuple[Any, ...] | None:
    """The values as a tuple of numbers, None for none of them."""
    if values is None:
        return None
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        return tuple(map(kind, values)) or None
    except (TypeError, ValueError):
        raise InputError(f"{name}: got {values!r}; expected {wanted}") from None


def _initialize_as_published(net: nn.Module) -> None:
    """The published code's initialisation: a normal with standard deviation 1 / input channels of a convolution's
    weight (0.01 in the stem and in the classifier), and 1e-4 as shift of batch normalisation.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            deviation = 0.01 if name.startswith("first_conv") else 1.0 / module.weight.shape[1]
            nn.init.normal_(module.weight, 0.0, deviation)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, 1e-4)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
