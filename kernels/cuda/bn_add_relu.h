// The end of a residual block on CUDA: batch norm, the shortcut added, ReLU. Plain pointers and a stream: no torch, no
// CUDA headers.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace spos::cuda {

// Images: `groups` runs of `pixels`, `channels` values each, packed channels last. Values a channel are [groups,
// channels], double for float64 and float for the others; residual_scale may be null: the shortcut as it is.
struct BnAddRelu {
    DType dtype;
    int64_t groups, pixels, channels;
    const void *x, *residual;
    const void *scale, *residual_scale;
};

// out = max(scale * x + shift + (residual_scale * residual + residual_shift), 0); a NaN stays one. residual_shift: null
// where residual_scale is. Runs on `stream` (a cudaStream_t) and does not wait for it. Returns null, or what is wrong.
const char* bn_add_relu(const BnAddRelu& call, const void* shift, const void* residual_shift, void* out, void* stream);

// Device memory that bn_add_relu_backward needs beside its outputs.
int64_t bn_add_relu_backward_workspace_bytes(const BnAddRelu& call);

// Where gradients go: images as x, values as scale; residual_scale is not written to where the call has none.
struct BnAddReluGradients {
    void *x, *residual;
    void *scale, *shift, *residual_scale;
};

// g = grad where out is not 0. Of x that is scale * g, of residual residual_scale * g; sums over a group's pixels: of
// scale x * g, of shift g, of residual_scale residual * g. A plain shortcut's residual is not read.
const char* bn_add_relu_backward(const BnAddRelu& call, const void* grad, const void* out, void* workspace,
                                 const BnAddReluGradients& to, void* stream);

}  // namespace spos::cuda
