// The CUDA source of bn_normalize, run on the CPU by cuda_shim.h, against double precision.
#include "device_values.h"
#include "kernels/cuda/bn_normalize.cu"
#include "moments_cases.h"

namespace {

using namespace spos;
using spos::test::Input;
using spos::test::Values;

// Where a value of the packed output stands.
int64_t packed(const MomentsShape& s, int64_t n, int64_t c, int64_t p) {
    return s.channels_last ? (n * s.pixels + p) * s.channels + c : (n * s.channels + c) * s.pixels + p;
}

Values statistics(const Input& input, double around) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    Values values(test::statistics_of(input.dtype), input.shape.groups * input.shape.channels);
    for (int64_t i = 0; i < values.size(); ++i) values.set(i, around + normal(random));
    return values;
}

// `offset`: elements from an aligned address to x.
Values run(const Input& input, const Values& scale, const Values& shift, bool relu, int64_t offset = 0) {
    const MomentsShape& s = input.shape;
    Values x(input.dtype, input.size(), offset);
    std::memcpy(x.data(), input.bytes.data(), input.bytes.size());
    Values out(input.dtype, s.groups * s.count() * s.channels);
    CHECK(cuda::bn_normalize(input.dtype, x.data(), s, scale.data(), shift.data(), relu, out.data(), nullptr) ==
          nullptr);
    CHECK(out.guarded());
    return out;
}

void check(const Input& input, bool relu, int64_t offset = 0) {
    const MomentsShape& s = input.shape;
    const Values scale = statistics(input, 1), shift = statistics(input, -1);
    const Values out = run(input, scale, shift, relu, offset);
    const double unit = test::unit_of_sums(input.dtype);
    for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t n = 0; n < s.samples; ++n)
            for (int64_t c = 0; c < s.channels; ++c)
                for (int64_t p = 0; p < s.pixels; ++p) {
                    const double a = scale[g * s.channels + c], b = shift[g * s.channels + c];
                    const double value = input.values[input.offset(g, n, c, p)], normal = a * value + b;
                    const double wanted = relu && normal < 0 ? 0 : normal;
                    CHECK_NEAR(out[packed(s, g * s.samples + n, c, p)], wanted,
                               test::rounding(input.dtype, wanted) + 4 * unit * (std::fabs(a * value) + std::fabs(b)));
                }
}

}  // namespace

// Every layout, dtype, load width, odd size and group.
TEST(agrees_with_double_precision) {
    test::for_each_case([](const Input& input) { check(input, input.shape.samples % 2 == 0); });
    for (const bool channels_last : {false, true})
        check(test::make_input(DType::float16, 2, 2, 16, 64, channels_last), true, 1);
}

// Full width where all is aligned: this is what must not be lost by accident.
TEST(aligned_images_are_read_in_wide_vectors) {
    alignas(16) static char at[16];
    MomentsShape shape{2, 3, 24, 49, true, 48};
    CHECK(cuda::can_widen<__half>(at, shape, at) && !cuda::can_widen<__half>(at + 2, shape, at));
    shape.pitch = 44;
    CHECK(!cuda::can_widen<__half>(at, shape, at));
    shape.channels_last = false, shape.pitch = 24 * 49;
    CHECK(!cuda::can_widen<float>(at, shape, at));
    shape.pixels = 64, shape.pitch = 24 * 64;
    CHECK(cuda::can_widen<float>(at, shape, at));
}

// ReLU does not swallow a NaN, and no other value is touched by it.
TEST(nan_stays_where_it_is) {
    for (const bool channels_last : {false, true}) {
        Input input = test::make_input(DType::float32, 2, 1, 8, 16, channels_last);
        input.set(input.offset(1, 0, 3, 5), std::numeric_limits<double>::quiet_NaN());
        const Values out = run(input, statistics(input, 1), statistics(input, 0), true);
        for (int64_t i = 0; i < out.size(); ++i) CHECK(std::isnan(out[i]) == (i == packed(input.shape, 1, 3, 5)));
    }
}

TEST(what_cannot_be_launched_is_refused) {
    const MomentsShape shape{65536, 1, 1, 1, true, 1};
    const char* error = cuda::bn_normalize(DType::float32, nullptr, shape, nullptr, nullptr, true, nullptr, nullptr);
    CHECK(error != nullptr && std::strstr(error, "groups must be below 65536") != nullptr);
}

RUN_TESTS()
