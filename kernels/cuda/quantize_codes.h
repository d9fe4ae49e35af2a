// Unsigned codes of activations behind a scale and a shift, and the gradients of it, on CUDA. Plain pointers and a
// stream: no torch, no CUDA headers.
#pragma once

#include "kernels/cuda/quantizer.h"

namespace spos::cuda {

struct QuantizeCodes {
    DType dtype;
    int64_t pixels, channels;
    const void* x;
    int64_t x_pitch;            // elements from one pixel, a run of channels, to the next
    const void *scale, *shift;  // [channels], in the dtype of the step; null for ones and zeros
    StepChoice quantizer;       // one step for all, unsigned, without an offset
};

// codes: [pixels, channels], 0 for a NaN. step_used: the step, or NaN if a NaN was quantized. Runs on `stream` (a
// cudaStream_t) and does not wait for it. Returns null, or what is wrong.
const char* quantize_codes(const QuantizeCodes& call, uint8_t* codes, void* step_used, void* stream);

// Device memory that quantize_codes_backward needs beside its outputs.
int64_t quantize_codes_backward_workspace_bytes(const QuantizeCodes& call);

// From grad, the gradient of step_used * codes, whose pixels are `grad_pitch` apart. grad_x: [pixels, channels];
// grad_step: [choices]; grad_scale, grad_shift: [channels], zeros where there are none.
const char* quantize_codes_backward(const QuantizeCodes& call, const void* grad, int64_t grad_pitch, void* workspace,
                                    void* grad_x, void* grad_step, void* grad_scale, void* grad_shift, void* stream);

}  // namespace spos::cuda
