"""Search spaces. Each turns an architecture into a cost, a path through a supernet, or a network of its own."""

from collections.abc import Callable

from spos_fast.spaces.base import METRICS, Cost, CostTable, Space
from spos_fast.spaces.shufflenet_v2 import ShuffleNetV2

# Every space takes input_size, in_channels and num_classes, beside sizes of its own.
SPACES: dict[str, Callable[..., Space]] = {ShuffleNetV2.name: ShuffleNetV2}

__all__ = ["METRICS", "SPACES", "Cost", "CostTable", "ShuffleNetV2", "Space"]
