// Merging batches' statistics into running ones, and turning those into scales and shifts, on CUDA. Plain pointers and
// a stream: no torch, no CUDA headers.
#pragma once

#include <vector>

#include "csrc/bn_states.h"

namespace spos::cuda {

// Pointers on the device. `wide`: whether the batch's statistics, or gamma, beta, scale and shift, are double; else
// they are float. Runs on `stream` (a cudaStream_t) and does not wait for it. Returns null, or what is wrong.
const char* bn_merge(const std::vector<BnMerge>& layers, bool wide, void* stream);
const char* bn_finalize(const std::vector<BnFinalize>& layers, bool wide, double epsilon, void* stream);

}  // namespace spos::cuda
