// One layer of a fused unit at a time, forwards and backwards: what its pass reads, what it writes, and the pass.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/unit_gradient_kernels.h"
#include "csrc/cpu/unit_kernels.h"

namespace spos::cpu {

// Channel j of pixel p is start[p * pitch + j * step], then scale[j] * z + shift[j], then ReLU.
template <typename T>
struct Input {
    using A = typename Compute<T>::type;
    const T* start;
    int64_t pitch, step;
    const A *scale = nullptr, *shift = nullptr;  // whole packs; null: as it is, and no ReLU
    bool relu = false;

    // `pixels` pixels, `apart` from one another, of some channels.
    void load(int64_t pixel, int64_t apart, int64_t pixels, int64_t channel, int64_t channels, A* to, int64_t to_pitch,
              const T* ahead = nullptr) const {
        const T* from = start + pixel * pitch + channel * step;
        if (scale && step == 1)
            return scale_and_shift(from, pitch * apart, pixels, channels, scale + channel, shift + channel, relu, to,
                                   to_pitch, false, ahead);
        copy_channels(from, pitch * apart, step, pixels, channels, to, to_pitch, ahead);
        if (scale)
            scale_and_shift(static_cast<const A*>(to), to_pitch, pixels, channels, scale + channel, shift + channel,
                            relu, to, to_pitch);
    }
};

// The even channels of x, which a unit without projection passes on; the first pass copies them as it reads x.
template <typename T>
struct Passing {
    const T* x = nullptr;  // null: none
    int64_t x_pitch = 0;
    T* out = nullptr;
    int64_t out_pitch = 0;
    bool stream = false;  // `out` is written past the caches

    void copy(int64_t pixel, int64_t pixels, int64_t channel, int64_t channels, const T* ahead = nullptr) const {
        if (x)
            copy_even_channels(x + pixel * x_pitch + 2 * channel, x_pitch, pixels, channels,
                               out + pixel * out_pitch + channel, out_pitch, stream, ahead);
    }
};

template <typename T>
void pass_on(const Passing<T>& passing, int64_t pixels, int64_t channels, const ParallelFor& parallel_for);

// Of each channel: mean, and sum of the squared deviations from it.
struct Moments {
    std::vector<double> mean, m2;
};

// z = weight * input, in z's memory. z may lie where the input lies.
template <typename T>
struct Pointwise {
    Input<T> input;
    int64_t pixels, in, out;
    const T* weight;  // [out, weight_pitch]
    int64_t weight_pitch;
    T* z;
    int64_t z_pitch;
    Passing<T> passing;
    bool backwards;  // from the last pixel to the first, as here and below: what the pass before wrote last is cached
};
template <typename T>
Moments pointwise_forward(const Pointwise<T>& layer, const ParallelFor& parallel_for);

// Images and kernel of a depthwise convolution.
struct Window {
    int64_t samples, height, width;  // of the input
    int64_t channels, kernel, stride;

    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
};
// Whether the result may lie where the input lies, with the same pitch.
bool works_in_place(const Window& window);

template <typename T>
struct Depthwise {
    Input<T> input;
    Window window;
    const T* weight;  // [channels, kernel, kernel]
    T* z;
    int64_t z_pitch;
    Passing<T> passing;
    bool backwards;
};
template <typename T>
Moments depthwise_forward(const Depthwise<T>& layer, const ParallelFor& parallel_for);

// The gradient of a convolution's output, made on load from the gradient behind its BN and ReLU.
template <typename T>
struct OutputGradient {
    using A = typename Compute<T>::type;
    const T* outer;  // one of these two is null
    const A* inner;
    int64_t pitch;
    const T* z;
    int64_t z_pitch;
    NormGradient<A> norm;

    // Whole packs a pixel.
    void load(int64_t pixel, int64_t pixels, int64_t channel, int64_t channels, A* to, int64_t to_pitch,
              int64_t ahead = 0) const {
        const NormGradient<A> from = norm.from(channel);
        const int64_t at = pixel * pitch + channel;
        const T* values = z + pixel * z_pitch + channel;
        if (inner)
            norm_gradient(inner + at, pitch, values, z_pitch, pixels, channels, from, to, to_pitch, ahead);
        else
            norm_gradient(outer + at, pitch, values, z_pitch, pixels, channels, from, to, to_pitch, ahead);
    }
};

// Where the gradient of a layer's input goes: what computes on stays in the computing type, `to` is a tensor.
template <typename T>
struct InputGradient {
    using A = typename Compute<T>::type;
    A* inner = nullptr;  // [pixels, pitch], whole packs a pixel; may be the OutputGradient's where that is allowed
    int64_t pitch = 0;
    T* to = nullptr;           // else
    const A* other = nullptr;  // added, if given
    int64_t other_pitch = 0;
    const T* even = nullptr;  // if given, the even channels of `to`; then the gradient is that of the odd ones
    int64_t even_pitch = 0;
    bool stream = false;  // past the caches

    // `from` is overwritten.
    void store(int64_t pixel, int64_t apart, int64_t pixels, int64_t channel, int64_t channels, A* from,
               int64_t from_pitch) const {
        if (inner)
            return copy_channels(static_cast<const A*>(from), from_pitch, 1, pixels, channels,
                                 inner + pixel * pitch + channel, pitch * apart);
        if (other)
            add_rows(other + pixel * other_pitch + channel, other_pitch * apart, pixels, channels, from, from_pitch);
        if (even)
            interleave(even + pixel * even_pitch + channel, even_pitch * apart, static_cast<const A*>(from), from_pitch,
                       pixels, channels, to + pixel * pitch + 2 * channel, pitch * apart, stream);
        else
            store_rows(static_cast<const A*>(from), from_pitch, pixels, channels, to + pixel * pitch + channel,
                       pitch * apart, stream);
    }
};

// Over pixels: of the gradient g of scale * a + shift (behind the mask of the ReLU, if there is one), and of g times
// (a - centre).
struct GradientSums {
    std::vector<double> sum, product;
};

template <typename T>
struct PointwiseBackward {
    using A = typename Compute<T>::type;
    OutputGradient<T> output;
    Input<T> input;
    const A* centre;     // [in] in whole packs; null only without scale or with ReLU
    const A* at_centre;  // scale * centre + shift (the centre, without a scale); null: zeros
    bool sums;           // whether they are wanted
    int64_t pixels, in, out;
    const T* weight;
    T* weight_gradient;  // both [rows, row], of which `out` and `in` are used; zeros behind
    int64_t rows, row;
    InputGradient<T> gradient;
};
template <typename T>
GradientSums pointwise_backward(const PointwiseBackward<T>& layer, const ParallelFor& parallel_for);

template <typename T>
struct DepthwiseBackward {
    using A = typename Compute<T>::type;
    OutputGradient<T> output;
    Input<T> input;
    const A* centre;  // [channels] in whole packs
    Window window;
    const T* weight;
    T* weight_gradient;  // both [rows, kernel, kernel]
    int64_t rows;
    InputGradient<T> gradient;
};
template <typename T>
GradientSums depthwise_backward(const DepthwiseBackward<T>& layer, const ParallelFor& parallel_for);

// out[p][first + c] = act(scale * z + shift) for the last layer of a chain.
template <typename T>
void activate(const Input<T>& z, int64_t pixels, int64_t channels, T* out, int64_t out_pitch, bool stream,
              bool backwards, const ParallelFor& parallel_for);

// Sums over pixels of the gradient behind a BN layer and its ReLU, and of it times (z - mean).
template <typename T>
GradientSums output_sums(const OutputGradient<T>& output, int64_t pixels, int64_t channels,
                         const ParallelFor& parallel_for);

}  // namespace spos::cpu
