// Batch norm with given scales and shifts, and its ReLU, on the CPU.
#pragma once

#include "csrc/bn_moments.h"
#include "csrc/cpu/parallel.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// out = scale * x + shift, then ReLU if `relu`. x: elements of `dtype` laid out as `shape` says; out: the same layout,
// packed. scale, shift: [groups, channels], double for float64 and float for the others. shape must describe at least
// one element.
void bn_normalize(DType dtype, const void* x, const MomentsShape& shape, const void* scale, const void* shift,
                  bool relu, void* out, const ParallelFor& parallel_for);

}  // namespace spos::cpu
