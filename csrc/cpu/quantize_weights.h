// Weights to levels and codes, on the CPU: DoReFa with its 1-bit branch, and LSQ's codes. The formulas stand in
// spos_fast/ops/quantize_weights.py.
#pragma once

#include <vector>

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/quantizer.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// Weights as they lie in memory, [rows, columns], packed. A row is an output channel, or all there is.
struct WeightShape {
    int64_t rows, columns;
};

// What is known of the weights that share a maximum.
struct Extent {
    double greatest;   // |w|; NaN if there is one
    double magnitude;  // sum of |w|
    double count;      // how many are the greatest; of dorefa_backward() only
    double products;   // sum of gradient times tanh; likewise
};

// Of every row, or of all rows together: one or `rows` entries.
std::vector<Extent> weight_extents(DType dtype, const void* weights, const WeightShape& shape, bool per_row,
                                   const ParallelFor& parallel_for);

// What codes are multiplied by: 1 / (2^bits - 1), or the mean magnitude of `columns` weights if bits is 1.
double dorefa_scale(DType dtype, const Extent& extent, int64_t columns, int64_t bits);

// out: levels, of `dtype`. extents: one for all or one a row.
void dorefa(DType dtype, const void* weights, const WeightShape& shape, const std::vector<Extent>& extents,
            int64_t bits, void* out, const ParallelFor& parallel_for);

// Two bits or more.
void dorefa_backward(DType dtype, const void* grad, const void* weights, const WeightShape& shape, bool per_row,
                     bool detach_max, void* grad_weights, const ParallelFor& parallel_for);

// Codes in 8 bits, and for each row whether all of it were numbers. Of `bits` 8, half of one less than the odd codes.
void dorefa_codes(DType dtype, const void* weights, const WeightShape& shape, const std::vector<Extent>& extents,
                  int64_t bits, int8_t* codes, bool* numbers, const ParallelFor& parallel_for);

// steps: one for all or one a row, double for float64 and float for the others.
void step_codes(DType dtype, const void* weights, const WeightShape& shape, const Quantizer& quantizer,
                const void* steps, bool per_row, int8_t* codes, bool* numbers, const ParallelFor& parallel_for);

}  // namespace spos::cpu
