// The ShuffleNetV2 unit of stride 1 in training, on the CPU: 1x1 convolution, BN, ReLU; depthwise convolution, BN; 1x1
// convolution, BN, ReLU on the odd channels, behind the even ones.
//
// Every BN runs on the statistics of the batch, so each convolution's output must be complete before the next layer can
// start: four passes over memory forwards, four backwards. Normalisation and ReLU happen where the next pass loads.
#pragma once

#include <cstdint>

#include "csrc/cpu/parallel.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// Images are channels last and packed. "Statistics type" is double for float64, float for the others.
struct ShuffleUnit {
    DType dtype;
    int64_t samples, height, width;
    int64_t half;        // channels that pass, and channels that go through the branch
    int64_t mid;         // channels between the 1x1 convolutions
    int64_t made;        // channels that the branch makes
    int64_t kernel;      // odd
    int64_t mid_stored;  // columns of pw2 in memory; rows of pw1 and dw are then as many
    const void* x;       // [pixels, 2 * half]
    const void* pw1;     // [mid_stored, half], of which `mid` rows are read
    const void* dw;      // [mid_stored, kernel, kernel], likewise
    const void* pw2;     // [made, mid_stored], of which `mid` columns are read
    const void* gamma;   // [mid + mid + made] of the statistics type; null: ones
    const void* beta;    // likewise; null: zeros
    double epsilon;

    int64_t pixels() const { return samples * height * width; }
    int64_t normalised() const { return 2 * mid + made; }
};

struct ShuffleUnitOutputs {
    void* out;  // [pixels, half + made]
    void* z1;   // outputs of the three convolutions: `mid`, `mid` and `made` channels, each pixel `pitch` from
    void* z2;   // the last. z3 may lie where z2 lies, and z2 where z1 lies, if nobody needs
    void* z3;   // them later; z1 and z2 only if depthwise_in_place()
    int64_t pitch[3];
    void* mean;  // [mid + mid + made], of the statistics type
    void* var;   // likewise; divided by the number of pixels
};

bool depthwise_in_place(const ShuffleUnit& unit);

void shuffle_unit_forward(const ShuffleUnit& unit, const ShuffleUnitOutputs& outputs, const ParallelFor& parallel_for);

struct ShuffleUnitGradients {
    const void* grad;  // [pixels, half + made]
    const void* z1;    // what the forward pass left
    const void* z2;
    const void* z3;  // [pixels, made]
    const void* mean;
    const void* var;
    void* x;    // [pixels, 2 * half]
    void* pw1;  // shapes of the weights; zero outside of the slice
    void* dw;
    void* pw2;
    void* gamma;  // [mid + mid + made], of the statistics type
    void* beta;
};

void shuffle_unit_backward(const ShuffleUnit& unit, const ShuffleUnitGradients& gradients,
                           const ParallelFor& parallel_for);

}  // namespace spos::cpu
