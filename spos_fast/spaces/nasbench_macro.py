"""The space of NAS-Bench-Macro (Su et al. 2021, arXiv 2103.11922; github.com/xiusu/NAS-Bench-Macro)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.nasbench.nasbench_macro import BLOCKS as CHOICES
from spos_fast.nn.inverted_residual import InvertedResidual, Shortcut
from spos_fast.spaces.base import CostTable, Space
from spos_fast.supernet import Network, Supernet

# (expansion, kernel size) of the choices behind the first.
_BLOCKS = ((3, 3), (6, 5))


class NASBenchMacro(Space):
    """A chain of blocks, each left out, MB3_K3 or MB6_K5 (``3**8`` networks with the defaults).

    MB blocks are MobileNetV2's, with an expansion of 3 or 6 and a depthwise kernel of 3 or 5. The first block of a
    stage halves the image and doubles the channels; left out, it is a strided 1x1 convolution with batch normalisation.
    Before the blocks a 3x3 stem, behind them a 1x1 convolution, global average pooling and a linear classifier. Genes
    are the digits of the benchmark's strings.

    Parameters are counted as the benchmark counts them: with scale and shift of batch normalisation and with the
    classifier's bias. With the defaults, parameters and MACs are the benchmark's columns.

    Args:
        input_size: height and width of the images, in pixels.
        num_classes: number of logits.
        in_channels: channels of the images.
        stem_channels: output channels of the stem; those of a stage are twice those of the one before.
        stage_repeats: blocks of every stage.
        head_channels: output channels of the last 1x1 convolution.

    Raises:
        InputError: sizes that give no network.
    """

    name = "nasbench_macro"
    kinds = ("block",)

    def __init__(
        self,
        *,
        input_size: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
        stem_channels: int = 32,
        stage_repeats: Sequence[int] = (2, 3, 3),
        head_channels: int = 1280,
    ) -> None:
        sizes = dict(input_size=input_size, num_classes=num_classes, in_channels=in_channels)
        sizes |= dict(stem_channels=stem_channels, head_channels=head_channels)
        for name, value in sizes.items():
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise InputError(f"{name}: got {value!r}; expected a positive integer")
        repeats = tuple(stage_repeats)
        if not repeats or not all(hasattr(count, "__index__") and count > 0 for count in repeats):
            raise InputError(f"stage_repeats: got {stage_repeats!r}; expected positive integers, one a stage")
        self._sizes = {name: operator.index(value) for name, value in sizes.items()}
        self.stage_repeats = tuple(map(operator.index, repeats))
        self.choices = (CHOICES,) * sum(self.stage_repeats)
        # (input channels, output channels, stride, output height) of every layer.
        self._layers: list[tuple[int, int, int, int]] = []
        channels, size = self._sizes["stem_channels"], self._sizes["input_size"]
        for count in self.stage_repeats:
            size = -(-size // 2)
            self._layers.append((channels, 2 * channels, 2, size))
            channels *= 2
            self._layers += [(channels, channels, 1, size)] * (count - 1)
        self.cost_tables = self._make_cost_tables()

    def config(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return {**self._sizes, "stage_repeats": self.stage_repeats}

    def __repr__(self) -> str:
        return f"NASBenchMacro({', '.join(f'{key}={value!r}' for key, value in self.config().items())})"

    def supernet(self) -> Supernet:
        """A freshly initialised supernet, batch normalisation without scale and shift."""
        first_conv, conv_last, classifier = self._ends(affine=False)
        features = [
            [self._block(layer, choice, affine=False) for choice in range(len(CHOICES))]
            for layer in range(len(self._layers))
        ]
        return Supernet(first_conv, features, conv_last, classifier, 0.0, route=self._route, build=self.build)

    def build(self, arch: Architecture) -> Network:
        """A freshly initialised stand-alone network, batch normalisation with scale and shift.

        Raises:
            InputError: the architecture is not of this space.
        """
        genes = self.architecture(arch).genes
        first_conv, conv_last, classifier = self._ends(affine=True)
        features = [self._block(layer, choice, affine=True) for layer, choice in enumerate(genes)]
        return Network(first_conv, features, conv_last, classifier, 0.0)

    def baselines(self) -> dict[str, Architecture]:
        """Each choice in all layers."""
        return {f"all_{name}": self.everywhere(choice) for choice, name in enumerate(CHOICES)}

    def isomorphism_key(self, genes: Sequence[int]) -> str:
        """Equal for networks that are the same: blocks that are left out inside of a stage stand at its end."""
        stages, first = [], 0
        for count in self.stage_repeats:
            head, *rest = genes[first : first + count]
            stages += [head, *sorted(rest, key=lambda choice: choice == 0)]
            first += count
        return "-".join(map(str, stages))

    def _route(self, arch: Architecture) -> list[tuple[int, int]]:
        return [(choice, 0) for choice in self.architecture(arch).genes]

    def _block(self, layer: int, choice: int, affine: bool) -> nn.Module:
        narrow, wide, stride, _ = self._layers[layer]
        if choice == 0:
            return Shortcut(narrow, wide, stride, affine)
        return InvertedResidual(narrow, wide, *_BLOCKS[choice - 1], stride, affine)

    def _ends(self, affine: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Stem, last convolution and classifier."""
        stem, head, last = self._sizes["stem_channels"], self._sizes["head_channels"], self._layers[-1][1]
        first_conv = nn.Sequential(
            nn.Conv2d(self._sizes["in_channels"], stem, 3, 1, 1, bias=False),
            nn.BatchNorm2d(stem, affine=affine),
            nn.ReLU(inplace=True),
        )
        conv_last = nn.Sequential(
            nn.Conv2d(last, head, 1, bias=False), nn.BatchNorm2d(head, affine=affine), nn.ReLU(inplace=True)
        )
        return first_conv, conv_last, nn.Sequential(nn.Linear(head, self._sizes["num_classes"]))

    def _convolutions(self, layer: int, choice: int) -> list[tuple[int, int, int]]:
        """(weights, output area, output channels) of every convolution of a block."""
        narrow, wide, stride, size = self._layers[layer]
        if choice == 0:
            return [(narrow * wide, size**2, wide)] if stride == 2 else []
        expansion, kernel = _BLOCKS[choice - 1]
        mid, before = expansion * narrow, (self._sizes["input_size"] if layer == 0 else self._layers[layer - 1][3]) ** 2
        return [(narrow * mid, before, mid), (kernel**2 * mid, size**2, mid), (mid * wide, size**2, wide)]

    def _make_cost_tables(self) -> dict[str, CostTable]:
        sizes, last = self._sizes, self._layers[-1]
        stem, head, classes = sizes["stem_channels"], sizes["head_channels"], sizes["num_classes"]
        ends = [
            (9 * sizes["in_channels"] * stem, sizes["input_size"] ** 2, stem),
            (last[1] * head, last[3] ** 2, head),
        ]

        def table(measure: Any, classifier: int) -> CostTable:
            layers = [
                [measure(self._convolutions(layer, choice)) for choice in range(len(CHOICES))]
                for layer in range(len(self._layers))
            ]
            return CostTable(measure(ends) + classifier, tuple(np.array(costs, dtype=np.int64) for costs in layers))

        return {
            "macs": table(lambda found: sum(weights * area for weights, area, _ in found), head * classes),
            # Behind every convolution a normalisation with scale and shift.
            "params": table(lambda found: sum(weights + 2 * out for weights, _, out in found), (head + 1) * classes),
        }
