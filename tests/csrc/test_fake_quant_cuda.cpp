// The CUDA source of fake_quant, run on the CPU by cuda_shim.h, against double precision.
#include "kernels/cuda/fake_quant.cu"
#include "quantizer_cases.h"

namespace {

using namespace spos;
using spos::cuda::QuantShape;
using spos::test::Quantizers;
using spos::test::Values;

// Around a load's width, more than a block, several chunks, columns, runs, and one step for all.
constexpr QuantShape kShapes[] = {{1, 1, 1},   {1, 1, 9001}, {1, 1, 4096}, {70, 24, 1}, {33, 5, 1},
                                  {9, 300, 1}, {1, 7, 72},   {3, 4, 16},   {2, 3, 35},  {5, 1, 8}};

Values random_values(DType dtype, int64_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    Values values(dtype, size);
    for (int64_t i = 0; i < size; ++i) values.set(i, normal(random));
    return values;
}

struct Result {
    Values out, grad_x, grad_step, grad_offset;

    bool same_bits(const Result& other) const {
        return out.same_bits(other.out) && grad_x.same_bits(other.grad_x) && grad_step.same_bits(other.grad_step) &&
               grad_offset.same_bits(other.grad_offset);
    }
};

Result run(DType dtype, const QuantShape& shape, const Quantizers& given, const Values& x, const Values& grad) {
    const cuda::FakeQuant call{dtype, shape, given.choice(), x.data()};
    const DType sums = test::statistics_of(dtype);
    Result made{Values(dtype, x.size()), Values(dtype, x.size()), Values(sums, 3 * given.channels),
                Values(sums, 3 * given.channels)};
    CHECK(cuda::fake_quant(call, made.out.data(), nullptr) == nullptr);
    Values workspace(DType::float32, cuda::fake_quant_backward_workspace_bytes(call) / 4);
    CHECK(cuda::fake_quant_backward(call, grad.data(), workspace.data(), made.grad_x.data(), made.grad_step.data(),
                                    made.grad_offset.data(), nullptr) == nullptr);
    CHECK(made.out.guarded() && made.grad_x.guarded() && made.grad_step.guarded() && made.grad_offset.guarded() &&
          workspace.guarded());
    return made;
}

void check(DType dtype, const QuantShape& shape, const Quantizers& given) {
    const Values x = random_values(dtype, shape.count(), 1), grad = random_values(dtype, shape.count(), 2);
    const Result made = run(dtype, shape, given, x, grad);
    const double unit = test::unit_of_sums(dtype);
    std::vector<double> step(given.channels), offset(given.channels), sizes(given.channels), doubt(given.channels);
    for (int64_t i = 0; i < x.size(); ++i) {
        const int c = static_cast<int>(i / shape.inner % shape.channels);
        const double v = given.position(x[i], c), g = grad[i], size = given.size(c);
        const double wanted = given.code(v) * size + given.beta(c);
        const bool undecided = dtype != DType::float64 && given.undecided(v), inside = given.inside(v);
        const double rounding =
            test::rounding(dtype, wanted) + 4 * unit * (std::fabs(given.code(v) * size) + std::fabs(given.beta(c)));
        CHECK_NEAR(made.out[i], wanted, rounding + (undecided ? 2 * size : 0));
        if (!undecided) CHECK(made.grad_x[i] == (inside ? g : 0));
        step[c] += g * given.share(v);
        offset[c] += inside ? 0 : g;
        // What one more level, a gradient let through or rounding in v may change.
        sizes[c] += std::fabs(g) * (std::fabs(v) + 1);
        if (undecided) doubt[c] += std::fabs(g) * given.high() * 2;
    }
    for (int k = 0; k < 3; ++k)
        for (int c = 0; c < given.channels; ++c) {
            const double factor = k == given.index ? given.factor(static_cast<double>(shape.per_channel())) : 0;
            const double sign = given.step[given.at(c)] < 0 ? -1 : 1;
            const double slack = factor * (32 * unit * sizes[c] + doubt[c]);
            CHECK_NEAR(made.grad_step[k * given.channels + c], sign * factor * step[c], slack);
            CHECK_NEAR(made.grad_offset[k * given.channels + c], given.with_offset ? factor * offset[c] : 0, slack);
        }
}

}  // namespace

// Every mode, sign and dtype in every layout; only the chosen step gets a gradient.
TEST(agrees_with_double_precision) {
    for (const DType dtype : test::kDTypes)
        for (const QuantShape& shape : kShapes)
            test::for_each_quantizer(dtype, static_cast<int>(shape.channels), shape.count() % 2 == 0,
                                     [&](const Quantizers& given) { check(dtype, shape, given); });
}

// Ties go to the even code, ends let no gradient pass, zero has the sign of a positive number.
TEST(ties_ends_and_zeros) {
    const QuantShape shape{1, 1, 8};
    Values x(DType::float32, 8), grad(DType::float32, 8);
    const double values[] = {0.5, 1.5, 2.5, -0.5, 0.0, 3.0, 2.75, -1.0};
    for (int i = 0; i < 8; ++i) x.set(i, values[i]), grad.set(i, 1);
    Quantizers given(DType::float32, 2, cuda::QuantMode::lsq, false, false, 1);
    given.step.set(1, 1.0);
    const Result made = run(DType::float32, shape, given, x, grad);
    const double codes[] = {0, 2, 2, 0, 0, 3, 3, 0}, passed[] = {1, 1, 1, 0, 0, 0, 1, 0};
    for (int i = 0; i < 8; ++i) CHECK(made.out[i] == codes[i] && made.grad_x[i] == passed[i]);
    Quantizers signs(DType::float32, 1, cuda::QuantMode::lsq, true, false, 1);
    signs.step.set(1, -0.25);
    const Result signed_made = run(DType::float32, shape, signs, x, grad);
    for (int i = 0; i < 8; ++i) CHECK(signed_made.out[i] == (values[i] < 0 ? -0.25 : 0.25));
}

// A NaN stays one, in its place, is outside (no gradient passes, the offset gets it) and shows in the step's gradient;
// a step of zero is taken for the least.
TEST(nan_and_zero_steps) {
    for (const QuantShape& shape : {QuantShape{1, 1, 64}, QuantShape{8, 8, 1}})
        for (const cuda::QuantMode mode :
             {cuda::QuantMode::pact, cuda::QuantMode::pact_residual, cuda::QuantMode::lsq}) {
            const bool with_signs = mode == cuda::QuantMode::lsq, with_offset = with_signs;
            Values x = random_values(DType::float16, 64, 1);
            const Values grad = random_values(DType::float16, 64, 2);
            x.set(9, std::numeric_limits<double>::quiet_NaN());
            Quantizers given(DType::float16, 1, mode, with_signs, with_offset, static_cast<int>(shape.channels));
            for (int c = 0; c < given.channels; ++c) given.step.set(given.at(c), 0);
            const Result made = run(DType::float16, shape, given, x, grad);
            for (int i = 0; i < 64; ++i) CHECK(std::isnan(made.out[i]) == (i == 9));
            for (int i = 0; i < 64; ++i) CHECK(std::isfinite(made.grad_x[i]));
            CHECK(made.grad_x[9] == 0);
            for (int c = 0; c < given.channels; ++c) {
                CHECK(std::isnan(made.grad_step[given.at(c)]) == (c == 9 % given.channels));
                CHECK(std::isfinite(made.grad_offset[given.at(c)]));
            }
        }
}

TEST(the_order_of_threads_changes_no_bit) {
    for (const QuantShape& shape : {QuantShape{1, 1, 9001}, QuantShape{70, 24, 1}, QuantShape{1, 7, 72}}) {
        const Values x = random_values(DType::float32, shape.count(), 1),
                     grad = random_values(DType::float32, x.size(), 2);
        const Quantizers given(DType::float32, 4, cuda::QuantMode::lsq, true, true, static_cast<int>(shape.channels));
        shim::backwards = false;
        const Result forwards = run(DType::float32, shape, given, x, grad);
        shim::backwards = true;
        CHECK(forwards.same_bits(run(DType::float32, shape, given, x, grad)));
        shim::backwards = false;
    }
}

// Full width where all is aligned, and never across the end of a run.
TEST(aligned_values_are_read_in_wide_vectors) {
    alignas(16) static char at[16];
    CHECK((cuda::can_widen<__half, 8>({1, 1, 64}, at, at)));
    CHECK((cuda::can_widen<__half, 8>({9, 24, 1}, at)) && !(cuda::can_widen<__half, 8>({9, 20, 1}, at)));
    CHECK(!(cuda::can_widen<__half, 8>({9, 8, 12}, at)) && !(cuda::can_widen<__half, 8>({1, 1, 64}, at, at + 2)));
}

TEST(what_cannot_be_launched_is_refused) {
    const Quantizers given(DType::float32, 4, cuda::QuantMode::lsq, true, false, 1);
    const cuda::FakeQuant call{DType::float32, {int64_t{1} << 30, 2, 1}, given.choice(), nullptr};
    const char* error = cuda::fake_quant(call, nullptr, nullptr);
    CHECK(error != nullptr && std::strstr(error, "below 2^30") != nullptr);
}

RUN_TESTS()
