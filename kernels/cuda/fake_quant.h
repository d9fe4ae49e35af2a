// Values rounded to the codes of a bit-width and back, and the gradients of it, on CUDA. Plain pointers and a stream:
// no torch, no CUDA headers.
#pragma once

#include "kernels/cuda/quantizer.h"

namespace spos::cuda {

struct FakeQuant {
    DType dtype;
    QuantShape shape;
    StepChoice quantizer;
    const void* x;
};

// out: laid out as x. Runs on `stream` (a cudaStream_t) and does not wait for it. Returns null, or what is wrong.
const char* fake_quant(const FakeQuant& call, void* out, void* stream);

// Device memory that fake_quant_backward needs beside its outputs.
int64_t fake_quant_backward_workspace_bytes(const FakeQuant& call);

// grad, grad_x: laid out as x. grad_step, grad_offset: [choices, channels] in the dtype of step, the latter zero
// without an offset.
const char* fake_quant_backward(const FakeQuant& call, const void* grad, void* workspace, void* grad_x, void* grad_step,
                                void* grad_offset, void* stream);

}  // namespace spos::cuda
