// The inner loops of the fused units' inference, on rows of channels-last images. T is how a value is stored, A what it
// is computed in: double for double, float for all others. A "pack" is kPack neighbouring channels.
#pragma once

#include <cstdint>

#include "csrc/cpu/matrix.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {

// Pixels by channels: the values of pixel i begin at start[i * pitch].
template <typename A>
struct PixelRows {
    A* start;
    int64_t pitch;
};

// Rows of one pack of channels as a depthwise kernel reads them: kPack values a pixel, and behind each row k / 2 pixels
// of zeros, which are also what lies left of the next row. Image row y lies in slot y % slots, so that the rows of a
// band pass through a few slots.
struct WindowShape {
    int64_t slots, length;  // values from one row to the next
};

// Where a product goes: into the windows of its packs, `plane` values apart, pixel i to start[places[i]].
template <typename A>
struct ToWindow {
    A* start;
    int64_t plane;
    const int64_t* places;
};

// Or into the image that the unit makes: pixel i to start[i * pitch], `channels` values. With `stream` past the caches.
template <typename T>
struct ToImage {
    T* start;
    int64_t pitch, channels;
    bool stream;
};

// Memory that will be read soon: products ask for a share of it every few steps of their sums, so that it comes into
// the second-level cache while they compute.
struct Ahead {
    const char *next, *end;
    int64_t share;  // bytes
};
constexpr int64_t kStepsAShare = 8;

// relu(shift + a B) of one panel of B, [depth][packs * kPack], for `pixels` rows of a. The order of the sum is that of
// the depth, whatever the machine.
template <typename A>
struct PointwisePanel {
    PixelRows<const A> a;
    int64_t pixels, depth;
    const A* b;
    int64_t packs;
    const A* shift;  // [packs * kPack]
    Ahead* ahead;
};

template <typename A>
void pointwise_relu(const PointwisePanel<A>& panel, const ToWindow<A>& to);
template <typename A, typename T>
void pointwise_relu(const PointwisePanel<A>& panel, const ToImage<T>& to);

// After the last of what goes past the caches, before another thread may read it.
void finish_streams();

// Weights of a 1x1 convolution in panels (matrix.h), zeros behind the last column.
template <typename A>
struct Panels {
    A* values = nullptr;
    int64_t depth = 0, columns = 0;

    int64_t size() const { return (columns + kPack - 1) / kPack * kPack * depth; }
    A* panel(int64_t index) const { return values + index * panel_packs() * kPack * depth; }
};

// Panel `index` of B, of which B[k][j] = scale.column[j] * (weights[j * pitch + k] * scale.depth[k]); null: ones.
template <typename A>
struct PackScale {
    const A *column = nullptr, *depth = nullptr;
};
template <typename A, typename T>
void pack_pointwise(const T* weights, int64_t pitch, const PackScale<A>& scale, int64_t index, const Panels<A>& to);

// shift + depthwise convolution of one pack of channels, output rows `begin` to `end`.
template <typename A>
struct DepthwiseRows {
    const A* window;
    WindowShape shape;
    int64_t height;         // of the input
    const A *taps, *shift;  // [kernel * kernel][kPack] and [kPack]
    int64_t kernel, stride;
    int64_t begin, end, width;  // of the output
    PixelRows<A> to;            // row `begin`
};
// What a depthwise kernel may read behind the end of a window, in pixels.
constexpr int64_t kWindowSlack = 8;

template <typename A>
void depthwise_rows(const DepthwiseRows<A>& rows);

// Even channels of x to `even` as they are, odd ones to `odd`.
template <typename A, typename T>
void split_channels(PixelRows<const T> x, int64_t pixels, int64_t half, const ToImage<T>& even, PixelRows<A> odd);

// `channels` values of each pixel in what they are computed in.
template <typename A, typename T>
void widen_channels(PixelRows<const T> x, int64_t pixels, int64_t channels, PixelRows<A> to);

// The first `channels` of each pixel into the windows of their packs.
template <typename A>
void fill_window(PixelRows<const A> x, int64_t pixels, int64_t channels, const ToWindow<A>& to);

}  // namespace spos::cpu
