// Fake quantization with a step for all values or for each channel, on the CPU.
#pragma once

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantizer.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// A dense tensor as it lies in memory: channel c is elements [o][c][i] of [outer, channels, inner]. One step for all is
// one channel.
struct ChannelShape {
    int64_t outer, channels, inner;
};

// out = step * code + offset. x, out: elements of `dtype` in the same layout; steps (positive) and offsets, [channels]:
// double for float64 and float for the others.
void fake_quant(DType dtype, const void* x, const ChannelShape& shape, const Quantizer& quantizer, const void* steps,
                const void* offsets, void* out, const ParallelFor& parallel_for);

// grad_x, like x. step_sums, offset_sums, [channels]: the sums before their factors.
void fake_quant_backward(DType dtype, const void* grad, const void* x, const ChannelShape& shape,
                         const Quantizer& quantizer, const void* steps, const void* offsets, void* grad_x,
                         double* step_sums, double* offset_sums, const ParallelFor& parallel_for);

}  // namespace spos::cpu
