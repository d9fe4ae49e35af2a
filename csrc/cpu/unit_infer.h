// A unit in inference, on the CPU: chains of 1x1 and depthwise convolutions with batch normalisation folded into a
// scale and a shift, in one pass. A few rows of an image (or a few small images) go through all layers while they lie
// in the caches; only the unit's input and output touch main memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "csrc/cpu/parallel.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// scale * convolution + shift, and ReLU if it is a 1x1 convolution.
struct InferLayer {
    const void* weights;  // 1x1: [.., pitch], of which `channels` rows and as many columns as the layer before has
    int64_t pitch;        // channels are read. Depthwise: [.., kernel, kernel], of which `channels` are read
    int64_t kernel;       // odd, of a depthwise convolution; 0: a 1x1 convolution
    int64_t channels;     // that it makes
    int64_t first;        // of them in scale and shift
};

// Images are channels last and packed. "Statistics type" is double for float64, float for the others.
struct UnitInference {
    DType dtype;
    int64_t samples, height, width, channels;  // of x
    int64_t stride;                            // of each branch's first depthwise convolution
    bool split;                                // x's even channels pass, its odd ones go through the only branch
    // Side by side in `out`, behind what passes. Layers take turns, and the last one is a 1x1 convolution.
    std::vector<std::vector<InferLayer>> branches;
    const void* x;
    const void* scale;  // of the statistics type; null: ones
    const void* shift;  // likewise
    void* out;

    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
    int64_t out_channels() const {
        int64_t sum = split ? channels / 2 : 0;
        for (const auto& layers : branches) sum += layers.back().channels;
        return sum;
    }
};

void unit_infer(const UnitInference& unit, const ParallelFor& parallel_for);

// A layer's normalisation as what it multiplies by and adds. gamma null: ones, beta null: zeros.
template <typename A>
void fold_norm(const A* mean, const A* var, const A* gamma, const A* beta, A epsilon, int64_t channels, A* scale,
               A* shift) {
    for (int64_t c = 0; c < channels; ++c) {
        scale[c] = (gamma ? gamma[c] : A(1)) / std::sqrt(var[c] + epsilon);
        shift[c] = (beta ? beta[c] : A(0)) - mean[c] * scale[c];
    }
}

}  // namespace spos::cpu
