// Inputs for the bn_moments kernels and what they must give, for the CPU kernel and the CUDA kernel alike.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "csrc/bn_moments.h"
#include "csrc/dtype.h"

namespace spos::test {

// Round to nearest for the normal range, which is all that the tests write.
inline uint16_t to_half_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u) return static_cast<uint16_t>(sign);  // below the normal halves: zero
    return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

inline uint16_t to_bfloat16_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Input {
    DType dtype;
    MomentsShape shape;
    std::vector<unsigned char> bytes;
    std::vector<double> values;  // what the elements of `bytes` are worth

    int64_t size() const { return static_cast<int64_t>(values.size()); }

    int64_t offset(int64_t group, int64_t sample, int64_t channel, int64_t pixel) const {
        const int64_t n = group * shape.samples + sample;
        return shape.channels_last ? (n * shape.pixels + pixel) * shape.pitch + channel
                                   : n * shape.pitch + channel * shape.pixels + pixel;
    }

    void set(int64_t at, double value) {
        unsigned char* to = bytes.data() + at * item_size(dtype);
        const float single = static_cast<float>(value);
        if (dtype == DType::float64) {
            std::memcpy(to, &value, 8);
            values[at] = value;
        } else if (dtype == DType::float32) {
            std::memcpy(to, &single, 4);
            values[at] = single;
        } else if (dtype == DType::float16) {
            const Half half{to_half_bits(single)};
            std::memcpy(to, &half, 2);
            values[at] = widen(half);
        } else {
            const BFloat16 brain{to_bfloat16_bits(single)};
            std::memcpy(to, &brain, 2);
            values[at] = widen(brain);
        }
    }
};

// Channel c is normal with mean `mean` * (1 + c / channels) and deviation 1; what lies between the channels of a slice
// is NaN, so that reading it shows.
inline Input make_input(DType dtype, int64_t groups, int64_t samples, int64_t channels, int64_t pixels,
                        bool channels_last, int64_t extra_channels = 0, double mean = 1) {
    Input input{dtype, {groups, samples, channels, pixels, channels_last, 0}, {}, {}};
    input.shape.pitch = (channels + extra_channels) * (channels_last ? 1 : pixels);
    const int64_t size = groups * samples * (channels + extra_channels) * pixels;
    input.bytes.assign(size * item_size(dtype), 0xff);
    input.values.assign(size, std::numeric_limits<double>::quiet_NaN());
    std::mt19937 random(size + channels);
    std::normal_distribution<double> normal;
    for (int64_t g = 0; g < groups; ++g)
        for (int64_t n = 0; n < samples; ++n)
            for (int64_t c = 0; c < channels; ++c)
                for (int64_t p = 0; p < pixels; ++p)
                    input.set(input.offset(g, n, c, p), mean * (1.0 + double(c) / channels) + normal(random));
    return input;
}

// Checks mean and m2 ([groups, channels], double for float64 and float otherwise) against two passes in double.
inline void check_moments(const Input& input, const void* mean, const void* m2) {
    const MomentsShape& s = input.shape;
    const bool wide = input.dtype == DType::float64;
    auto at = [&](const void* data, int64_t i) {
        return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
    };
    for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t c = 0; c < s.channels; ++c) {
            double sum = 0, square = 0;
            for (int64_t n = 0; n < s.samples; ++n)
                for (int64_t p = 0; p < s.pixels; ++p) sum += input.values[input.offset(g, n, c, p)];
            const double wanted_mean = sum / s.count();
            for (int64_t n = 0; n < s.samples; ++n)
                for (int64_t p = 0; p < s.pixels; ++p) {
                    const double d = input.values[input.offset(g, n, c, p)] - wanted_mean;
                    square += d * d;
                }
            const double scale = std::fabs(wanted_mean) + std::sqrt(square / s.count());
            CHECK_NEAR(at(mean, g * s.channels + c), wanted_mean, scale * (wide ? 1e-14 : 1e-6));
            // A relative error, and beside it what rounding each distance from a large mean costs.
            const double slack = wide ? 1e-13 : 2e-6, epsilon = wide ? 1e-16 : 6e-8;
            CHECK_NEAR(at(m2, g * s.channels + c), square, square * slack + s.count() * std::pow(scale * epsilon, 2));
        }
}

// Shapes that reach every path: both layouts, slices, widths that vector loads fit and do not fit, one pixel, one
// sample, one channel, more channels than a block, more rows than a tile, several groups.
template <typename Check>
void for_each_case(Check check) {
    const int64_t shapes[][5] = {{1, 2, 8, 49, 0},   {2, 3, 5, 7, 0},    {1, 1, 1, 1, 0},    {1, 4, 640, 1, 0},
                                 {3, 1, 1, 64, 0},   {1, 2, 16, 64, 16}, {1, 3, 12, 100, 3}, {1, 300, 4, 4, 0},
                                 {2, 2, 3, 1030, 0}, {1, 1, 7, 5000, 1}, {1, 2, 530, 9, 0}};
    for (const auto& s : shapes)
        for (const bool channels_last : {false, true})
            for (const DType dtype : {DType::float32, DType::float64, DType::float16, DType::bfloat16})
                check(make_input(dtype, s[0], s[1], s[2], s[3], channels_last, s[4]));
}

}  // namespace spos::test
