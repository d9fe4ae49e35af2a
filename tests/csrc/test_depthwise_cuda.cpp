// The CUDA source of the depthwise forward, run on the CPU by cuda_shim.h, against double precision.
#include "depthwise_cases.h"
#include "kernels/cuda/depthwise.cu"

namespace {

using namespace spos;
using spos::test::Layer, spos::test::Sizes, spos::test::Values;

struct Result {
    Values z, mean, m2;
    const char* error;

    explicit Result(const Layer& layer, bool backwards = false)
        : z(layer.dtype, layer.out_pixels() * layer.sizes.channels),
          mean(test::statistics_of(layer.dtype), layer.sizes.channels),
          m2(test::statistics_of(layer.dtype), layer.sizes.channels) {
        shim::backwards = backwards;
        Values workspace(DType::float64, cuda::depthwise_workspace_bytes(layer.arguments) / 8 + 1);
        error = cuda::depthwise(layer.arguments, z.data(), workspace.data(), mean.data(), m2.data(), nullptr);
        CHECK(workspace.guarded() && z.guarded() && mean.guarded() && m2.guarded());
    }
};

void check_convolution(const Layer& layer, const Result& result) {
    const int64_t channels = layer.sizes.channels, taps = layer.sizes.kernel * layer.sizes.kernel;
    std::vector<double> sum(layer.out_pixels() * channels), size(sum.size());
    layer.for_each_product([&](int64_t out, int64_t tap, int64_t in) {
        for (int64_t c = 0; c < layer.used(); ++c) {
            sum[out * channels + c] += layer.activated(in, c) * layer.weight[c * taps + tap];
            const double terms = std::fabs(layer.raw(in, c)) * (layer.sizes.affine ? std::fabs(layer.scale[c]) : 1) +
                                 (layer.sizes.affine ? std::fabs(layer.shift[c]) : 0);
            size[out * channels + c] += terms * std::fabs(layer.weight[c * taps + tap]);
        }
    });
    const double unit = test::unit_of_sums(layer.dtype);
    for (int64_t p = 0; p < layer.out_pixels(); ++p)
        for (int64_t c = 0; c < layer.used(); ++c) {
            const int64_t i = p * channels + c;
            CHECK_NEAR(result.z[i], sum[i], test::rounding(layer.dtype, sum[i]) + size[i] * unit * (4 + taps));
        }
}

// Of z as it was stored, by two passes in double.
void check_statistics(const Layer& layer, const Result& result) {
    const int64_t channels = layer.sizes.channels, count = layer.out_pixels();
    const bool wide = layer.dtype == DType::float64;
    for (int64_t c = 0; c < layer.used(); ++c) {
        double sum = 0, square = 0;
        for (int64_t p = 0; p < count; ++p) sum += result.z[p * channels + c];
        const double mean = sum / count;
        for (int64_t p = 0; p < count; ++p) square += std::pow(result.z[p * channels + c] - mean, 2);
        const double scale = std::fabs(mean) + std::sqrt(square / count);
        CHECK_NEAR(result.mean[c], mean, scale * (wide ? 1e-14 : 2e-7));
        const double slack = wide ? 1e-13 : 1e-6, epsilon = wide ? 1e-16 : 6e-8;
        CHECK_NEAR(result.m2[c], square, square * slack + count * std::pow(scale * epsilon, 2));
    }
    for (int64_t c = layer.used(); c < channels; ++c) CHECK(result.mean[c] == 0 && result.m2[c] == 0);
}

}  // namespace

// Every path gives what double precision gives, whichever way the threads take turns; what does not belong to the layer
// is NaN and would show.
TEST(agrees_with_double_precision) {
    for (const Sizes& sizes : spos::test::depthwise_sizes())
        for (const DType dtype : spos::test::kDTypes) {
            const Layer layer(sizes, dtype);
            const Result forwards(layer), backwards(layer, true);
            CHECK(forwards.error == nullptr && backwards.error == nullptr);
            check_convolution(layer, forwards);
            check_statistics(layer, forwards);
            CHECK(forwards.z.same_bits(backwards.z) && forwards.mean.same_bits(backwards.mean) &&
                  forwards.m2.same_bits(backwards.m2));
        }
}

// More items than one chunk holds, and means far from zero: the second moment keeps its digits.
TEST(large_means_keep_the_second_moment) {
    for (const double mean : {0.0, 30.0, 1000.0}) {
        const Layer layer({3, 40, 50, 2, 3, 1, 0, 0, -1, true, false, mean}, DType::float32);
        const Result result(layer);
        check_convolution(layer, result);
        check_statistics(layer, result);
    }
}

// Several chunks of items, of which each thread has more than one.
TEST(many_blocks_agree) {
    const Layer layer({16, 40, 40, 130, 3, 1}, DType::float32);
    const Result result(layer);
    check_statistics(layer, result);
}

// Groups in one launch: the bits of a launch of their own, with their own scale and shift; the last one is all NaN.
TEST(groups_are_calls_of_their_own) {
    constexpr int64_t kGroups = 3;
    for (const Sizes& sizes :
         {Sizes{6, 9, 10, 6, 3, 1}, {6, 6, 8, 5, 5, 2}, {3, 20, 30, 70, 7, 1, 2, 2}, {6, 6, 8, 12, 3, 1, 0, 0, 7}})
        for (const DType dtype : {DType::float32, DType::float16}) {
            Layer layer(sizes, dtype);
            const int64_t c = sizes.channels, in = layer.x.size() / kGroups, out = layer.out_pixels() / kGroups * c;
            const DType statistics = test::statistics_of(dtype);
            for (int64_t i = 2 * in; i < layer.x.size(); ++i) layer.x.set(i, NAN);
            Values scale(statistics, kGroups * c), shift(statistics, kGroups * c);
            for (int64_t i = 0; i < kGroups * c; ++i) scale.set(i, 1 + 0.01 * i), shift.set(i, 0.2 - 0.03 * i);

            const auto run = [&](int64_t group, int64_t groups, Values& z, Values& mean, Values& m2) {
                cuda::Depthwise part = layer.arguments;
                part.samples = sizes.samples / kGroups, part.groups = groups;
                part.x = layer.x.at(group * in + sizes.before);
                part.scale = scale.at(group * c), part.shift = shift.at(group * c);
                Values workspace(DType::float64, cuda::depthwise_workspace_bytes(part) / 8 + 1);
                CHECK(cuda::depthwise(part, z.data(), workspace.data(), mean.data(), m2.data(), nullptr) == nullptr);
                CHECK(workspace.guarded() && z.guarded() && mean.guarded() && m2.guarded());
            };
            Values z(dtype, kGroups * out), mean(statistics, kGroups * c), m2(statistics, kGroups * c);
            run(0, kGroups, z, mean, m2);
            for (int64_t group = 0; group < kGroups; ++group) {
                Values own_z(dtype, out), own_mean(statistics, c), own_m2(statistics, c);
                run(group, 1, own_z, own_mean, own_m2);
                CHECK(std::memcmp(z.at(group * out), own_z.data(), out * item_size(dtype)) == 0);
                CHECK(std::memcmp(mean.at(group * c), own_mean.data(), c * item_size(statistics)) == 0);
                CHECK(std::memcmp(m2.at(group * c), own_m2.data(), c * item_size(statistics)) == 0);
                CHECK(std::isnan(own_mean[0]) == (group == 2));
            }
        }
}

// A NaN of the input reaches the outputs that see it, through the ReLU too, and no other channel.
TEST(nan_stays_in_its_channel) {
    for (const int64_t kernel : {3, 9}) {
        Layer layer({1, 12, 12, 4, kernel, 1}, DType::float32);
        layer.x.set(layer.in_pixel(0, 6, 6) * layer.pitch() + 1, NAN);
        const Result result(layer);
        for (int64_t y = 0; y < 12; ++y)
            for (int64_t x = 0; x < 12; ++x)
                for (int64_t c = 0; c < 4; ++c) {
                    const bool sees = c == 1 && std::abs(y - 6) <= kernel / 2 && std::abs(x - 6) <= kernel / 2;
                    CHECK(std::isnan(result.z[layer.out_pixel(0, y, x) * 4 + c]) == sees);
                }
        for (int64_t c = 0; c < 4; ++c) CHECK(std::isnan(result.mean[c]) == (c == 1));
    }
}

// An image that starts at an odd element cannot be read in pairs, and is not.
TEST(odd_addresses_are_read_one_by_one) {
    Layer layer({1, 5, 9, 4, 3, 1, 2, 0}, DType::float16);
    const Result aligned(layer);
    Values moved(DType::float16, layer.x.size(), 1);
    std::memcpy(moved.data(), layer.x.data(), layer.x.size() * 2);
    layer.arguments.x = moved.at(2);
    CHECK(!cuda::forward_has_pairs(layer.arguments, aligned.mean.data()));
    const Result result(layer);
    check_convolution(layer, result);
}

TEST(what_cannot_be_launched_is_refused) {
    Layer layer({1, 4, 4, 2, 3, 1}, DType::float32);
    layer.arguments.kernel = 4;
    CHECK(std::strstr(Result(layer).error, "kernel must be odd") != nullptr);
    layer.arguments.kernel = 3, layer.arguments.samples = int64_t{1} << 28;
    Values out(DType::float32, 8);
    CHECK(std::strstr(cuda::depthwise(layer.arguments, nullptr, nullptr, out.data(), out.data(), nullptr),
                      "too large for one launch") != nullptr);
    layer.arguments.samples = 1, layer.arguments.groups = 65536;
    CHECK(std::strstr(cuda::depthwise(layer.arguments, nullptr, nullptr, out.data(), out.data(), nullptr),
                      "from 1 to 65535 groups") != nullptr);
    CHECK(std::isnan(out[0]));
}

RUN_TESTS()
