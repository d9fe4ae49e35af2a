"""The ShuffleNetV2 block space of SPOS (arXiv 1904.00420, table 2), with every size as a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.nn import ShuffleUnit, XceptionUnit
from spos_fast.spaces.base import CostTable, Space
from spos_fast.supernet import Network, Supernet

KERNEL_SIZES = (3, 5, 7)
CHOICES = ("shuffle_k3", "shuffle_k5", "shuffle_k7", "xception")


@dataclass(frozen=True)
class _Block:
    """Sizes of one choice block: ``input_size`` is the height and width that comes in."""

    in_channels: int
    out_channels: int
    mid_channels: int
    stride: int
    input_size: int

    @property
    def output_size(self) -> int:
        return -(-self.input_size // self.stride)

    def module(self, choice: int, affine: bool) -> nn.Module:
        if choice < len(KERNEL_SIZES):
            return ShuffleUnit(
                self.in_channels, self.out_channels, self.mid_channels, KERNEL_SIZES[choice], self.stride, affine
            )
        return XceptionUnit(self.in_channels, self.out_channels, self.mid_channels, self.stride, affine)

    def convolutions(self, choice: int) -> list[tuple[int, int]]:
        """(weights, output height) of every convolution; without bias, MACs are weights x output area."""
        splits = self.stride == 1 and self.in_channels == self.out_channels
        narrow = self.in_channels // 2 if splits else self.in_channels
        mid, wide = self.mid_channels, self.out_channels - narrow
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
        )
        self._check_config()
        self.input_size, self.num_classes, self.in_channels = input_size, num_classes, in_channels
        self._blocks = tuple(self._make_blocks())
        self.choices = (CHOICES,) * len(self._blocks)
        self.cost_tables = self._make_cost_tables()

    def config(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return dict(self._config)

    def __repr__(self) -> str:
        return f"ShuffleNetV2({', '.join(f'{key}={value!r}' for key, value in self._config.items())})"

    def supernet(self) -> Supernet:
        """A freshly initialised supernet, batch normalisation without scale and shift as published."""
        first_conv, conv_last, classifier = self._ends(affine=False)
        features = [[block.module(choice, affine=False) for choice in range(len(CHOICES))] for block in self._blocks]
        net = Supernet(
            first_conv,
            features,
            conv_last,
            classifier,
            self._config["dropout"],
            check=self.architecture,
            build=self.build,
        )
        if self._config["init"] == "published":
            _initialize_as_published(net)
        return net

    def build(self, arch: Architecture) -> Network:
        """A freshly initialised stand-alone network, batch normalisation with scale and shift.

        Raises:
            InputError: the architecture is not of this space.
        """
        genes = self.architecture(arch).genes
        first_conv, conv_last, classifier = self._ends(affine=True)
        features = [block.module(gene, affine=True) for block, gene in zip(self._blocks, genes, strict=True)]
        net = Network(first_conv, features, conv_last, classifier, self._config["dropout"])
        if self._config["init"] == "published":
            _initialize_as_published(net)
        return net

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
        for width, repeats, first_stride in zip(
            config["stage_channels"], config["stage_repeats"], config["stage_strides"], strict=True
        ):
            for repeat in range(repeats):
                block = _Block(channels, width, width // 2, first_stride if repeat == 0 else 1, size)
                yield block
                channels, size = width, block.output_size

    def _make_cost_tables(self) -> dict[str, CostTable]:
        config, last = self._config, self._blocks[-1]
        stem = (9 * self.in_channels * config["stem_channels"], self._blocks[0].input_size)
        head = (last.out_channels * config["head_channels"], last.output_size)
        classifier = (config["head_channels"] * self.num_classes, 1)

        def table(measure: Any) -> CostTable:
            layers = tuple(
                np.array([measure(block.convolutions(choice)) for choice in range(len(CHOICES))], dtype=np.int64)
                for block in self._blocks
            )
            return CostTable(measure([stem, head, classifier]), layers)

        return {
            "macs": table(lambda convolutions: sum(weights * size**2 for weights, size in convolutions)),
            "params": table(lambda convolutions: sum(weights for weights, _ in convolutions)),
        }

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
