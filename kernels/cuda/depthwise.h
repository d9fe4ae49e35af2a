// Depthwise convolution with batch norm and ReLU of its input on load and the statistics of its output beside it, on
// CUDA, forward and backward. Plain pointers and a stream: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace spos::cuda {

// Images are channels last; `pitch` is the distance in elements from one pixel to the next, larger than the channels
// where an image is a slice of the channels of a wider one. Statistics and their like are double for float64 and float
// for the other dtypes.
struct Depthwise {
    DType dtype;
    int64_t samples, height, width;  // of the input, of one group
    int64_t channels;                // that are convolved: the first ones of x and of weight
    int64_t kernel, stride;          // kernel x kernel, odd; padded with kernel / 2 zeros on each side
    const int32_t* present;          // on the device: how many of `channels` are there at all; null: all of them

    const void* x;
    int64_t x_pitch;
    const void* weight;         // [stored channels, kernel, kernel], packed
    const void *scale, *shift;  // [groups, channels]; the convolution reads act(scale * x + shift); null: one, zero
    bool relu;                  // act is ReLU
    int64_t groups = 1;         // runs of `samples` images, one behind the other; forwards only

    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
};

// Device memory that depthwise needs beside its outputs.
int64_t depthwise_workspace_bytes(const Depthwise& layer);

// z: [groups * pixels, channels], packed; columns of absent channels are left as they are. mean, m2: [groups,
// channels], of each group's z as stored, m2 the sum of (z - mean)^2; zero for absent channels. Runs on `stream` (a
// cudaStream_t) and does not wait for it. Returns null, or what is wrong.
const char* depthwise(const Depthwise& layer, void* z, void* workspace, void* mean, void* m2, void* stream);

// What the backward pass reads beside the layer. The gradient of z is
//   s * (grad * [not relu or s * z + b > 0] - o - l * (z - m)),   norm: rows s, b, m, o, l of `channels` values.
struct DepthwiseGradient {
    const void* grad;
    int64_t grad_pitch;
    const void* z;
    int64_t z_pitch;
    const void* norm;
    bool relu;           // of the output; Depthwise::relu is that of the input
    const void* centre;  // [channels]; null: no sums are wanted
    int64_t stored;      // channels of weight, all of which get a gradient

    // x: [pixels, channels], packed: the gradient of scale * x + shift, zero in the columns of absent channels.
    // weight: [stored, kernel, kernel], zero for all but the present channels. sum, product: [channels], sums over
    // the pixels of what is in x, and of that times (x - centre); unused without centre.
    void *grad_x, *grad_weight, *sum, *product;
};

int64_t depthwise_backward_workspace_bytes(const Depthwise& layer);

const char* depthwise_backward(const Depthwise& layer, const DepthwiseGradient& gradient, void* workspace,
                               void* stream);

}  // namespace spos::cuda
