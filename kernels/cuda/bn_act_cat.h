// The end of a unit on CUDA: the last batch norm and ReLU, written behind the channels of another image; and the sums
// that its backward pass starts from. Plain pointers and a stream: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace spos::cuda {

// Images are channels last, `pitch` elements from one pixel to the next. Scales, shifts and means are double for
// float64 and float for the other dtypes.
struct BnActCat {
    DType dtype;
    int64_t pixels, channels;
    const void* z;
    int64_t z_pitch;
    const void *scale, *shift;  // [channels]
    bool relu;                  // of both images, where they are scaled

    const void* other = nullptr;  // null: nothing stands in front
    int64_t other_pitch = 0, other_channels = 0;
    const void *other_scale = nullptr, *other_shift = nullptr;  // [other_channels]; null: the even channels pass

    int64_t front() const {
        if (other == nullptr) return 0;
        return other_scale == nullptr ? (other_channels + 1) / 2 : other_channels;
    }
};

// out: [pixels, front() + channels], packed. Runs on `stream` (a cudaStream_t) and does not wait for it. Returns null,
// or what is wrong.
const char* bn_act_cat(const BnActCat& layer, void* out, void* stream);

struct BnActSums {
    DType dtype;
    int64_t pixels, channels;
    const void* grad;  // its first channel that belongs to z
    int64_t grad_pitch;
    const void* z;
    int64_t z_pitch;
    const void *scale, *shift, *mean;  // [channels]
    bool relu;
};

// Device memory that bn_act_sums needs beside its outputs.
int64_t bn_act_sums_workspace_bytes(const BnActSums& layer);

// sum, product: [channels], sums over the pixels of g = grad * [not relu or scale * z + shift > 0], and of g * (z -
// mean).
const char* bn_act_sums(const BnActSums& layer, void* workspace, void* sum, void* product, void* stream);

}  // namespace spos::cuda
