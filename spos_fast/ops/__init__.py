"""The fused ops. Each is an ordinary differentiable function on tensors that also works under torch.compile."""

from spos_fast.ops.batchnorm import bn_moments, bn_moments_reference
from spos_fast.ops.dispatch import explain
from spos_fast.ops.units import UnitOutput, shuffle_unit, shuffle_unit_infer, xception_unit, xception_unit_infer

__all__ = [
    "UnitOutput",
    "bn_moments",
    "bn_moments_reference",
    "explain",
    "shuffle_unit",
    "shuffle_unit_infer",
    "xception_unit",
    "xception_unit_infer",
]
