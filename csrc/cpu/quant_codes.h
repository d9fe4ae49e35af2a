// Codes of activations in 8 bits, behind the scale and shift of a batch norm, on the CPU.
#pragma once

#include <algorithm>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/moments.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantizer.h"
#include "csrc/cpu/simd.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// x, grad, grad_x: [pixels, channels] of `dtype`, packed; codes: as many bytes. scale, shift (null: none), [channels],
// and step, of one value: double for float64 and float for the others.

// codes of scale * x + shift, unsigned. Returns whether all were numbers.
bool quantize_codes(DType dtype, const void* x, int64_t pixels, int64_t channels, const void* scale, const void* shift,
                    const Quantizer& quantizer, const void* step, uint8_t* codes, const ParallelFor& parallel_for);

// Scale and shift of channels, up to whole packs; one and zero where there are none.
template <typename A>
struct Prologue {
    int64_t channels;
    Lines<A> scale, shift;

    Prologue(int64_t channels, const void* scale_values, const void* shift_values)
        : channels(channels),
          scale(divide_up(channels, kPack) * kPack, A(1)),
          shift(divide_up(channels, kPack) * kPack, A(0)) {
        if (!scale_values) return;
        std::copy_n(static_cast<const A*>(scale_values), channels, scale.begin());
        std::copy_n(static_cast<const A*>(shift_values), channels, shift.begin());
    }
};

// The same of some pixels, in the calling thread.
bool quantize_pixels(const float* x, int64_t pixels, const Prologue<float>& prologue, const Quantizer& quantizer,
                     float step, uint8_t* codes);
bool quantize_pixels(const double* x, int64_t pixels, const Prologue<double>& prologue, const Quantizer& quantizer,
                     double step, uint8_t* codes);
bool quantize_pixels(const Half* x, int64_t pixels, const Prologue<float>& prologue, const Quantizer& quantizer,
                     float step, uint8_t* codes);
bool quantize_pixels(const BFloat16* x, int64_t pixels, const Prologue<float>& prologue, const Quantizer& quantizer,
                     float step, uint8_t* codes);

// From grad, that of step * codes. step_sum: the sum before its factor. scale_sums, shift_sums, [channels].
void quantize_codes_backward(DType dtype, const void* grad, const void* x, int64_t pixels, int64_t channels,
                             const void* scale, const void* shift, const Quantizer& quantizer, const void* step,
                             void* grad_x, double* step_sum, double* scale_sums, double* shift_sums,
                             const ParallelFor& parallel_for);

}  // namespace spos::cpu
