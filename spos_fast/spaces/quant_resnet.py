"""The mixed-precision ResNet space of SPOS (arXiv 1904.00420, section 4.3): bit-widths and widths of its blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.nn.quant import QuantBasicBlock, QuantConv2d
from spos_fast.nn.steps import step_entries
from spos_fast.spaces.base import CostTable, Space, scaled_channels
from spos_fast.spaces.bits import Bits, bit_names, bit_pairs, candidates_of
from spos_fast.supernet import Network, Step, Supernet

REPEATS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
PAPER_BITS: tuple[Bits, ...] = ((1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4))
WIDEST = 4.0


@dataclass(frozen=True)
class _Block:
    """Sizes of one residual block.

    Attributes:
        in_channels, out_channels, stride: as of the block.
        mid_channels: output channels of the first convolution, at every ratio of the search.
        input_size: height and width of what comes in.
    """

    in_channels: int
    out_channels: int
    mid_channels: tuple[int, ...]
    stride: int
    input_size: int

    @property
    def output_size(self) -> int:
        return -(-self.input_size // self.stride)

    def weights(self, mid: int) -> int:
        """Of its convolutions, which all make maps of the output's size: MACs are weights x output area."""
        shortcut = self.stride > 1 or self.in_channels != self.out_channels
        return 9 * mid * (self.in_channels + self.out_channels) + shortcut * self.in_channels * self.out_channels


class QuantResNet(Space):
    """ResNet-18 or -34 with searched bit-widths: ``18**8`` and ``18**16`` networks with the defaults.

    Every residual block has two genes: a pair of bit-widths (of the weights and of the activations of all its
    convolutions), and its width, a ratio of the output channels of its first convolution to the usual number. First
    convolution and classifier stay in full precision. Weights are shared by all bit-widths and stored once, at the
    widest ratio; a narrower block uses the first of its channels. What depends on the bits, the quantizers' steps, is a
    short vector in each convolution.

    Args:
        depth: 18 or 34.
        input_size: height and width of the images, in pixels.
        num_classes: number of logits.
        in_channels: channels of the images.
        bits: searched pairs (bits of weights, bits of activations), 1 to 8 each. The default is the paper's.
        uniform_bits: pairs of the uniform networks that :meth:`baselines` compares with. No search draws those that are
            not in ``bits``.
        ratios: ascending ratios of a block's mid channels; :func:`scaled_channels` rounds.
        stem: ``"imagenet"`` (7x7 convolution of stride 2, then 3x3 max pooling of stride 2) or ``"cifar"`` (3x3).
        stem_stride: stride of the stem's convolution, 1 or 2; None is 2 for ``"imagenet"`` and 1 for ``"cifar"``.
        stage_channels: output channels of every stage. The first block of every stage but the first has stride 2.
        stage_repeats: residual blocks of every stage; None is the depth's.
        weight_quantizer: ``"dorefa"`` as in the paper, or ``"lsq"``.
        act_quantizer: ``"pact"`` as in the paper, ``"pact_residual"``, ``"lsq"`` or ``"lsq+"``.
        bn: ``"shared"``: one batch normalisation for all bit-widths, as in the paper. ``"per_bits"``: one for every
            pair of bit-widths. Either is recalibrated for every candidate of a search.

    Raises:
        InputError: sizes or bit-widths that give no network.
    """

    kinds = ("bits", "width")

    def __init__(
        self,
        depth: int = 18,
        *,
        input_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        bits: Sequence[Bits] = PAPER_BITS,
        uniform_bits: Sequence[Bits] = ((3, 3),),
        ratios: Sequence[float] = (0.5, 1.0, 1.5),
        stem: str = "imagenet",
        stem_stride: int | None = None,
        stage_channels: Sequence[int] = (64, 128, 256, 512),
        stage_repeats: Sequence[int] | None = None,
        weight_quantizer: str = "dorefa",
        act_quantizer: str = "pact",
        bn: str = "shared",
    ) -> None:
        if depth not in REPEATS:
            raise InputError(f"depth: got {depth!r}; expected {' or '.join(map(str, REPEATS))}")
        self._config: dict[str, Any] = dict(
            depth=depth,
            input_size=input_size,
            num_classes=num_classes,
            in_channels=in_channels,
            bits=bit_pairs("bits", bits),
            uniform_bits=bit_pairs("uniform_bits", uniform_bits),
            ratios=tuple(ratios),
            stem=stem,
            stem_stride=stem_stride or {"imagenet": 2}.get(stem, 1),
            stage_channels=tuple(stage_channels),
            stage_repeats=tuple(stage_repeats or REPEATS[depth]),
            weight_quantizer=weight_quantizer,
            act_quantizer=act_quantizer,
            bn=bn,
        )
        self._check_config()
        self.name = f"quant_resnet{depth}"
        self.input_size, self.num_classes, self.in_channels = input_size, num_classes, in_channels
        self.bits: tuple[Bits, ...] = self._config["bits"]
        self.ratios: tuple[float, ...] = self._config["ratios"]
        further = tuple(pair for pair in self._config["uniform_bits"] if pair not in self.bits)
        self._pairs = self.bits + further  # by index of the gene
        self._weight_bits, self._act_bits, self._indices = candidates_of(self._pairs)
        self._blocks = tuple(self._make_blocks())
        self.choices = (bit_names(self.bits), tuple(f"{ratio:g}x" for ratio in self.ratios)) * len(self._blocks)
        self.references = {"bits": bit_names(further)}
        self.cost_tables = self._make_cost_tables()

    def config(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return dict(self._config)

    def __repr__(self) -> str:
        return f"QuantResNet({', '.join(f'{key}={value!r}' for key, value in self._config.items())})"

    def uniform(self, weight_bits: int, act_bits: int) -> Architecture:
        """The network with the same bit-widths in all blocks, at the ratio nearest to 1.

        Raises:
            InputError: the pair is in neither ``bits`` nor ``uniform_bits``.
        """
        pair = (weight_bits, act_bits)
        if pair not in self._pairs:
            known = ", ".join(bit_names(self._pairs))
            raise InputError(f"uniform: got {pair}; the space knows {known}; give it the pair in uniform_bits")
        width = min(range(len(self.ratios)), key=lambda index: abs(self.ratios[index] - 1))
        return self.everywhere(self._pairs.index(pair), width)

    def baselines(self) -> dict[str, Architecture]:
        """The uniform networks of ``uniform_bits``."""
        pairs = self._config["uniform_bits"]
        return {f"all_{name}": self.uniform(*pair) for name, pair in zip(bit_names(pairs), pairs, strict=True)}

    def supernet(self) -> Supernet:
        """A freshly initialised supernet.

        Batch normalisation has no scale and shift, as in the published supernets: the paths of a step share them, and
        one scale for all bit-widths would fit none; statistics are recalibrated for every candidate, and the scale of
        what a quantizer sees is learned by its step.
        """
        first_conv, classifier = self._ends(affine=False)
        features = [self._candidates(block) for block in self._blocks]
        net = Supernet(
            first_conv,
            features,
            nn.Identity(),
            classifier,
            0.0,
            route=self._route,
            build=self.build,
            entries=lambda block, setting: step_entries(block, *setting[1:]),  # type: ignore[index]
        )
        _initialize(net)
        return net

    def build(self, arch: Architecture) -> Network:
        """A freshly initialised stand-alone network with the architecture's bits only, batch normalisation with scale
        and shift.

        Raises:
            InputError: the architecture is not of this space.
        """
        genes = self.architecture(arch).genes
        first_conv, classifier = self._ends(affine=True)
        features = []
        for block, bits, width in zip(self._blocks, genes[::2], genes[1::2], strict=True):
            weight_bits, act_bits = self._pairs[bits]
            features.append(self._module(block, block.mid_channels[width], (weight_bits,), (act_bits,), affine=True))
        net = Network(first_conv, features, nn.Identity(), classifier, 0.0)
        _initialize(net)
        return net

    def _route(self, arch: Architecture) -> list[Step]:
        """For every block its candidate and (mid channels, index of the weights' bits, index of the activations')."""
        genes = self.architecture(arch).genes
        return [
            (bits if self._config["bn"] == "per_bits" else 0, (block.mid_channels[width], *self._indices[bits]))
            for block, bits, width in zip(self._blocks, genes[::2], genes[1::2], strict=True)
        ]

    def _candidates(self, block: _Block) -> list[nn.Module]:
        """One block, or, with a batch normalisation for every pair of bit-widths, one for each that share all else."""
        count = len(self._pairs) if self._config["bn"] == "per_bits" else 1
        mid = block.mid_channels[-1]
        made = [self._module(block, mid, self._weight_bits, self._act_bits, affine=False) for _ in range(count)]
        for other in made[1:]:
            for name in ("conv1", "conv2", "downsample.0"):
                parent, _, child = name.rpartition(".")
                if other.downsample is not None or not parent:
                    setattr(other.get_submodule(parent), child, made[0].get_submodule(name))
        return list(made)

    def _module(
        self, block: _Block, mid: int, weight_bits: Sequence[int], act_bits: Sequence[int], affine: bool
    ) -> QuantBasicBlock:
        return QuantBasicBlock(
            block.in_channels,
            block.out_channels,
            mid,
            block.stride,
            weight_bits=weight_bits,
            act_bits=act_bits,
            weight_quantizer=self._config["weight_quantizer"],
            act_quantizer=self._config["act_quantizer"],
            affine=affine,
        )

    def _ends(self, affine: bool) -> tuple[nn.Module, nn.Module]:
        """The stem and the classifier."""
        config = self._config
        channels, kernel = config["stage_channels"][0], 7 if config["stem"] == "imagenet" else 3
        layers: list[nn.Module] = [
            nn.Conv2d(self.in_channels, channels, kernel, config["stem_stride"], kernel // 2, bias=False),
            nn.BatchNorm2d(channels, affine=affine),
            nn.ReLU(inplace=True),
        ]
        if config["stem"] == "imagenet":
            layers.append(nn.MaxPool2d(3, 2, 1))
        return nn.Sequential(*layers), nn.Sequential(nn.Linear(config["stage_channels"][-1], self.num_classes))

    def _make_blocks(self) -> Iterator[_Block]:
        config = self._config
        size = -(-self.input_size // config["stem_stride"])
        size = -(-size // 2) if config["stem"] == "imagenet" else size
        channels = config["stage_channels"][0]
        for stage, (width, repeats) in enumerate(zip(config["stage_channels"], config["stage_repeats"], strict=True)):
            mids = tuple(scaled_channels(width, ratio) for ratio in self.ratios)
            for repeat in range(repeats):
                block = _Block(channels, width, mids, 2 if stage and not repeat else 1, size)
                yield block
                channels, size = width, block.output_size

    def _make_cost_tables(self) -> dict[str, CostTable]:
        config, first = self._config, self._config["stage_channels"][0]
        stem = (7 if config["stem"] == "imagenet" else 3) ** 2 * self.in_channels * first
        stem_size = -(-self.input_size // config["stem_stride"])
        classifier = config["stage_channels"][-1] * self.num_classes

        def table(fixed: int, measure: Callable[[_Block, int, Bits], int]) -> CostTable:
            layers = []
            for block in self._blocks:
                pairs = itertools.product(self._pairs, block.mid_channels)
                costs = [measure(block, mid, bits) for bits, mid in pairs]
                layers.append(np.array(costs, dtype=np.int64).reshape(len(self._pairs), len(block.mid_channels)))
            return CostTable(fixed, tuple(layers))

        def macs(block: _Block, mid: int, _: Bits) -> int:
            return block.weights(mid) * block.output_size**2

        return {
            "macs": table(stem * stem_size**2 + classifier, macs),
            "params": table(stem + classifier + self.num_classes, lambda block, mid, _: block.weights(mid)),
            "bitops": table(0, lambda block, mid, bits: macs(block, mid, bits) * bits[0] * bits[1]),
        }

    def _check_config(self) -> None:
        config = self._config
        for name in ("input_size", "num_classes", "in_channels"):
            if not isinstance(config[name], int) or config[name] < 1:
                raise InputError(f"{name}: got {config[name]!r}; expected a positive integer")
        for name, known in (
            ("stem", ("imagenet", "cifar")),
            ("stem_stride", (1, 2)),
            ("weight_quantizer", ("dorefa", "lsq")),
            ("act_quantizer", ("pact", "pact_residual", "lsq", "lsq+")),
            ("bn", ("shared", "per_bits")),
        ):
            if config[name] not in known:
                raise InputError(f"{name}: got {config[name]!r}; expected {' or '.join(map(str, known))}")
        if len(config["stage_repeats"]) != len(config["stage_channels"]):
            stages = len(config["stage_channels"])
            raise InputError(f"stage_repeats: got {len(config['stage_repeats'])} values for {stages} stage_channels")
        for name in ("stage_channels", "stage_repeats"):
            for value in config[name]:
                if not isinstance(value, int) or value < 1:
                    raise InputError(f"{name}: got {value!r}; expected positive integers")
        if not config["ratios"]:
            raise InputError("ratios: got none; (1,) searches bit-widths only")
        before = 0.0
        for ratio in config["ratios"]:
            if not before < ratio <= WIDEST:
                raise InputError(f"ratios: got {ratio!r} after {before:g}; expected rising ratios up to {WIDEST:g}")
            before = ratio
        for width in config["stage_channels"]:
            mids = [0, *(scaled_channels(width, ratio) for ratio in config["ratios"])]
            for narrow, wide in itertools.pairwise(mids):
                if narrow == wide:
                    given = ", ".join(f"{ratio:g}" for ratio in config["ratios"])
                    raise InputError(f"ratios: {given} do not give different numbers of mid channels of {width}")


def _initialize(net: nn.Module) -> None:
    """Initial weights as of torchvision's ResNets (He et al. 2015, by fan-out), and the weights' steps for them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, QuantConv2d):
            module.start_weight_steps()
