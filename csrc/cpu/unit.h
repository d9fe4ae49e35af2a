// The fused ShuffleNetV2 units in training, on the CPU. Every BN runs on the statistics of the batch, so a
// convolution's output must be complete before the next layer can start: one pass over memory for each layer and one at
// the end forwards, likewise backwards. Normalisation and ReLU happen where the next pass loads.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/cpu/parallel.h"
#include "csrc/dtype.h"

namespace spos::cpu {

// A convolution and the BN behind it, with ReLU if the convolution is 1x1.
struct Layer {
    bool depthwise;
    int64_t in, out;      // channels, those that are used
    int64_t laid_out;     // channels that the layer has where results lie; from `out` on they are absent
    int64_t kernel;       // odd, padded by kernel / 2; 1x1: 1
    int64_t stride;       // 1x1: 1
    const void* weight;   // [rows, row]: 1x1 [outputs, inputs], depthwise [channels, kernel * kernel]
    int64_t rows, row;    // as stored; the first `out` rows, and of 1x1 ones the first `in` columns, are read
};

// Images are channels last and packed. "Statistics type" is double for float64, float for the others.
struct Unit {
    DType dtype;
    int64_t samples, height, width, channels;
    const void* x;                  // [samples, height, width, channels]
    std::vector<Layer> main;        // alternates depthwise and 1x1 layers, ends with a 1x1 one
    std::vector<Layer> projection;  // likewise, on all channels; empty: even channels pass, `main` takes the odd ones
    const void* gamma;              // [normalised] of the statistics type; null: ones
    const void* beta;               // likewise; null: zeros
    double epsilon;

    int64_t stride() const;
    int64_t out_height() const { return (height - 1) / stride() + 1; }
    int64_t out_width() const { return (width - 1) / stride() + 1; }
    int64_t passing() const;       // channels of the output in front of those that `main` makes
    int64_t out_channels() const;
    int64_t normalised() const;    // BN channels of all layers, main chain first
    int64_t saved_size() const;    // values in the outputs of all convolutions
    // Layers in the order in which their results lie.
    std::vector<const Layer*> layers() const;
    // Pixels of a chain's layer's output, all samples.
    int64_t pixels_behind(const std::vector<Layer>& chain, size_t layer) const;
};

enum class UnitKind { shuffle, xception };

// Sizes of the units of the search space: shuffle is 1x1 to `mid`, depthwise, 1x1 to `made`; xception is three times
// depthwise and 1x1, to `mid`, `mid` and `made`. A projection is a depthwise layer and a 1x1 one that keep the channels.
// The first depthwise layer of each chain has the stride.
struct UnitShape {
    UnitKind kind;
    DType dtype;
    int64_t samples, height, width, channels;
    bool projects;
    int64_t mid;     // channels between the layers as results are laid out
    int64_t used;    // of these
    int64_t stored;  // of these channels the weights in memory have
    int64_t made, stride;
};

struct Weight {
    const void* data;
    int64_t kernel;  // 1 of a 1x1 layer
};

// weights: of the main chain in order, then the projection's. Pointers to x, gamma and beta are left to the caller.
Unit unit_of(const UnitShape& shape, const std::vector<Weight>& weights);

struct UnitOutputs {
    void* out;    // [samples, out_height, out_width, out_channels]
    void* saved;  // [saved_size]: each convolution's output as [pixels, laid_out], one behind the other; null: not kept
    void* mean;   // [normalised], of the statistics type
    void* var;    // likewise; divided by the number of pixels
};

void unit_forward(const Unit& unit, const UnitOutputs& outputs, const ParallelFor& parallel_for);

struct UnitGradients {
    const void* grad;  // as `out`
    const void* saved;
    const void* mean;
    const void* var;
    void* x;
    std::vector<void*> weights;  // of layers(), shapes as stored; zero outside of what is used
    void* gamma;                 // [normalised], of the statistics type
    void* beta;
};

void unit_backward(const Unit& unit, const UnitGradients& gradients, const ParallelFor& parallel_for);

}  // namespace spos::cpu
