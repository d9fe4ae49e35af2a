// The CUDA source of bn_act_cat and its backward sums, run on the CPU by cuda_shim.h, against double precision.
#include "device_values.h"
#include "kernels/cuda/bn_act_cat.cu"

namespace {

using namespace spos;
using spos::test::Values;

enum class Front { none, passing, scaled };

struct Sizes {
    int64_t pixels, channels, other_channels;
    int64_t z_after = 0, other_after = 0;  // channels behind the slice, which are NaN
};

Values statistics(DType dtype, int64_t size, double around, std::mt19937& random) {
    std::normal_distribution<double> normal;
    Values values(test::statistics_of(dtype), size);
    for (int64_t i = 0; i < size; ++i) values.set(i, around + 0.5 * normal(random));
    return values;
}

Values image(DType dtype, int64_t pixels, int64_t channels, int64_t pitch, double mean, std::mt19937& random) {
    std::normal_distribution<double> normal;
    Values values(dtype, pixels * pitch);
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; ++c) values.set(p * pitch + c, mean + normal(random));
    return values;
}

void check_join(const Sizes& s, DType dtype, Front front, bool relu) {
    std::mt19937 random(static_cast<unsigned>(s.pixels + s.channels));
    const int64_t z_pitch = s.channels + s.z_after, other_pitch = s.other_channels + s.other_after;
    const Values z = image(dtype, s.pixels, s.channels, z_pitch, 0, random);
    const Values other = image(dtype, s.pixels, s.other_channels, other_pitch, 0, random);
    const Values scale = statistics(dtype, s.channels, 1, random), shift = statistics(dtype, s.channels, 0, random);
    const Values other_scale = statistics(dtype, s.other_channels, 1, random);
    const Values other_shift = statistics(dtype, s.other_channels, 0, random);
    const bool scaled = front == Front::scaled, alone = front == Front::none;
    const cuda::BnActCat layer{dtype,
                               s.pixels,
                               s.channels,
                               z.data(),
                               z_pitch,
                               scale.data(),
                               shift.data(),
                               relu,
                               alone ? nullptr : other.data(),
                               other_pitch,
                               s.other_channels,
                               scaled ? other_scale.data() : nullptr,
                               scaled ? other_shift.data() : nullptr};
    const int64_t ahead = alone ? 0 : scaled ? s.other_channels : (s.other_channels + 1) / 2, all = ahead + s.channels;
    Values out(dtype, s.pixels * all);
    CHECK(cuda::bn_act_cat(layer, out.data(), nullptr) == nullptr);
    CHECK(out.guarded());
    const double unit = test::unit_of_sums(dtype);
    auto check = [&](double got, double value, double a, double b) {
        const double normal = a * value + b, wanted = relu && normal < 0 ? 0 : normal;
        CHECK_NEAR(got, wanted, test::rounding(dtype, wanted) + 4 * unit * (std::fabs(a * value) + std::fabs(b)));
    };
    for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = 0; c < all; ++c) {
            const double got = out[p * all + c];
            if (c >= ahead) {
                check(got, z[p * z_pitch + c - ahead], scale[c - ahead], shift[c - ahead]);
            } else if (scaled) {
                check(got, other[p * other_pitch + c], other_scale[c], other_shift[c]);
            } else {
                CHECK(got == other[p * other_pitch + 2 * c]);
            }
        }
}

struct Sums {
    Values sum, product;
};

Sums check_sums(const Sizes& s, DType dtype, bool relu, double mean, bool backwards) {
    std::mt19937 random(static_cast<unsigned>(s.pixels + s.channels));
    const int64_t z_pitch = s.channels + s.z_after, first = s.other_channels;
    const int64_t grad_pitch = first + s.channels + s.other_after;
    const Values z = image(dtype, s.pixels, s.channels, z_pitch, mean, random);
    Values grad(dtype, s.pixels * grad_pitch);
    std::normal_distribution<double> normal;
    for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = 0; c < s.channels; ++c) grad.set(p * grad_pitch + first + c, normal(random));
    const Values scale = statistics(dtype, s.channels, 1, random), shift = statistics(dtype, s.channels, -mean, random);
    const Values centre = statistics(dtype, s.channels, mean, random);
    const cuda::BnActSums layer{dtype,   s.pixels,     s.channels,   grad.at(first), grad_pitch, z.data(),
                                z_pitch, scale.data(), shift.data(), centre.data(),  relu};
    Sums result{Values(test::statistics_of(dtype), s.channels), Values(test::statistics_of(dtype), s.channels)};
    Values workspace(DType::float64, cuda::bn_act_sums_workspace_bytes(layer) / 8 + 1);
    shim::backwards = backwards;
    CHECK(cuda::bn_act_sums(layer, workspace.data(), result.sum.data(), result.product.data(), nullptr) == nullptr);
    CHECK(workspace.guarded() && result.sum.guarded() && result.product.guarded());
    const double unit = 32 * test::unit_of_sums(dtype);
    for (int64_t c = 0; c < s.channels; ++c) {
        double sum = 0, product = 0, size = 1, product_size = 1;
        for (int64_t p = 0; p < s.pixels; ++p) {
            const double value = z[p * z_pitch + c], g = grad[p * grad_pitch + first + c];
            const double passed = !relu || scale[c] * value + shift[c] > 0 ? g : 0;
            sum += passed, size += std::fabs(g);
            product += passed * (value - centre[c]), product_size += std::fabs(g * (value - centre[c]));
        }
        CHECK_NEAR(result.sum[c], sum, unit * size);
        CHECK_NEAR(result.product[c], product, unit * product_size);
    }
    return result;
}

// Vectors and single channels, odd numbers, one pixel, slices of wider images, more channels than a block.
constexpr Sizes kSizes[] = {{20, 16, 32},    {37, 8, 16},       {5, 5, 7},         {1, 3, 1},
                            {300, 1, 2},     {9, 16, 32, 8, 8}, {9, 16, 31, 0, 1}, {9, 12, 10, 3, 5},
                            {40, 640, 1280}, {700, 24, 16},     {3, 16, 30},       {1, 8, 48}};

}  // namespace

// Alone, behind the even channels and behind a scaled image, with every width of load.
TEST(joins_what_double_precision_joins) {
    for (const bool backwards : {false, true})
        for (const Sizes& sizes : kSizes)
            for (const DType dtype : spos::test::kDTypes)
                for (const Front front : {Front::none, Front::passing, Front::scaled}) {
                    shim::backwards = backwards;
                    check_join(sizes, dtype, front, sizes.pixels % 2 == 0);
                }
}

// Full width where all is aligned: this is what must not be lost by accident.
TEST(aligned_images_are_read_in_wide_vectors) {
    alignas(16) static char at[16];
    cuda::BnActCat layer{DType::float16, 10, 24, at, 24, at, at, true, at, 48, 48, nullptr, nullptr};
    CHECK(cuda::can_widen<__half>(layer, at) && !cuda::can_widen<__half>(layer, at + 2));
    layer.other_channels = 47;
    CHECK(!cuda::can_widen<__half>(layer, at));
    layer.other_channels = 44, layer.other_pitch = 44;  // 22 channels in front
    CHECK(!cuda::can_widen<__half>(layer, at));
}

// The sums are those of double precision, and the same bits whichever way the threads take turns.
TEST(sums_agree_with_double_precision) {
    for (const Sizes& sizes : kSizes)
        for (const DType dtype : spos::test::kDTypes) {
            const Sums forwards = check_sums(sizes, dtype, sizes.pixels % 2 == 1, 0, false);
            const Sums backwards = check_sums(sizes, dtype, sizes.pixels % 2 == 1, 0, true);
            CHECK(forwards.sum.same_bits(backwards.sum) && forwards.product.same_bits(backwards.product));
        }
}

// The products are summed about the mean, so that one far from zero costs them nothing.
TEST(large_means_keep_the_products) {
    for (const double mean : {10.0, 100.0}) check_sums({500, 8, 8}, DType::float32, false, mean, false);
}

TEST(what_cannot_be_launched_is_refused) {
    cuda::BnActCat layer{DType::float32, int64_t{1} << 30, 1, nullptr, 1,       nullptr, nullptr,
                         true,           nullptr,          0, 0,       nullptr, nullptr};
    CHECK(std::strstr(cuda::bn_act_cat(layer, nullptr, nullptr), "pixels must be below 2^30") != nullptr);
}

RUN_TESTS()
