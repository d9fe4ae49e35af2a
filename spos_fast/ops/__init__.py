"""The fused ops. Each is an ordinary differentiable function on tensors that also works under torch.compile."""

from spos_fast.ops.batchnorm import bn_moments, bn_moments_reference
from spos_fast.ops.block_gradients import dw_bnstats_backward_reference, pw_bnstats_backward_reference
from spos_fast.ops.blocks import BNStats, dw_bnstats, dw_bnstats_reference, pw_bnstats, pw_bnstats_reference
from spos_fast.ops.bn_act_cat import bn_act_cat, bn_act_cat_backward_reference, bn_act_cat_reference
from spos_fast.ops.bn_add_relu import bn_add_relu, bn_add_relu_backward_reference, bn_add_relu_reference
from spos_fast.ops.bn_normalize import bn_normalize, bn_normalize_reference
from spos_fast.ops.bn_states import bn_finalize, bn_finalize_reference, bn_merge, bn_merge_reference
from spos_fast.ops.dispatch import explain
from spos_fast.ops.fake_quant import fake_quant, fake_quant_backward_reference, fake_quant_reference
from spos_fast.ops.modules import bn_update_running_reference, unit_eval_reference, unit_train_reference
from spos_fast.ops.packed_conv import PackedConv2d
from spos_fast.ops.quant_codes import (
    dequantize_codes_reference,
    quantize_codes_backward_reference,
    quantize_codes_reference,
    weight_codes_reference,
)
from spos_fast.ops.quant_conv2d import quant_conv2d, quant_conv2d_reference
from spos_fast.ops.quantize_weights import (
    dorefa_weights_backward_reference,
    dorefa_weights_reference,
    quantize_weights,
)
from spos_fast.ops.quantizers import code_range
from spos_fast.ops.sliced import sliced_batch_norm, sliced_conv2d
from spos_fast.ops.units import UnitOutput, shuffle_unit, shuffle_unit_infer, xception_unit, xception_unit_infer

__all__ = [
    "BNStats",
    "PackedConv2d",
    "UnitOutput",
    "bn_act_cat",
    "bn_act_cat_backward_reference",
    "bn_act_cat_reference",
    "bn_add_relu",
    "bn_add_relu_backward_reference",
    "bn_add_relu_reference",
    "bn_finalize",
    "bn_finalize_reference",
    "bn_merge",
    "bn_merge_reference",
    "bn_moments",
    "bn_moments_reference",
    "bn_normalize",
    "bn_normalize_reference",
    "bn_update_running_reference",
    "code_range",
    "dequantize_codes_reference",
    "dorefa_weights_backward_reference",
    "dorefa_weights_reference",
    "dw_bnstats",
    "dw_bnstats_backward_reference",
    "dw_bnstats_reference",
    "explain",
    "fake_quant",
    "fake_quant_backward_reference",
    "fake_quant_reference",
    "pw_bnstats",
    "pw_bnstats_backward_reference",
    "pw_bnstats_reference",
    "quant_conv2d",
    "quant_conv2d_reference",
    "quantize_codes_backward_reference",
    "quantize_codes_reference",
    "quantize_weights",
    "shuffle_unit",
    "shuffle_unit_infer",
    "sliced_batch_norm",
    "sliced_conv2d",
    "unit_eval_reference",
    "unit_train_reference",
    "weight_codes_reference",
    "xception_unit",
    "xception_unit_infer",
]
