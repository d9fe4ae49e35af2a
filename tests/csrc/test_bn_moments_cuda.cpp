// The CUDA kernel's own source, run on the CPU by cuda_shim.h, against double precision.
#include "kernels/cuda/bn_moments.cu"
#include "moments_cases.h"

namespace {

using namespace spos;
using spos::test::Input;

struct Result {
    std::vector<double> mean, m2;  // storage for either type of output; the alignment of double
    const char* error;
};

Result run(const Input& input) {
    const size_t outputs = input.shape.groups * input.shape.channels;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    Result result{std::vector<double>(outputs, nan), std::vector<double>(outputs, nan), nullptr};
    const int64_t bytes = cuda::bn_moments_workspace_bytes(input.dtype, input.shape);
    constexpr unsigned char kGuard = 0x5a;
    std::vector<unsigned char> workspace(bytes, 0xff);  // NaN
    workspace.resize(bytes + 64, kGuard);
    // A slice begins wherever it begins; vectors must be aligned on the GPU, so give it what torch gives.
    std::vector<unsigned char> aligned(input.bytes.size() + 16);
    unsigned char* x = aligned.data() + (16 - reinterpret_cast<uintptr_t>(aligned.data()) % 16) % 16;
    std::memcpy(x, input.bytes.data(), input.bytes.size());
    result.error =
        cuda::bn_moments(input.dtype, x, input.shape, workspace.data(), result.mean.data(), result.m2.data(), nullptr);
    CHECK(std::all_of(workspace.begin() + bytes, workspace.end(), [](unsigned char b) { return b == kGuard; }));
    return result;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

}  // namespace

// Every layout, dtype, load width and odd size gives the moments that double precision gives, whichever way the
// threads take turns.
TEST(agrees_with_double_precision) {
    spos::test::for_each_case([](const Input& input) {
        shim::backwards = false;
        const Result forwards = run(input);
        shim::backwards = true;
        const Result backwards = run(input);
        CHECK(forwards.error == nullptr);
        spos::test::check_moments(input, forwards.mean.data(), forwards.m2.data());
        CHECK(same_bits(forwards.mean, backwards.mean) && same_bits(forwards.m2, backwards.m2));
    });
}

TEST(large_means_keep_the_second_moment) {
    for (const bool channels_last : {false, true})
        for (const double mean : {0.0, 10.0, 1000.0}) {
            const Input input = spos::test::make_input(DType::float32, 1, 4, 8, 1000, channels_last, 0, mean);
            const Result result = run(input);
            spos::test::check_moments(input, result.mean.data(), result.m2.data());
        }
}

// A NaN spoils its own channel and no other.
TEST(nan_stays_in_its_channel) {
    for (const bool channels_last : {false, true}) {
        Input input = spos::test::make_input(DType::float32, 1, 2, 8, 64, channels_last);
        input.set(input.offset(0, 1, 3, 17), std::numeric_limits<double>::quiet_NaN());
        const Result result = run(input);
        const float* mean = reinterpret_cast<const float*>(result.mean.data());
        const float* m2 = reinterpret_cast<const float*>(result.m2.data());
        for (int c = 0; c < 8; ++c) CHECK(std::isnan(mean[c]) == (c == 3) && std::isnan(m2[c]) == (c == 3));
    }
}

// What cannot be launched is refused in words, with nothing written.
TEST(too_many_groups_are_refused) {
    const Input input = spos::test::make_input(DType::float32, 65536, 1, 1, 1, true);
    const Result result = run(input);
    CHECK(result.error != nullptr && std::strstr(result.error, "groups must be below 65536") != nullptr);
    CHECK(std::isnan(result.mean[0]));
}

RUN_TESTS()
