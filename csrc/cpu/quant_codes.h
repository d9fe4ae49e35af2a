// Codes of activations in 8 bits, behind the scale and shift of a batch norm, on the CPU.
#pragma once

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantizer.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// x, grad, grad_x: [pixels, channels] of `dtype`, packed; codes: as many bytes. scale, shift (null: none), [channels],
// and step, of one value: double for float64 and float for the others.

// codes of scale * x + shift, unsigned. Returns whether all were numbers.
bool quantize_codes(DType dtype, const void* x, int64_t pixels, int64_t channels, const void* scale, const void* shift,
                    const Quantizer& quantizer, const void* step, uint8_t* codes, const ParallelFor& parallel_for);

// From grad, that of step * codes. step_sum: the sum before its factor. scale_sums, shift_sums, [channels].
void quantize_codes_backward(DType dtype, const void* grad, const void* x, int64_t pixels, int64_t channels,
                             const void* scale, const void* shift, const Quantizer& quantizer, const void* step,
                             void* grad_x, double* step_sum, double* scale_sums, double* shift_sums,
                             const ParallelFor& parallel_for);

// values: step * codes, `size` of them, of `dtype`.
void dequantize_codes(DType dtype, const uint8_t* codes, int64_t size, const void* step, void* values,
                      const ParallelFor& parallel_for);

}  // namespace spos::cpu
