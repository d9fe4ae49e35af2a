// The CPU kernel against double precision, without torch.
#include <thread>

#include "check.h"
#include "csrc/cpu/bn_moments.h"
#include "moments_cases.h"

namespace {

using namespace spos;
using spos::test::Input;

struct Result {
    std::vector<unsigned char> mean, m2;
};

Result run(const Input& input, const cpu::ParallelFor& parallel_for = cpu::run_serially) {
    const size_t bytes = input.shape.groups * input.shape.channels * (input.dtype == DType::float64 ? 8 : 4);
    Result result{std::vector<unsigned char>(bytes, 0xff), std::vector<unsigned char>(bytes, 0xff)};
    cpu::bn_moments(input.dtype, input.bytes.data(), input.shape, result.mean.data(), result.m2.data(), parallel_for);
    return result;
}

void one_thread_a_task(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t task = tasks; task-- > 0;) threads.emplace_back(body, task, task + 1);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

// Every layout, dtype and odd size gives the moments that double precision gives.
TEST(agrees_with_double_precision) {
    spos::test::for_each_case([](const Input& input) {
        const Result result = run(input);
        spos::test::check_moments(input, result.mean.data(), result.m2.data());
    });
}

// A mean far from zero must not eat the second moment.
TEST(large_means_keep_the_second_moment) {
    for (const bool channels_last : {false, true})
        for (const double mean : {0.0, 10.0, 1000.0}) {
            const Input input = spos::test::make_input(DType::float32, 1, 8, 16, 1000, channels_last, 0, mean);
            const Result result = run(input);
            spos::test::check_moments(input, result.mean.data(), result.m2.data());
        }
}

// The same bits for one thread and for many.
TEST(threads_do_not_change_a_bit) {
    for (const bool channels_last : {false, true}) {
        const Input input = spos::test::make_input(DType::float32, 2, 32, 40, 300, channels_last);
        const Result one = run(input), many = run(input, one_thread_a_task);
        CHECK(one.mean == many.mean && one.m2 == many.m2);
    }
}

// Halves: zero, subnormals, normals, infinity and NaN, scalar and in packs.
TEST(half_conversion_is_exact) {
    CHECK(widen(Half{0x0000}) == 0.0f);
    CHECK(widen(Half{0x8000}) == 0.0f && std::signbit(widen(Half{0x8000})));
    CHECK(widen(Half{0x0001}) == std::ldexp(1.0f, -24));
    CHECK(widen(Half{0x03ff}) == std::ldexp(1023.0f, -24));
    CHECK(widen(Half{0x3c00}) == 1.0f);
    CHECK(widen(Half{0xfbff}) == -65504.0f);
    CHECK(std::isinf(widen(Half{0x7c00})) && std::isnan(widen(Half{0x7e00})));
}

RUN_TESTS()
