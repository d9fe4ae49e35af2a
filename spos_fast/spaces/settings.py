"""What a user can set of each search space: the section ``space`` of the settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from spos_fast.nasbench.nasbench201_cells import OPS
from spos_fast.spaces import Space
from spos_fast.spaces.bits import bit_names, named_bits
from spos_fast.spaces.nasbench201 import NASBench201
from spos_fast.spaces.nasbench_macro import NASBenchMacro
from spos_fast.spaces.quant_resnet import PAPER_BITS, REPEATS, QuantResNet
from spos_fast.spaces.shufflenet_v2 import ShuffleNetV2


@dataclass(frozen=True)
class SpaceConfig:
    """Which search space, and its sizes; defaults are the papers'. Every space has fields of its own.

    Attributes:
        name: the search space: shufflenet_v2, nasbench201, nasbench_macro, quant_resnet18 or quant_resnet34.
    """

    name: str

    def make(self, *, input_size: int, in_channels: int, num_classes: int) -> Space:
        """The space for images of one data set.

        Raises:
            InputError: sizes that give no network.
        """
        raise NotImplementedError

    def sizes(self) -> dict[str, object]:
        """All fields but the name; bits, which have names, as pairs of numbers."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "name"}
        for setting in {"bits", "uniform_bits"} & {*sizes}:
            sizes[setting] = named_bits(setting, sizes[setting])
        return sizes


@dataclass(frozen=True)
class ShuffleNetV2Config(SpaceConfig):
    """Sizes of the ShuffleNetV2 space. Defaults are the paper's.

    Attributes:
        stem_channels: output channels of the stem.
        stem_stride: 1 or 2.
        stage_channels: output channels of every stage.
        stage_repeats: choice blocks of every stage.
        stage_strides: stride of the first block of every stage.
        head_channels: channels of the last convolution.
        dropout: probability before the classifier.
        init: initial weights: published, or pytorch (better for short schedules).
        channels: ratios that the mid channels of every block are searched in, such as 0.2,0.4,0.6; empty: no widths.
        blocks: choice block of every layer by index, for a search of widths only; one number stands for all layers.
            Empty: blocks are searched.
        bits: searched bits of weights and activations, such as 1W2A,2W2A; empty: nothing is quantized.
        uniform_bits: bits of the uniform networks that are retrained for comparison; the search leaves out those that
            are not among bits.
        weight_quantizer: dorefa or lsq.
        act_quantizer: lsq or lsq+; of ResNets also pact or pact_residual.
    """

    name: str = ShuffleNetV2.name
    stem_channels: int = 16
    stem_stride: int = 2
    stage_channels: tuple[int, ...] = (64, 160, 320, 640)
    stage_repeats: tuple[int, ...] = (4, 4, 8, 4)
    stage_strides: tuple[int, ...] = (2, 2, 2, 2)
    head_channels: int = 1024
    dropout: float = 0.1
    init: str = "published"
    channels: tuple[float, ...] = ()
    blocks: tuple[int, ...] = ()
    bits: tuple[str, ...] = ()
    uniform_bits: tuple[str, ...] = ("3W3A",)
    weight_quantizer: str = "lsq"
    act_quantizer: str = "lsq"

    def make(self, *, input_size: int, in_channels: int, num_classes: int) -> ShuffleNetV2:
        """The space for images of one data set.

        Raises:
            InputError: sizes that give no network.
        """
        return ShuffleNetV2(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            **self.sizes(),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class QuantResNetConfig(SpaceConfig):
    """Sizes and bit-widths of the mixed-precision ResNet spaces. Defaults are the paper's.

    Attributes:
        bits: searched bits of weights and activations, such as 1W2A,2W2A.
        uniform_bits: bits of the uniform networks that are retrained for comparison; the search leaves out those that
            are not among bits.
        ratios: ratios that the width of every residual block is searched in.
        stem: imagenet (7x7 convolution and max pooling) or cifar (3x3 convolution).
        stem_stride: of the stem's convolution, 1 or 2; 0: the usual one of the stem.
        stage_channels: output channels of every stage.
        stage_repeats: residual blocks of every stage; empty: the depth's.
        weight_quantizer: dorefa or lsq.
        act_quantizer: pact, pact_residual, lsq or lsq+.
        bn: batch normalisation: shared, or per_bits for one for every pair of bit-widths.
    """

    name: str = "quant_resnet18"
    bits: tuple[str, ...] = bit_names(PAPER_BITS)
    uniform_bits: tuple[str, ...] = ("3W3A",)
    ratios: tuple[float, ...] = (0.5, 1.0, 1.5)
    stem: str = "imagenet"
    stem_stride: int = 0
    stage_channels: tuple[int, ...] = (64, 128, 256, 512)
    stage_repeats: tuple[int, ...] = ()
    weight_quantizer: str = "dorefa"
    act_quantizer: str = "pact"
    bn: str = "shared"

    def make(self, *, input_size: int, in_channels: int, num_classes: int) -> QuantResNet:
        """The space for images of one data set.

        Raises:
            InputError: sizes or bit-widths that give no network.
        """
        depth = next(depth for depth in REPEATS if self.name.endswith(str(depth)))
        return QuantResNet(
            depth,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            **{**self.sizes(), "stem_stride": self.stem_stride or None},  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class NASBench201Config(SpaceConfig):
    """Sizes of the NAS-Bench-201 space. Defaults are the benchmark's.

    Attributes:
        ops: operations that are searched, of none, skip_connect, nor_conv_1x1, nor_conv_3x3, avg_pool_3x3.
        stem_channels: output channels of the stem, and of the first stage.
        cells: cells of each of the three stages.
        stem_stride: 1 as in the benchmark, or 2 for networks of a quarter of the work.
    """

    name: str = NASBench201.name
    ops: tuple[str, ...] = OPS
    stem_channels: int = 16
    cells: int = 5
    stem_stride: int = 1

    def make(self, *, input_size: int, in_channels: int, num_classes: int) -> NASBench201:
        """The space for images of one data set.

        Raises:
            InputError: sizes that give no network.
        """
        return NASBench201(
            self.ops,
            channels=self.stem_channels,
            cells=self.cells,
            stem_stride=self.stem_stride,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
        )


@dataclass(frozen=True)
class NASBenchMacroConfig(SpaceConfig):
    """Sizes of the NAS-Bench-Macro space. Defaults are the benchmark's.

    Attributes:
        stem_channels: output channels of the stem; those of a stage are twice those of the one before.
        stage_repeats: choice blocks of every stage.
        head_channels: channels of the last convolution.
    """

    name: str = NASBenchMacro.name
    stem_channels: int = 32
    stage_repeats: tuple[int, ...] = (2, 3, 3)
    head_channels: int = 1280

    def make(self, *, input_size: int, in_channels: int, num_classes: int) -> NASBenchMacro:
        """The space for images of one data set.

        Raises:
            InputError: sizes that give no network.
        """
        return NASBenchMacro(
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            stem_channels=self.stem_channels,
            stage_repeats=self.stage_repeats,
            head_channels=self.head_channels,
        )


# By the name that a user gives; the first is the default.
SPACE_CONFIGS: dict[str, type[SpaceConfig]] = {
    ShuffleNetV2.name: ShuffleNetV2Config,
    **{f"quant_resnet{depth}": QuantResNetConfig for depth in REPEATS},
    NASBench201.name: NASBench201Config,
    NASBenchMacro.name: NASBenchMacroConfig,
}
