// The convolution on codes as machines without VNNI run it: the target is fixed. Against plain loops.
#define SPOS_FIXED_TARGET
#include "csrc/cpu/integer_conv.cpp"
#include "csrc/cpu/quant_codes.cpp"
#include "tests/csrc/check.h"

using namespace spos;
using namespace spos::cpu;

namespace {

// Numbers that look like chance, from 0 to `end` - 1.
struct Draw {
    uint32_t state = 1;
    int64_t operator()(int64_t end) { return (state = state * 1664525u + 1013904223u) / 65536 % end; }
};

void check(const IntegerConvShape& s) {
    Draw draw;
    const int64_t taps = s.kernel_height * s.kernel_width, filter = s.in_channels * taps;
    std::vector<float> x(s.samples * s.height * s.width * s.in_channels);
    for (float& value : x) value = 0.25f * draw(80) - 3;
    std::vector<int8_t> weight(s.out_channels * filter), packed(weight.size());
    for (int8_t& code : weight) code = static_cast<int8_t>(draw(255) - 127);
    std::vector<float> scale(s.out_channels), shift(s.out_channels), mean(s.out_channels), m2(s.out_channels);
    for (int64_t c = 0; c < s.out_channels; ++c) scale[c] = 1 + c, shift[c] = -2.0f * c;
    pack_codes(weight.data(), s.out_channels, s.in_channels, taps, packed.data(), run_serially);

    const int64_t pixels = s.samples * s.out_height * s.out_width;
    std::vector<float> out(pixels * s.out_channels);
    std::vector<uint8_t> codes(x.size());
    const Quantizer quantizer{0, 15, false, true};
    CHECK(integer_conv(s, {DType::float32, x.data(), nullptr, nullptr, quantizer, 1.0f, codes.data()}, packed.data(),
                       {scale.data(), shift.data(), true, out.data(), mean.data(), m2.data()}, run_serially));

    bool same = true, near = true;
    for (size_t i = 0; i < x.size(); ++i) same &= codes[i] == std::clamp(std::nearbyint(x[i]), 0.0f, 15.0f);
    std::vector<double> sums(s.out_channels), squares(s.out_channels);
    for (int64_t at = 0; at < pixels * s.out_channels; ++at) {
        const int64_t o = at % s.out_channels, pixel = at / s.out_channels, column = pixel % s.out_width;
        const int64_t row = pixel / s.out_width % s.out_height, n = pixel / s.out_width / s.out_height;
        int64_t sum = 0;
        for (int64_t c = 0; c < s.in_channels; ++c)
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t i = row * s.vertical_stride - s.vertical_padding + tap / s.kernel_width;
                const int64_t j = column * s.horizontal_stride - s.horizontal_padding + tap % s.kernel_width;
                if (i < 0 || i >= s.height || j < 0 || j >= s.width) continue;
                sum +=
                    codes[((n * s.height + i) * s.width + j) * s.in_channels + c] * weight[o * filter + c * taps + tap];
            }
        const double wanted = std::max(0.0, sum * double(scale[o]) + shift[o]);
        near &= std::fabs(out[at] - wanted) <= 1e-6 * wanted;
        sums[o] += out[at], squares[o] += double(out[at]) * out[at];
    }
    CHECK(same && near);
    for (int64_t c = 0; c < s.out_channels; ++c) {
        const double average = sums[c] / pixels, second = squares[c] - sums[c] * average;
        CHECK(std::fabs(mean[c] - average) <= 1e-5 * average + 1e-6);
        CHECK(std::fabs(m2[c] - second) <= 1e-5 * second + 1e-6);
    }
}

}  // namespace

TEST(sums_codes_and_moments) {
    check({2, 8, 9, 17, 48, 9, 17, 3, 3, 1, 1, 1, 1});
}

TEST(strides_that_skip_rows_and_uneven_kernels) {
    check({1, 4, 8, 7, 16, 4, 4, 1, 1, 2, 2, 0, 0});
    check({3, 12, 11, 30, 32, 6, 10, 2, 5, 2, 3, 1, 2});
}

TEST(a_nan_is_told) {
    const std::vector<float> x(4, NAN);
    const std::vector<int8_t> weight(64, 1);
    const std::vector<float> scale(16, 1), shift(16);
    std::vector<float> out(16);
    CHECK(!integer_conv({1, 4, 1, 1, 16, 1, 1, 1, 1, 1, 1, 0, 0},
                        {DType::float32, x.data(), nullptr, nullptr, {0, 15, false, true}, 1.0f, nullptr},
                        weight.data(), {scale.data(), shift.data(), false, out.data(), nullptr, nullptr},
                        run_serially));
}

RUN_TESTS()
