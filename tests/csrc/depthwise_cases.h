// Layers for the depthwise kernels, and what they must give in double precision.
#pragma once

#include "device_values.h"
#include "kernels/cuda/depthwise.h"

namespace spos::test {

struct Sizes {
    int64_t samples, height, width, channels, kernel, stride;
    int64_t before = 0, after = 0;  // channels around the slice in x
    int64_t present = -1;           // as the device says; -1: it says nothing
    bool affine = true, relu = true;
    double mean = 0;
};

// Everything that must not be read is NaN: channels of x around the slice, what lies behind the present channels, and
// weights behind them.
struct Layer {
    Sizes sizes;
    DType dtype;
    int64_t stored;
    Values x, weight, scale, shift;
    int32_t present;
    cuda::Depthwise arguments;

    Layer(const Sizes& s, DType type)
        : sizes(s),
          dtype(type),
          stored(s.channels + 3),
          x(type, s.samples * s.height * s.width * (s.before + s.channels + s.after)),
          weight(type, stored * s.kernel * s.kernel),
          scale(statistics_of(type), s.channels),
          shift(statistics_of(type), s.channels),
          present(static_cast<int32_t>(s.present)) {
        std::mt19937 random(static_cast<unsigned>(s.samples * 7 + s.height * 31 + s.width + s.channels * 3 + s.kernel));
        std::normal_distribution<double> normal;
        for (int64_t p = 0; p < s.samples * s.height * s.width; ++p)
            for (int64_t c = 0; c < used(); ++c) x.set(p * pitch() + s.before + c, s.mean + normal(random));
        for (int64_t i = 0; i < used() * s.kernel * s.kernel; ++i)
            weight.set(i, normal(random) / static_cast<double>(s.kernel));
        for (int64_t c = 0; c < used(); ++c) scale.set(c, 1 + 0.3 * normal(random)), shift.set(c, 0.5 * normal(random));
        arguments = {type,
                     s.samples,
                     s.height,
                     s.width,
                     s.channels,
                     s.kernel,
                     s.stride,
                     s.present < 0 ? nullptr : &present,
                     x.at(s.before),
                     pitch(),
                     weight.data(),
                     s.affine ? scale.data() : nullptr,
                     s.affine ? shift.data() : nullptr,
                     s.relu};
    }
    Layer(const Layer&) = delete;

    int64_t used() const { return sizes.present < 0 ? sizes.channels : std::min(sizes.present, sizes.channels); }
    int64_t pitch() const { return sizes.before + sizes.channels + sizes.after; }
    int64_t out_height() const { return arguments.out_height(); }
    int64_t out_width() const { return arguments.out_width(); }
    int64_t out_pixels() const { return sizes.samples * out_height() * out_width(); }
    int64_t in_pixel(int64_t n, int64_t y, int64_t x) const { return (n * sizes.height + y) * sizes.width + x; }
    int64_t out_pixel(int64_t n, int64_t y, int64_t x) const { return (n * out_height() + y) * out_width() + x; }

    double raw(int64_t pixel, int64_t c) const { return x[pixel * pitch() + sizes.before + c]; }
    double normal(int64_t pixel, int64_t c) const {
        return sizes.affine ? scale[c] * raw(pixel, c) + shift[c] : raw(pixel, c);
    }
    double activated(int64_t pixel, int64_t c) const {
        const double value = normal(pixel, c);
        return sizes.relu && value < 0 ? 0 : value;
    }

    // Calls visit(output pixel, tap, input pixel) for every product that the convolution sums.
    template <typename Visit>
    void for_each_product(Visit visit) const {
        const int64_t k = sizes.kernel, pad = k / 2;
        for (int64_t n = 0; n < sizes.samples; ++n)
            for (int64_t oy = 0; oy < out_height(); ++oy)
                for (int64_t ox = 0; ox < out_width(); ++ox)
                    for (int64_t tap = 0; tap < k * k; ++tap) {
                        const int64_t iy = oy * sizes.stride - pad + tap / k, ix = ox * sizes.stride - pad + tap % k;
                        if (iy >= 0 && iy < sizes.height && ix >= 0 && ix < sizes.width)
                            visit(out_pixel(n, oy, ox), tap, in_pixel(n, iy, ix));
                    }
    }
};

// Shapes that reach every path: compiled and other kernels and strides, pairs of channels and odd ones, one pixel, one
// row, one column, one sample, kernels larger than the image, runs that fit and do not, more channels than a block.
inline std::vector<Sizes> depthwise_sizes() {
    return {
        {2, 9, 10, 6, 3, 1},
        {2, 9, 10, 6, 5, 1},
        {1, 8, 15, 4, 7, 1},
        {2, 9, 10, 6, 3, 2},
        {1, 10, 9, 6, 5, 2},
        {1, 14, 14, 4, 7, 2},
        {1, 1, 1, 2, 7, 1},
        {1, 1, 1, 2, 5, 2},
        {1, 1, 13, 8, 7, 1},
        {1, 13, 1, 8, 7, 1},
        {3, 2, 3, 70, 7, 1},
        {3, 3, 2, 70, 5, 2},
        {5, 7, 7, 80, 3, 1},
        {2, 9, 10, 5, 3, 1},
        {1, 6, 7, 5, 5, 2},
        {1, 9, 9, 3, 7, 1},
        {1, 9, 12, 4, 9, 1},
        {1, 9, 12, 4, 3, 3},
        {2, 5, 4, 1, 1, 1},
        {1, 4, 4, 2, 11, 2},
        {2, 6, 8, 6, 3, 1, 4, 2},
        {2, 6, 8, 6, 5, 2, 6, 0},
        {2, 6, 8, 6, 7, 1, 1, 2},
        {2, 6, 8, 6, 3, 1, 0, 1},
        {2, 6, 8, 12, 3, 1, 0, 0, 7},
        {2, 6, 8, 12, 5, 2, 2, 2, 4},
        {1, 6, 8, 90, 7, 1, 0, 0, 20},
        {2, 6, 8, 5, 3, 1, 0, 0, 2},
        {2, 6, 8, 6, 3, 1, 0, 0, 6},
        {2, 6, 8, 6, 3, 1, 0, 0, 0},
        {2, 7, 9, 6, 3, 1, 0, 0, -1, false, true},
        {2, 7, 9, 6, 5, 2, 0, 0, -1, false, false},
        {2, 7, 9, 5, 3, 1, 0, 0, -1, true, false},
        {2, 6, 8, 12, 3, 1, 0, 0, 7, true, false},
        {1, 9, 8, 12, 7, 2, 0, 0, 3, false, false},
        {1, 7, 9, 6, 7, 1, 0, 0, -1, true, false},
    };
}

}  // namespace spos::test
