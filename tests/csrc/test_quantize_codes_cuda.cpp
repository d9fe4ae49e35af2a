// The CUDA source of quantize_codes, run on the CPU by cuda_shim.h, against double precision.
#include "kernels/cuda/quantize_codes.cu"
#include "quantizer_cases.h"

namespace {

using namespace spos;
using spos::test::Quantizers;
using spos::test::Values;

struct Shape {
    int64_t pixels, channels, pitch;
};
// Odd sizes, whole vectors, slices of something wider, more than a block and several chunks.
constexpr Shape kShapes[] = {{1, 1, 1}, {50, 24, 24}, {33, 5, 9}, {9, 300, 300}, {40, 16, 32}, {3000, 8, 8}};

struct Given {
    DType dtype;
    Shape shape;
    Values x, grad, scale, shift;
    bool affine;

    Given(DType dtype, Shape shape, bool affine)
        : dtype(dtype),
          shape(shape),
          x(dtype, shape.pixels * shape.pitch),
          grad(dtype, shape.pixels * shape.pitch),
          scale(test::statistics_of(dtype), shape.channels),
          shift(test::statistics_of(dtype), shape.channels),
          affine(affine) {
        std::mt19937 random(3);
        std::normal_distribution<double> normal;
        // What stands between the channels of a slice stays NaN.
        for (int64_t p = 0; p < shape.pixels; ++p)
            for (int64_t c = 0; c < shape.channels; ++c) {
                x.set(p * shape.pitch + c, normal(random));
                grad.set(p * shape.pitch + c, normal(random));
            }
        for (int64_t c = 0; c < shape.channels; ++c)
            scale.set(c, 1 + 0.2 * normal(random)), shift.set(c, normal(random));
    }

    cuda::QuantizeCodes call(const Quantizers& quantizer) const {
        return {dtype,
                shape.pixels,
                shape.channels,
                x.data(),
                shape.pitch,
                affine ? scale.data() : nullptr,
                affine ? shift.data() : nullptr,
                quantizer.choice()};
    }
    double a(int64_t c) const { return affine ? scale[c] : 1; }
    double b(int64_t c) const { return affine ? shift[c] : 0; }
};

struct Result {
    std::vector<uint8_t> codes;
    Values step_used, grad_x, grad_step, grad_scale, grad_shift;

    bool same_bits(const Result& other) const {
        return codes == other.codes && step_used.same_bits(other.step_used) && grad_x.same_bits(other.grad_x) &&
               grad_step.same_bits(other.grad_step) && grad_scale.same_bits(other.grad_scale) &&
               grad_shift.same_bits(other.grad_shift);
    }
};

Result run(const Given& given, const Quantizers& quantizer) {
    const cuda::QuantizeCodes call = given.call(quantizer);
    const DType sums = test::statistics_of(given.dtype);
    const int64_t channels = given.shape.channels, count = given.shape.pixels * channels;
    Result made{std::vector<uint8_t>(count + 64, 0x5a),
                Values(sums, 1),
                Values(given.dtype, count),
                Values(sums, 3),
                Values(sums, channels),
                Values(sums, channels)};
    CHECK(cuda::quantize_codes(call, made.codes.data(), made.step_used.data(), nullptr) == nullptr);
    CHECK(std::all_of(made.codes.end() - 64, made.codes.end(), [](uint8_t code) { return code == 0x5a; }));
    Values workspace(DType::float64, (cuda::quantize_codes_backward_workspace_bytes(call) + 7) / 8);
    CHECK(cuda::quantize_codes_backward(call, given.grad.data(), given.shape.pitch, workspace.data(),
                                        made.grad_x.data(), made.grad_step.data(), made.grad_scale.data(),
                                        made.grad_shift.data(), nullptr) == nullptr);
    for (const Values* values : {&made.step_used, &made.grad_x, &made.grad_step, &made.grad_scale, &made.grad_shift})
        CHECK(values->guarded());
    CHECK(workspace.guarded());
    return made;
}

void check(const Given& given, const Quantizers& quantizer) {
    const Result made = run(given, quantizer);
    const auto [pixels, channels, pitch] = given.shape;
    const double unit = test::unit_of_sums(given.dtype), size = quantizer.size(0);
    CHECK_NEAR(made.step_used[0], size, 2 * unit * size);
    double step = 0, slack = 0;
    for (int64_t c = 0; c < channels; ++c) {
        double scale = 0, shift = 0, sizes = 0, doubt = 0;
        for (int64_t p = 0; p < pixels; ++p) {
            const double x = given.x[p * pitch + c], g = given.grad[p * pitch + c];
            const double v = quantizer.position(given.a(c) * x + given.b(c), 0);
            const bool inside = quantizer.inside(v),
                       undecided = given.dtype != DType::float64 && quantizer.undecided(v);
            CHECK_NEAR(made.codes[p * channels + c], quantizer.code(v), undecided ? 1 : 0);
            const double grad_x = inside ? g * given.a(c) : 0;
            if (!undecided)
                CHECK_NEAR(made.grad_x[p * channels + c], grad_x, test::rounding(given.dtype, grad_x) * (1 + 1e-6));
            scale += inside ? g * x : 0, shift += inside ? g : 0, step += g * quantizer.share(v);
            sizes += std::fabs(g) * (std::fabs(x) + 1);
            slack += 32 * unit * std::fabs(g) * (std::fabs(v) + 1) * (1 + std::fabs(given.b(c)) / size);
            if (undecided) doubt += std::fabs(g) * (std::fabs(x) + 1), slack += 2 * std::fabs(g) * quantizer.high();
        }
        CHECK_NEAR(made.grad_scale[c], given.affine ? scale : 0, 32 * unit * sizes + doubt);
        CHECK_NEAR(made.grad_shift[c], given.affine ? shift : 0, 32 * unit * sizes + doubt);
    }
    const double factor = quantizer.factor(static_cast<double>(pixels * channels));
    const double sign = quantizer.step[1] < 0 ? -1 : 1;
    CHECK_NEAR(made.grad_step[1], sign * factor * step, factor * slack);
    CHECK(made.grad_step[0] == 0 && made.grad_step[2] == 0);
}

}  // namespace

// Every mode and dtype, slices, with and without scale and shift.
TEST(agrees_with_double_precision) {
    for (const DType dtype : test::kDTypes)
        for (const Shape& shape : kShapes)
            for (const bool affine : {false, true}) {
                const Given given(dtype, shape, affine);
                test::for_each_quantizer(dtype, 1, false, [&](const Quantizers& quantizer) {
                    if (!quantizer.with_signs) check(given, quantizer);
                });
            }
}

// The code of a NaN is 0, and the step says that there was one: no product of the two hides it. Backwards a NaN is
// outside: no gradient passes, and the step's becomes NaN.
TEST(nan_shows_in_the_step) {
    for (const cuda::QuantMode mode : {cuda::QuantMode::pact, cuda::QuantMode::pact_residual, cuda::QuantMode::lsq}) {
        Given given(DType::float16, {50, 24, 24}, true);
        given.x.set(17 * 24 + 5, std::numeric_limits<double>::quiet_NaN());
        const Quantizers quantizer(DType::float16, 4, mode, false, false, 1);
        const Result made = run(given, quantizer);
        CHECK(made.codes[17 * 24 + 5] == 0 && std::isnan(made.step_used[0]) && std::isnan(made.grad_step[1]));
        CHECK(made.grad_x[17 * 24 + 5] == 0);
        for (int64_t i = 0; i < made.grad_x.size(); ++i) CHECK(std::isfinite(made.grad_x[i]));
        for (int64_t c = 0; c < 24; ++c)
            CHECK(std::isnan(made.grad_scale[c]) == (c == 5) && std::isfinite(made.grad_shift[c]));
    }
}

TEST(the_order_of_threads_changes_no_bit) {
    const Given given(DType::float32, {3000, 8, 8}, true);
    const Quantizers quantizer(DType::float32, 4, cuda::QuantMode::lsq, false, false, 1);
    const Result forwards = run(given, quantizer);
    shim::backwards = true;
    CHECK(forwards.same_bits(run(given, quantizer)));
    shim::backwards = false;
}

TEST(what_cannot_be_launched_is_refused) {
    const Quantizers quantizer(DType::float32, 4, cuda::QuantMode::lsq, false, false, 1);
    cuda::QuantizeCodes call = Given(DType::float32, {1, 1, 1}, false).call(quantizer);
    call.pixels = int64_t{1} << 30;
    const char* error = cuda::quantize_codes(call, nullptr, nullptr, nullptr);
    CHECK(error != nullptr && std::strstr(error, "below 2^30") != nullptr);
}

RUN_TESTS()
