// What the quantization kernels are told about a quantizer and about how values lie in memory. Plain pointers: no
// torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace spos::cuda {

enum class QuantMode { pact, pact_residual, lsq };

// One of several bit-widths, and its parameters: all are read on the device, so that choosing others needs no word to
// the host. spos_fast/ops/quantizers.py says what they mean.
struct BitChoice {
    const int32_t* bits;  // [choices], 1 to 8
    const void* index;    // which one: int32, or int64 if `wide_index`
    bool wide_index;
    int choices;
};

struct StepChoice {
    BitChoice bits;
    // [choices, channels], double for float64 values and float for the others. No offset: null.
    const void *step, *offset;
    int channels;
    QuantMode mode;
    bool signed_codes;
};

// Values [outer, channels, inner] without gaps. One channel: all share a step.
struct QuantShape {
    int64_t outer, channels, inner;

    int64_t per_channel() const { return outer * inner; }
    int64_t count() const { return outer * channels * inner; }
};

}  // namespace spos::cuda
