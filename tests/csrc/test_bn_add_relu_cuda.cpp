// The CUDA source of bn_add_relu, run on the CPU by cuda_shim.h, against double precision.
#include "device_values.h"
#include "kernels/cuda/bn_add_relu.cu"

namespace {

using namespace spos;
using spos::test::Values;

struct Shape {
    int64_t groups, pixels, channels;
    int64_t count() const { return groups * pixels * channels; }
    int64_t values() const { return groups * channels; }
};
// Odd sizes, whole vectors, more than a block of channels, several chunks, groups.
constexpr Shape kShapes[] = {{1, 1, 1}, {1, 50, 24}, {2, 33, 5}, {1, 9, 300}, {3, 40, 16}, {2, 3000, 8}};

Values random_values(DType dtype, int64_t size, int seed, double around = 0, int64_t offset = 0) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    Values made(dtype, size, offset);
    for (int64_t i = 0; i < size; ++i) made.set(i, around + normal(random));
    return made;
}

struct Given {
    DType dtype;
    Shape shape;
    bool projected;
    Values x, residual, grad, scale, shift, residual_scale, residual_shift;

    // `offset`: elements from an aligned address to x.
    Given(DType dtype, Shape shape, bool projected, int64_t offset = 0)
        : dtype(dtype),
          shape(shape),
          projected(projected),
          x(random_values(dtype, shape.count(), 1, 0, offset)),
          residual(random_values(dtype, shape.count(), 2)),
          grad(random_values(dtype, shape.count(), 3)),
          scale(random_values(test::statistics_of(dtype), shape.values(), 4, 1)),
          shift(random_values(test::statistics_of(dtype), shape.values(), 5)),
          residual_scale(random_values(test::statistics_of(dtype), shape.values(), 6, 1)),
          residual_shift(random_values(test::statistics_of(dtype), shape.values(), 7)) {}

    cuda::BnAddRelu call() const {
        return {dtype,    shape.groups,    shape.pixels, shape.channels,
                x.data(), residual.data(), scale.data(), projected ? residual_scale.data() : nullptr};
    }
    double shortcut_scale(int64_t at) const { return projected ? residual_scale[at] : 1; }
    double shortcut_shift(int64_t at) const { return projected ? residual_shift[at] : 0; }
    // Where a group's channel has its values.
    int64_t at(int64_t i) const { return i / (shape.pixels * shape.channels) * shape.channels + i % shape.channels; }
};

struct Result {
    Values out, grad_x, grad_residual, grad_scale, grad_shift, grad_residual_scale;

    bool same_bits(const Result& other) const {
        return out.same_bits(other.out) && grad_x.same_bits(other.grad_x) &&
               grad_residual.same_bits(other.grad_residual) && grad_scale.same_bits(other.grad_scale) &&
               grad_shift.same_bits(other.grad_shift) && grad_residual_scale.same_bits(other.grad_residual_scale);
    }
};

Result run(const Given& given) {
    const DType sums = test::statistics_of(given.dtype);
    const int64_t count = given.shape.count(), values = given.shape.values();
    Result made{Values(given.dtype, count), Values(given.dtype, count), Values(given.dtype, count),
                Values(sums, values),       Values(sums, values),       Values(sums, given.projected ? values : 0)};
    cuda::BnAddRelu call = given.call();
    CHECK(cuda::bn_add_relu(call, given.shift.data(), given.projected ? given.residual_shift.data() : nullptr,
                            made.out.data(), nullptr) == nullptr);
    Values workspace(DType::float64, (cuda::bn_add_relu_backward_workspace_bytes(call) + 7) / 8);
    // A plain shortcut's values are not read.
    if (!given.projected) call.residual = nullptr;
    const cuda::BnAddReluGradients to{made.grad_x.data(), made.grad_residual.data(), made.grad_scale.data(),
                                      made.grad_shift.data(), made.grad_residual_scale.data()};
    CHECK(cuda::bn_add_relu_backward(call, given.grad.data(), made.out.data(), workspace.data(), to, nullptr) ==
          nullptr);
    for (const Values* written : {&made.out, &made.grad_x, &made.grad_residual, &made.grad_scale, &made.grad_shift,
                                  &made.grad_residual_scale, &workspace})
        CHECK(written->guarded());
    return made;
}

void check(const Given& given) {
    const Result made = run(given);
    const double unit = test::unit_of_sums(given.dtype);
    std::vector<double> scale(given.shape.values()), shift(scale), residual_scale(scale), sizes(scale);
    for (int64_t i = 0; i < given.shape.count(); ++i) {
        const int64_t at = given.at(i);
        const double x = given.x[i], residual = given.residual[i], a = given.scale[at], b = given.shift[at];
        const double c = given.shortcut_scale(at), d = given.shortcut_shift(at);
        const double wanted = std::max(a * x + b + c * residual + d, 0.0);
        const double size = std::fabs(a * x) + std::fabs(b) + std::fabs(c * residual) + std::fabs(d);
        CHECK_NEAR(made.out[i], wanted, test::rounding(given.dtype, wanted) + 8 * unit * size);
        // Within a rounding of 0 the mask is that of the result.
        const double passed = made.out[i] > 0 ? given.grad[i] : 0;
        CHECK_NEAR(made.grad_x[i], a * passed, test::rounding(given.dtype, a * passed) * (1 + 1e-6));
        CHECK_NEAR(made.grad_residual[i], c * passed, test::rounding(given.dtype, c * passed) * (1 + 1e-6));
        scale[at] += passed * x, shift[at] += passed, residual_scale[at] += passed * residual;
        sizes[at] += std::fabs(passed) * (1 + std::fabs(x) + std::fabs(residual));
    }
    for (int64_t i = 0; i < given.shape.values(); ++i) {
        CHECK_NEAR(made.grad_scale[i], scale[i], 32 * unit * sizes[i]);
        CHECK_NEAR(made.grad_shift[i], shift[i], 32 * unit * sizes[i]);
        if (given.projected) CHECK_NEAR(made.grad_residual_scale[i], residual_scale[i], 32 * unit * sizes[i]);
    }
}

}  // namespace

// Every dtype, load width, odd size and group, with and without a batch norm in the shortcut.
TEST(agrees_with_double_precision) {
    for (const DType dtype : test::kDTypes)
        for (const Shape& shape : kShapes)
            for (const bool projected : {false, true}) check(Given(dtype, shape, projected));
    check(Given(DType::float16, {2, 64, 16}, true, 1));
}

// Nothing of a group depends on what else is in the batch, also where kBlocks decides how many chunks there are.
TEST(a_group_has_the_bits_of_a_call_of_its_own) {
    const Shape shape{1, 500, 601};
    const Given given(DType::float32, {2, shape.pixels, shape.channels}, true);
    const Result both = run(given);
    Given second(DType::float32, shape, true);
    auto second_half = [](const Values& from, Values& to) {
        for (int64_t i = 0; i < to.size(); ++i) to.set(i, from[to.size() + i]);
    };
    second_half(given.x, second.x), second_half(given.residual, second.residual), second_half(given.grad, second.grad);
    second_half(given.scale, second.scale), second_half(given.shift, second.shift);
    second_half(given.residual_scale, second.residual_scale);
    second_half(given.residual_shift, second.residual_shift);
    const Result alone = run(second);
    Result half = run(second);
    second_half(both.out, half.out), second_half(both.grad_x, half.grad_x);
    second_half(both.grad_residual, half.grad_residual), second_half(both.grad_scale, half.grad_scale);
    second_half(both.grad_shift, half.grad_shift), second_half(both.grad_residual_scale, half.grad_residual_scale);
    CHECK(alone.same_bits(half));
}

// Full width where all is aligned: this is what must not be lost by accident.
TEST(aligned_images_are_read_in_wide_vectors) {
    alignas(16) static char at[16];
    cuda::BnAddRelu call{DType::float16, 1, 9, 24, at, at, at, at};
    CHECK(cuda::can_widen<__half>(call, at, at) && !cuda::can_widen<__half>(call, at, at + 2));
    call.channels = 20;
    CHECK(!cuda::can_widen<__half>(call, at) && cuda::can_widen<float>(call, at));
}

// ReLU swallows no NaN, forwards or backwards: its place in the result is NaN, and the gradient passes there.
TEST(nan_stays_where_it_is) {
    for (const bool projected : {false, true})
        for (const bool in_shortcut : {false, true}) {
            Given given(DType::bfloat16, {2, 50, 24}, projected);
            const int64_t at = 71 * 24 + 5;
            (in_shortcut ? given.residual : given.x).set(at, std::numeric_limits<double>::quiet_NaN());
            const Result made = run(given);
            for (int64_t i = 0; i < made.out.size(); ++i) CHECK(std::isnan(made.out[i]) == (i == at));
            CHECK(std::isfinite(made.grad_x[at]) && made.grad_x[at] != 0);
            for (int64_t i = 0; i < made.grad_scale.size(); ++i) {
                CHECK(std::isnan(made.grad_scale[i]) == (!in_shortcut && i == 24 + 5));
                if (projected) CHECK(std::isnan(made.grad_residual_scale[i]) == (in_shortcut && i == 24 + 5));
            }
        }
}

TEST(the_order_of_threads_changes_no_bit) {
    const Given given(DType::float32, {2, 3000, 8}, true);
    const Result forwards = run(given);
    shim::backwards = true;
    CHECK(forwards.same_bits(run(given)));
    shim::backwards = false;
}

TEST(what_cannot_be_launched_is_refused) {
    const cuda::BnAddRelu call{DType::float32, 65536, 1, 1, nullptr, nullptr, nullptr, nullptr};
    const char* error = cuda::bn_add_relu(call, nullptr, nullptr, nullptr, nullptr);
    CHECK(error != nullptr && std::strstr(error, "groups must be below 65536") != nullptr);
    error = cuda::bn_add_relu_backward(call, nullptr, nullptr, nullptr, {}, nullptr);
    CHECK(error != nullptr && std::strstr(error, "groups must be below 65536") != nullptr);
}

RUN_TESTS()
