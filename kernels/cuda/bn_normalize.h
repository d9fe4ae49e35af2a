// Batch norm with given scales and shifts, and its ReLU, on CUDA. Plain pointers and a stream: no torch, no CUDA
// headers.
#pragma once

#include "csrc/bn_moments.h"
#include "csrc/dtype.h"

namespace spos::cuda {

// out = scale * x + shift, then ReLU if `relu`. x: elements of `dtype` on the device, laid out as `shape` says; out:
// the same layout, packed. scale, shift: [groups, channels], double for float64 and float for the others. Runs on
// `stream` (a cudaStream_t) and does not wait for it. Returns null, or what is wrong.
const char* bn_normalize(DType dtype, const void* x, const MomentsShape& shape, const void* scale, const void* shift,
                         bool relu, void* out, void* stream);

}  // namespace spos::cuda
