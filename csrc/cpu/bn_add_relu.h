// The end of a residual block on the CPU: batch norm, the shortcut added, ReLU.
#pragma once

#include <cstdint>

#include "csrc/cpu/parallel.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// `groups` runs of `rows` pixels, `channels` values each, packed channels last. Values a channel are [groups,
// channels], double for float64 and float for the others; residual_scale and residual_shift may be null: the shortcut
// as it is.
struct AddReluShape {
    int64_t groups, rows, channels;
};

// out = max(scale * x + shift + (residual_scale * residual + residual_shift), 0), elements of `dtype`; a NaN stays one.
void bn_add_relu(DType dtype, const AddReluShape& shape, const void* x, const void* scale, const void* shift,
                 const void* residual, const void* residual_scale, const void* residual_shift, void* out,
                 const ParallelFor& parallel_for);

// g = grad where out is not 0. grad_x = scale * g, grad_residual = residual_scale * g; sums over a group's pixels:
// grad_scale of x * g, grad_shift of g, grad_residual_scale of residual * g (null where residual_scale is).
void bn_add_relu_backward(DType dtype, const AddReluShape& shape, const void* grad, const void* out, const void* x,
                          const void* scale, const void* residual, const void* residual_scale, void* grad_x,
                          void* grad_residual, void* grad_scale, void* grad_shift, void* grad_residual_scale,
                          const ParallelFor& parallel_for);

}  // namespace spos::cpu
