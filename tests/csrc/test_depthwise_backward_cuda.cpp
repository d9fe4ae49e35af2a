// The CUDA source of the depthwise backward, run on the CPU by cuda_shim.h, against double precision.
#include "depthwise_cases.h"
#include "kernels/cuda/depthwise_backward.cu"

namespace {

using namespace spos;
using spos::test::Layer, spos::test::Sizes, spos::test::Values;

constexpr double kGamma = 1.2;

// A layer with what its backward pass is given. grad is a slice in the middle of a wider gradient; all that is not to
// be read is NaN.
struct Given : Layer {
    static constexpr int64_t kBefore = 2;
    int64_t after;  // channels behind the slice
    Values grad, z, norm, centre;
    bool relu;

    Given(const Sizes& s, DType type, bool relu, int64_t after = 4)
        : Layer(s, type),
          after(after),
          grad(type, out_pixels() * grad_pitch()),
          z(type, out_pixels() * s.channels),
          norm(test::statistics_of(type), 5 * s.channels),
          centre(test::statistics_of(type), s.channels),
          relu(relu) {
        std::mt19937 random(static_cast<unsigned>(s.height + 5 * s.channels));
        std::normal_distribution<double> normal;
        for (int64_t p = 0; p < out_pixels(); ++p)
            for (int64_t c = 0; c < used(); ++c) {
                grad.set(p * grad_pitch() + kBefore + c, normal(random));
                z.set(p * s.channels + c, s.mean + normal(random));
            }
        for (int64_t c = 0; c < used(); ++c) {
            norm.set(c, kGamma + 0.2 * normal(random));
            norm.set(s.channels + c, 0.3 * normal(random) - kGamma * s.mean);
            norm.set(2 * s.channels + c, s.mean + 0.1 * normal(random));
            norm.set(3 * s.channels + c, 0.1 * normal(random));
            norm.set(4 * s.channels + c, 0.1 * normal(random));
            centre.set(c, s.mean + 0.1 * normal(random));
        }
    }

    int64_t grad_pitch() const { return kBefore + sizes.channels + after; }
    double norm_at(int row, int64_t c) const { return norm[row * sizes.channels + c]; }

    // scale * z + shift before the output's ReLU, and the gradient of z.
    double output(int64_t p, int64_t c) const { return norm_at(0, c) * z[p * sizes.channels + c] + norm_at(1, c); }
    double incoming(int64_t p, int64_t c) const {
        const double passed = !relu || output(p, c) > 0 ? grad[p * grad_pitch() + kBefore + c] : 0;
        return norm_at(0, c) * (passed - norm_at(3, c) - norm_at(4, c) * (z[p * sizes.channels + c] - norm_at(2, c)));
    }
};

struct Result {
    Values x, weight, sum, product;
    bool pairs;  // of channels are read at once
    const char* error;

    explicit Result(const Given& given, bool backwards = false, bool sums = true)
        : x(given.dtype, given.sizes.samples * given.sizes.height * given.sizes.width * given.sizes.channels),
          weight(given.dtype, given.weight.size()),
          sum(test::statistics_of(given.dtype), given.sizes.channels),
          product(test::statistics_of(given.dtype), given.sizes.channels) {
        shim::backwards = backwards;
        Values workspace(DType::float64, cuda::depthwise_backward_workspace_bytes(given.arguments) / 8 + 1);
        const cuda::DepthwiseGradient gradient{given.grad.data() + Given::kBefore * item_size(given.dtype),
                                               given.grad_pitch(),
                                               given.z.data(),
                                               given.sizes.channels,
                                               given.norm.data(),
                                               given.relu,
                                               sums ? given.centre.data() : nullptr,
                                               given.stored,
                                               x.data(),
                                               weight.data(),
                                               sum.data(),
                                               product.data()};
        pairs = cuda::backward_has_pairs(given.arguments, gradient);
        error = cuda::depthwise_backward(given.arguments, gradient, workspace.data(), nullptr);
        CHECK(workspace.guarded() && x.guarded() && weight.guarded() && sum.guarded() && product.guarded());
    }
};

// A value and the size of the terms that were summed for it, which bounds what rounding can have done.
struct Sum {
    double value = 0, size = 0;
    void add(double term) {
        value += term;
        size += std::fabs(term);
    }
};

void check_gradients(const Given& given, const Result& result) {
    const Sizes& s = given.sizes;
    const int64_t channels = s.channels, taps = s.kernel * s.kernel, pixels = s.samples * s.height * s.width;
    std::vector<Sum> x(pixels * channels), weight(given.stored * taps);
    given.for_each_product([&](int64_t out, int64_t tap, int64_t in) {
        for (int64_t c = 0; c < given.used(); ++c) {
            const double dz = given.incoming(out, c);
            x[in * channels + c].add(dz * given.weight[c * taps + tap]);
            weight[c * taps + tap].add(dz * given.activated(in, c));
        }
    });
    // Rounding of dz and of the activation, relative to the largest terms in them, on top of that of the sums.
    const double unit = test::unit_of_sums(given.dtype) * 16, slack = unit * (1 + std::fabs(s.mean));
    for (int64_t c = 0; c < channels; ++c) {
        Sum sum, product;
        for (int64_t p = 0; p < pixels; ++p) {
            const Sum& wanted = x[p * channels + c];
            const bool present = c < given.used();
            const double value = present && (!s.relu || given.normal(p, c) > 0) ? wanted.value : 0;
            const double got = result.x[p * channels + c];
            CHECK_NEAR(got, value, present ? test::rounding(given.dtype, value) + (wanted.size + 1) * slack * 4 : 0);
            if (!present) continue;
            sum.add(value);
            product.add(value * (given.raw(p, c) - given.centre[c]));
            sum.size += wanted.size + 1, product.size += (wanted.size + 1) * (1 + std::fabs(s.mean));
        }
        CHECK_NEAR(result.sum[c], sum.value, sum.size * slack);
        CHECK_NEAR(result.product[c], product.value, product.size * slack);
    }
    for (int64_t c = 0; c < given.stored; ++c)
        for (int64_t tap = 0; tap < taps; ++tap) {
            const Sum& wanted = weight[c * taps + tap];
            CHECK_NEAR(result.weight[c * taps + tap], wanted.value,
                       c < given.used() ? test::rounding(given.dtype, wanted.value) + (wanted.size + 1) * slack : 0);
        }
}

}  // namespace

// Every path gives what double precision gives, whichever way the threads take turns; what does not belong to the layer
// is NaN and would show.
TEST(agrees_with_double_precision) {
    bool relu = false;
    for (const Sizes& sizes : spos::test::depthwise_sizes())
        for (const DType dtype : spos::test::kDTypes) {
            relu = !relu;
            const Given given(sizes, dtype, relu);
            const Result forwards(given), backwards(given, true);
            CHECK(forwards.error == nullptr && backwards.error == nullptr);
            check_gradients(given, forwards);
            CHECK(forwards.x.same_bits(backwards.x) && forwards.weight.same_bits(backwards.weight) &&
                  forwards.sum.same_bits(backwards.sum) && forwards.product.same_bits(backwards.product));
        }
}

// Every mask and affine form with every compiled kernel.
TEST(every_mask_agrees) {
    for (const int64_t kernel : {3, 5, 7})
        for (const int64_t stride : {1, 2})
            for (const bool affine : {false, true})
                for (const bool in_relu : {false, true})
                    for (const bool relu : {false, true}) {
                        const Given given({2, 8, 11, 4, kernel, stride, 0, 0, -1, affine, in_relu}, DType::float32,
                                          relu);
                        check_gradients(given, Result(given));
                    }
}

// A gradient whose pixels lie an odd number of elements apart cannot be read in pairs, and is not.
TEST(odd_pitches_are_read_one_by_one) {
    const Given given({1, 5, 9, 4, 3, 1}, DType::float16, true, 3), even({1, 5, 9, 4, 3, 1}, DType::float16, true);
    const Result result(given);
    CHECK(!result.pairs && Result(even).pairs);
    check_gradients(given, result);
}

// Several chunks of items, of which each thread has more than one; channels in several blocks.
TEST(many_blocks_agree) {
    const Given given({9, 24, 29, 66, 3, 1}, DType::float32, true);
    check_gradients(given, Result(given));
}

// The products are summed about the centre, so that a mean far from zero costs them little.
TEST(large_means_keep_the_products) {
    const Given given({2, 12, 14, 4, 3, 1, 0, 0, -1, true, false, 100}, DType::float32, true);
    check_gradients(given, Result(given));
}

// Without a centre there are no sums, and what would hold them is left alone.
TEST(sums_only_when_asked) {
    const Given given({1, 6, 7, 4, 3, 1}, DType::float32, true);
    const Result with(given), without(given, false, false);
    CHECK(with.x.same_bits(without.x) && with.weight.same_bits(without.weight));
    for (int64_t c = 0; c < 4; ++c) CHECK(std::isnan(without.sum[c]) && std::isnan(without.product[c]));
}

TEST(what_cannot_be_launched_is_refused) {
    Given given({1, 4, 4, 2, 3, 1}, DType::float32, true);
    given.arguments.kernel = 4;
    const Result result(given);
    CHECK(result.error != nullptr && std::strstr(result.error, "kernel must be odd") != nullptr);
    CHECK(std::isnan(result.x[0]) && std::isnan(result.weight[0]));
}

RUN_TESTS()
