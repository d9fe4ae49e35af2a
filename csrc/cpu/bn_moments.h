// Mean and centred second moment of each channel, on the CPU.
#pragma once

#include "csrc/bn_moments.h"
#include "csrc/cpu/parallel.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// x: elements of `dtype` laid out as `shape` says. mean, m2: [groups, channels], double for float64 and float for the
// others; m2 is the sum of (x - mean)^2, not divided by anything. shape must describe at least one element.
void bn_moments(DType dtype, const void* x, const MomentsShape& shape, void* mean, void* m2,
                const ParallelFor& parallel_for);

}  // namespace spos::cpu
