"""Search spaces. Each turns an architecture into a cost, a path through a supernet, or a network of its own."""

from collections.abc import Callable
from functools import partial

from spos_fast.spaces.base import METRICS, Cost, CostTable, Space
from spos_fast.spaces.nasbench201 import NASBench201
from spos_fast.spaces.nasbench_macro import NASBenchMacro
from spos_fast.spaces.quant_resnet import REPEATS, QuantResNet
from spos_fast.spaces.shufflenet_v2 import ShuffleNetV2

# Every space takes input_size, in_channels and num_classes, beside sizes of its own.
SPACES: dict[str, Callable[..., Space]] = {
    **{space.name: space for space in (ShuffleNetV2, NASBench201, NASBenchMacro)},
    **{f"quant_resnet{depth}": partial(QuantResNet, depth) for depth in REPEATS},
}

__all__ = [
    "METRICS",
    "SPACES",
    "Cost",
    "CostTable",
    "NASBench201",
    "NASBenchMacro",
    "QuantResNet",
    "ShuffleNetV2",
    "Space",
]
