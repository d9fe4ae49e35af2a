"""The space of NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326) and its reduced versions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from spos_fast.architecture import Architecture
from spos_fast.errors import InputError
from spos_fast.nasbench.nasbench201_cells import EDGES, OPS, isomorphism_key
from spos_fast.nn.cells import CONVOLUTIONS, Cell, ResidualReduction
from spos_fast.spaces.base import CostTable, Space
from spos_fast.supernet import Network, Step, Supernet

# Reduced spaces of the SPOS paper (arXiv 1904.00420): without the 1x1 convolution, without pooling, without both.
REDUCED_OPS = {
    1: tuple(name for name in OPS if name != "nor_conv_1x1"),
    2: tuple(name for name in OPS if name != "avg_pool_3x3"),
    3: tuple(name for name in OPS if name not in ("nor_conv_1x1", "avg_pool_3x3")),
}
STAGES = 3


class NASBench201(Space):
    """Cells of four nodes and six edges, one operation an edge (``len(ops)**6`` networks; 15,625 in the full space).

    The same cell stands everywhere in the network: 3x3 stem, ``cells`` cells, a residual block that halves the image
    and doubles the channels, as many cells, another such block, as many cells, batch normalisation and ReLU, global
    average pooling, linear classifier. A gene is the index of an edge's operation in ``ops``, in the order of
    :data:`spos_fast.nasbench.nasbench201_cells.EDGES`.

    Parameters are counted as the benchmark counts them: with scale and shift of batch normalisation and with the
    classifier's bias. For 16 channels, 5 cells and 10 classes, parameters and MACs are the benchmark's columns.

    Args:
        ops: the operations that are searched, some of the benchmark's; :meth:`reduced` has those of the SPOS paper.
        channels: of the stem and of the first stage.
        cells: cells of each of the three stages.
        stem_stride: of the stem's convolution, 1 as in the benchmark, or 2 for networks of a quarter of the work.
        input_size: height and width of the images, in pixels; a multiple of 4 (8 with a stem of stride 2).
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        InputError: unknown or repeated operations, fewer than two of them, or sizes that give no network.
    """

    name = "nasbench201"
    kinds = ("op",)

    def __init__(
        self,
        ops: Sequence[str] = OPS,
        *,
        channels: int = 16,
        cells: int = 5,
        stem_stride: int = 1,
        input_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        if isinstance(ops, str) or not set(ops) <= set(OPS) or len(set(ops)) != len(ops) or len(ops) < 2:
            raise InputError(f"ops: got {ops!r}; expected two or more of {', '.join(OPS)}, each once")
        sizes = dict(channels=channels, cells=cells, input_size=input_size, in_channels=in_channels)
        for name, value in {**sizes, "num_classes": num_classes}.items():
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise InputError(f"{name}: got {value!r}; expected a positive integer")
        if stem_stride not in (1, 2):
            raise InputError(f"stem_stride: got {stem_stride!r}; expected 1 or 2")
        sizes["stem_stride"] = stem_stride
        if input_size % (4 * stem_stride):
            raise InputError(
                f"input_size: got {input_size}; expected a multiple of {4 * stem_stride}, which the network divides by"
            )
        self.ops = tuple(ops)
        self._config = {name: operator.index(value) for name, value in {**sizes, "num_classes": num_classes}.items()}
        self.choices = (self.ops,) * len(EDGES)
        self.cost_tables = self._make_cost_tables()

    @classmethod
    def reduced(cls, number: int, **sizes: Any) -> NASBench201:
        """Reduce-1 (without the 1x1 convolution), Reduce-2 (without pooling) or Reduce-3 (without both) of the paper.

        Raises:
            InputError: another number.
        """
        if number not in REDUCED_OPS:
            raise InputError(f"number: got {number!r}; expected 1, 2 or 3")
        return cls(REDUCED_OPS[number], **sizes)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The edges, ``0→1`` and so on."""
        return tuple(f"{source}\N{RIGHTWARDS ARROW}{target}" for source, target in EDGES)

    def config(self) -> dict[str, Any]:
        """The constructor's keywords."""
        return {"ops": self.ops, **self._config}

    def __repr__(self) -> str:
        return f"NASBench201({', '.join(f'{key}={value!r}' for key, value in self.config().items())})"

    def supernet(self) -> Supernet:
        """A freshly initialised supernet, batch normalisation without scale and shift."""
        first_conv, features, conv_last, classifier = self._parts([self.ops] * len(EDGES), affine=False)
        candidates = [[block] for block in features]
        return Supernet(first_conv, candidates, conv_last, classifier, 0.0, route=self._route, build=self.build)

    def build(self, arch: Architecture) -> Network:
        """A freshly initialised stand-alone network, batch normalisation with scale and shift. Operations that its
        output does not read have parameters too, as in the benchmark; they are not run.

        Raises:
            InputError: the architecture is not of this space.
        """
        chosen = [(self.ops[gene],) for gene in self.architecture(arch).genes]
        first_conv, features, conv_last, classifier = self._parts(chosen, affine=True)
        return Network(first_conv, features, conv_last, classifier, 0.0)

    def baselines(self) -> dict[str, Architecture]:
        """Each operation on all edges, but ``none``, whose network does not see the image."""
        return {f"all_{name}": self.everywhere(gene) for gene, name in enumerate(self.ops) if name != "none"}

    def isomorphism_key(self, genes: Sequence[int]) -> str:
        """The benchmark's "unique string": equal for isomorphic cells."""
        return isomorphism_key(genes, self.ops)

    def _route(self, arch: Architecture) -> list[Step]:
        genes = self.architecture(arch).genes
        stage: list[Step] = [(0, genes)] * self._config["cells"]
        reduction: Step = (0, 0)
        return [*stage, reduction, *stage, reduction, *stage]

    def _parts(
        self, ops: Sequence[Sequence[str]], affine: bool
    ) -> tuple[nn.Module, list[nn.Module], nn.Module, nn.Module]:
        """Stem, blocks, what comes before pooling, and the classifier, for these operations of every edge."""
        config, width = self._config, self._config["channels"]
        first_conv = nn.Sequential(
            nn.Conv2d(config["in_channels"], width, 3, config["stem_stride"], 1, bias=False),
            nn.BatchNorm2d(width, affine=affine),
        )
        features: list[nn.Module] = []
        for stage in range(STAGES):
            if stage:
                features.append(ResidualReduction(width, 2 * width, affine))
                width *= 2
            features += [Cell(width, ops, affine) for _ in range(config["cells"])]
        conv_last = nn.Sequential(nn.BatchNorm2d(width, affine=affine), nn.ReLU(inplace=True))
        return first_conv, features, conv_last, nn.Sequential(nn.Linear(width, config["num_classes"]))

    def _make_cost_tables(self) -> dict[str, CostTable]:
        config = self._config
        widths = [config["channels"] << stage for stage in range(STAGES)]
        size = config["input_size"] // config["stem_stride"]
        areas = [(size >> stage) ** 2 for stage in range(STAGES)]
        # (weights of a convolution, its output area, channels that are normalised behind it).
        fixed = [(9 * config["in_channels"] * widths[0], areas[0], widths[0])]
        for narrow, wide, area in zip(widths, widths[1:], areas[1:], strict=False):
            fixed += [(9 * narrow * wide, area, wide), (9 * wide * wide, area, wide), (narrow * wide, area, 0)]
        classes = config["num_classes"]
        params = sum(weights + 2 * normalised for weights, _, normalised in fixed)
        params += 2 * widths[-1] + (widths[-1] + 1) * classes
        macs = sum(weights * area for weights, area, _ in fixed) + widths[-1] * classes
        of_op: dict[str, list[int]] = {"macs": [], "params": []}
        for name in self.ops:
            taps = CONVOLUTIONS.get(name, 0) ** 2
            of_op["macs"].append(
                config["cells"] * sum(taps * width**2 * area for width, area in zip(widths, areas, strict=True))
            )
            of_op["params"].append(
                config["cells"] * sum((taps * width**2 + 2 * width) for width in widths) * (taps > 0)
            )
        return {
            name: CostTable(total, (np.array(of_op[name], dtype=np.int64),) * len(EDGES))
            for name, total in (("macs", macs), ("params", params))
        }
