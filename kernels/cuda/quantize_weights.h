// DoReFa's weights, their gradient, and integer codes of weights, on CUDA. Plain pointers and a stream: no torch, no
// CUDA headers. spos_fast/ops/quantize_weights.py has the formulas.
#pragma once

#include "kernels/cuda/quantizer.h"

namespace spos::cuda {

struct Weights {
    DType dtype;
    // How they lie in memory: [outer, output channels, inner].
    QuantShape shape;
    bool per_channel;  // a maximum, mean or step for each output channel; else one for all
    const void* weight;
};

// Device memory that each of the three needs beside its outputs.
int64_t weights_workspace_bytes(const Weights& weights);

// out: laid out as the weights. All run on `stream` (a cudaStream_t) and do not wait for it; they return null, or what
// is wrong.
const char* dorefa_weights(const Weights& weights, const BitChoice& bits, void* workspace, void* out, void* stream);

// grad, grad_weight: laid out as the weights.
const char* dorefa_weights_backward(const Weights& weights, const BitChoice& bits, bool detach_max, const void* grad,
                                    void* workspace, void* grad_weight, void* stream);

// codes: laid out as the weights, 0 for a NaN; scale: [output channels], in the dtype of sums, NaN for a channel with a
// NaN among its codes. lsq.step null: DoReFa, of whose 8 bits the codes are half of one less than the odd ones.
const char* weight_codes(const Weights& weights, const StepChoice& lsq, void* workspace, int8_t* codes, void* scale,
                         void* stream);

}  // namespace spos::cuda
