// Mean and centred second moment of each channel, on CUDA. Plain pointers and a stream: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "csrc/bn_moments.h"
#include "csrc/dtype.h"

namespace spos::cuda {

// Device memory that bn_moments needs beside its outputs.
int64_t bn_moments_workspace_bytes(DType dtype, const MomentsShape& shape);

// x: elements of `dtype` on the device, laid out as `shape` says. mean, m2: [groups, channels] on the device, double
// for float64 and float for the others; m2 is the sum of (x - mean)^2. Runs on `stream` (a cudaStream_t) and does not
// wait for it. Returns null, or what CUDA said is wrong.
const char* bn_moments(DType dtype, const void* x, const MomentsShape& shape, void* workspace, void* mean, void* m2,
                       void* stream);

}  // namespace spos::cuda
