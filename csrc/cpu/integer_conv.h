// Convolution of unsigned codes of activations with signed codes of weights, on the CPU: sums of integers, scaled once.
#pragma once

#include <cstdint>

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantizer.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// Images are channels last. `in_channels` is a multiple of 4 and `out_channels` of 16.
struct IntegerConvShape {
    int64_t samples, in_channels, height, width;
    int64_t out_channels, out_height, out_width;
    int64_t kernel_height, kernel_width, vertical_stride, horizontal_stride, vertical_padding, horizontal_padding;
};

// What is quantized as it is loaded, as quantize_codes() does: x of `dtype`; scale, shift (null: none) and step are
// floats. codes (null: nobody wants them), of as many bytes as x has values, keeps the result.
struct ToQuantize {
    DType dtype;
    const void* x;
    const float *scale, *shift;
    Quantizer quantizer;
    float step;
    uint8_t* codes;
};

// out = scale * sums + shift, of the dtype of x, maybe clipped at 0; scale, shift: [out_channels]. mean and m2 of it,
// [out_channels]; null: nobody wants them.
struct ScaledSums {
    const float *scale, *shift;
    bool relu;
    void* out;
    float *mean, *m2;
};

// Codes [out_channels, in_channels, height, width], packed, into the order in which integer_conv() reads them:
// [out_channels / 16, height, width, in_channels / 4, 16, 4].
void pack_codes(const int8_t* codes, int64_t out_channels, int64_t in_channels, int64_t taps, int8_t* to,
                const ParallelFor& parallel_for);

// float32, float16 and bfloat16. Returns whether all of x were numbers; if not, out, mean and m2 mean nothing.
bool integer_conv(const IntegerConvShape& shape, const ToQuantize& in, const int8_t* weights, const ScaledSums& result,
                  const ParallelFor& parallel_for);

}  // namespace spos::cpu
