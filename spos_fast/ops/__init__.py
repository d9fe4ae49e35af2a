"""The fused ops. Each is an ordinary differentiable function on tensors that also works under torch.compile."""

from spos_fast.ops.batchnorm import bn_moments, bn_moments_reference
from spos_fast.ops.dispatch import explain

__all__ = ["bn_moments", "bn_moments_reference", "explain"]
