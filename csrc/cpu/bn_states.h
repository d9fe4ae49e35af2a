// Merging batches' statistics into running ones, and turning those into scales and shifts, on the CPU.
#pragma once

#include <vector>

#include "csrc/bn_states.h"
#include "csrc/cpu/parallel.h"

namespace spos::cpu {

// `wide`: whether the batch's statistics, or gamma, beta, scale and shift, are double; else they are float.
void bn_merge(const std::vector<BnMerge>& layers, bool wide, const ParallelFor& parallel_for);
void bn_finalize(const std::vector<BnFinalize>& layers, bool wide, double epsilon, const ParallelFor& parallel_for);

}  // namespace spos::cpu
