// The inner loops of the fused units, on rows of channels-last images. T is how a value is stored, A what it is
// computed in: double for double, float for all others.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"

namespace spos::cpu {

// A matrix of pixels and channels is given by its start and its pitch, the values from one pixel to the next.
template <typename T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

// `ahead`, here and below: memory that will be copied soon, laid out as what is copied now. Each line of it is asked
// for together with the line in the same place; asking for them in one go gained nothing (docs/performance.md). Taken
// into account by streams of even channels, and for one whole pack of neighbouring channels; null: none.

// to[p][c] = x[p][2 c]: the channels that pass. With `stream`, here and below, the output goes past the caches.
template <typename T>
void copy_even_channels(const T* x, int64_t pitch, int64_t pixels, int64_t channels, T* to, int64_t to_pitch,
                        bool stream, const T* ahead = nullptr);

// to[p][c] = relu(scale[c] * from[p][c] + shift[c]), ReLU only if `relu`. In place is allowed. What lies between
// `channels` and the next whole pack of `scale` and `shift` must be readable.
template <typename T, typename U, typename A>
void scale_and_shift(const T* from, int64_t pitch, int64_t pixels, int64_t channels, const A* scale, const A* shift,
                     bool relu, U* to, int64_t to_pitch, bool stream = false, const T* ahead = nullptr);

// to[p][c] = from[p][step * c].
template <typename T, typename A>
void copy_channels(const T* from, int64_t pitch, int64_t step, int64_t pixels, int64_t channels, A* to,
                   int64_t to_pitch, const T* ahead = nullptr);

// Where one pack of channels of neighbouring pixels goes, and their moments.
template <typename A>
struct PixelPacks {
    A* to;
    int64_t pitch;
    A* deviations = nullptr;  // of the pack (deviations.h), which the values are added to; null: not wanted
    bool fresh = false;       // these are the first values

    PixelPacks behind(int64_t pixels) const { return {to + pixels * pitch, pitch, deviations, fresh && pixels == 0}; }
};

// One row of a depthwise convolution on one pack of channels. rows[i] is the input row under kernel row first + i, from
// the pixel under the left end of the kernel on, kPack values a pixel; `slack` pixels behind its end are readable.
// weights: [kernel * kernel][kPack].
constexpr int64_t kSlack = 32;
template <typename A>
void depthwise_row(const A* const* rows, int64_t first, int64_t count, const A* weights, int64_t kernel, int64_t width,
                   const PixelPacks<A>& out, int64_t stride = 1);

}  // namespace spos::cpu
