// The unit's CPU kernels without torch: matrix products against plain sums, stores of halves, threads.
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/unit.h"
#include "moments_cases.h"
#include "plain_unit.h"

namespace {

using namespace spos;
using namespace spos::cpu;
using spos::test::PlainUnit, spos::test::Values;

std::vector<float> normal(int64_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> values;
    std::vector<float> result(size);
    for (float& value : result) value = values(random);
    return result;
}

void one_thread_a_task(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t task = tasks; task-- > 0;) threads.emplace_back(body, task, task + 1);
    for (std::thread& thread : threads) thread.join();
}

template <typename T>
constexpr DType kDType = std::is_same_v<T, double>     ? DType::float64
                         : std::is_same_v<T, float>    ? DType::float32
                         : std::is_same_v<T, BFloat16> ? DType::bfloat16
                                                       : DType::float16;

template <typename T>
T stored(double value) {
    if constexpr (std::is_same_v<T, BFloat16>)
        return {spos::test::to_bfloat16_bits(static_cast<float>(value))};
    else if constexpr (std::is_same_v<T, Half>)
        return {spos::test::to_half_bits(static_cast<float>(value))};
    else
        return static_cast<T>(value);
}

template <typename T>
std::vector<T> random(int64_t size, unsigned seed, double scale = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<double> values(0, scale);
    std::vector<T> result(size);
    for (T& value : result) value = stored<T>(values(random));
    return result;
}

template <typename T>
Values widened(const std::vector<T>& values) {
    Values result;
    for (const T value : values) result.push_back(widen(value));
    return result;
}

struct Given {
    UnitShape shape;
    int64_t kernel;
};

// A unit with NaN in the weights that are stored but not used, and everything that its passes write, NaN as well.
template <typename T>
struct Run {
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

    UnitShape shape;
    Unit unit;
    std::vector<T> x, grad, out, saved, x_gradient;
    std::vector<std::vector<T>> weights, weight_gradients;
    std::vector<A> gamma, beta, mean, var, gamma_gradient, beta_gradient;

    Run(const Given& given, bool affine) : shape(given.shape) {
        shape.dtype = kDType<T>;
        // Of Xception's depthwise layers the one in the middle has a kernel of its own.
        std::vector<Weight> pointers(8, {nullptr, given.kernel});
        pointers[2].kernel = shape.kind == UnitKind::xception ? 3 : 1;
        if (shape.kind == UnitKind::shuffle) pointers[0].kernel = 1;
        const Unit sizes = unit_of(shape, pointers);
        unsigned seed = 1;
        for (const Layer* layer : sizes.layers()) {
            const double fan = layer->depthwise ? layer->kernel * layer->kernel : layer->in;
            auto weight = random<T>(layer->rows * layer->row, seed++, 1 / std::sqrt(fan));
            for (int64_t i = 0; i < layer->rows * layer->row; ++i)
                if (i / layer->row >= layer->out || (!layer->depthwise && i % layer->row >= layer->in))
                    weight[i] = stored<T>(kNaN);
            weights.push_back(weight);
            weight_gradients.emplace_back(weight.size(), stored<T>(kNaN));
        }
        for (size_t i = 0; i < weights.size(); ++i) pointers[i].data = weights[i].data();
        unit = unit_of(shape, pointers);
        x = random<T>(unit.samples * unit.height * unit.width * unit.channels, seed++);
        grad = random<T>(unit.samples * unit.out_height() * unit.out_width() * unit.out_channels(), seed++);
        if (affine) gamma = random<A>(unit.normalised(), seed++), beta = random<A>(unit.normalised(), seed++);
        unit.x = x.data();
        unit.gamma = affine ? gamma.data() : nullptr, unit.beta = affine ? beta.data() : nullptr;
        out.assign(grad.size(), stored<T>(kNaN)), x_gradient.assign(x.size(), stored<T>(kNaN));
        saved.assign(unit.saved_size(), stored<T>(kNaN));
        for (auto* to : {&mean, &var, &gamma_gradient, &beta_gradient}) to->assign(unit.normalised(), A(kNaN));
    }
    Run(const Run&) = delete;

    void forward(const ParallelFor& parallel_for, bool save) {
        unit_forward(unit, {out.data(), save ? saved.data() : nullptr, mean.data(), var.data()}, parallel_for);
    }
    void run(const ParallelFor& parallel_for) {
        forward(parallel_for, true);
        std::vector<void*> gradients;
        for (auto& gradient : weight_gradients) gradients.push_back(gradient.data());
        unit_backward(unit,
                      {grad.data(), saved.data(), mean.data(), var.data(), x_gradient.data(), gradients,
                       gamma_gradient.data(), beta_gradient.data()},
                      parallel_for);
    }
};

// The distance of two vectors over the length of the wanted one.
template <typename T>
double error(const std::vector<T>& got, const Values& wanted) {
    double distance = 0, length = 1e-30;
    for (size_t i = 0; i < wanted.size(); ++i)
        distance += std::pow(widen(got[i]) - wanted[i], 2), length += wanted[i] * wanted[i];
    return got.size() == wanted.size() ? std::sqrt(distance / length) : 1;
}

std::vector<Given> every_kind() {
    constexpr auto kShuffle = UnitKind::shuffle, kXception = UnitKind::xception;
    constexpr auto kAny = DType::float32;
    // Samples, height, width, channels, projects, mid, used, stored, made, stride; kernel.
    return {
        {{kShuffle, kAny, 2, 5, 6, 10, false, 19, 19, 22, 4, 1}, 3},
        {{kShuffle, kAny, 2, 9, 17, 36, false, 40, 33, 40, 18, 1}, 5},
        {{kShuffle, kAny, 3, 7, 7, 64, false, 32, 32, 32, 32, 1}, 7},
        {{kShuffle, kAny, 3, 4, 5, 6, false, 7, 7, 8, 5, 1}, 9},
        {{kShuffle, kAny, 2, 8, 6, 7, true, 20, 20, 20, 9, 2}, 1},
        {{kShuffle, kAny, 2, 8, 8, 16, true, 24, 20, 30, 48, 2}, 3},
        {{kShuffle, kAny, 2, 9, 11, 20, true, 33, 33, 33, 35, 2}, 5},
        {{kShuffle, kAny, 2, 15, 14, 16, true, 17, 17, 18, 16, 2}, 7},
        {{kShuffle, kAny, 1, 9, 8, 5, true, 6, 6, 6, 7, 2}, 9},
        {{kShuffle, kAny, 2, 6, 7, 12, true, 18, 18, 18, 7, 1}, 5},
        {{kXception, kAny, 2, 6, 5, 34, false, 20, 20, 23, 17, 1}, 3},
        {{kXception, kAny, 2, 7, 7, 64, false, 40, 30, 40, 32, 1}, 3},
        {{kXception, kAny, 2, 9, 8, 18, true, 21, 21, 21, 40, 2}, 5},
        {{kXception, kAny, 2, 8, 7, 16, true, 24, 9, 30, 16, 2}, 3},
        {{kXception, kAny, 3, 5, 6, 7, true, 10, 10, 10, 9, 1}, 7},
        {{kShuffle, kAny, 1, 75, 60, 8, true, 20, 20, 20, 8, 2}, 3},  // several bands of rows, as in the next one
        {{kXception, kAny, 1, 80, 70, 8, false, 6, 6, 6, 4, 1}, 3},
        {{kShuffle, kAny, 9, 1, 3, 8, true, 6, 6, 6, 4, 2}, 5},
    };
}

// Errors of everything that both passes make, at most `tolerance`; gradients' at most ten times that, for ReLU is all
// or nothing where rounding moves a value across zero.
template <typename T>
void check_against_plain(const Given& shape, bool affine, double tolerance, double gradient_tolerance) {
    Run<T> run(shape, affine);
    run.run(run_serially);
    PlainUnit plain(run.unit, widened(run.gamma), widened(run.beta),
                    [&](int64_t which, int64_t at) { return widen(run.weights[which][at]); });
    plain.run(widened(run.x), widened(run.grad));
    CHECK_NEAR(error(run.out, plain.out), 0, tolerance);
    CHECK_NEAR(error(run.mean, plain.mean), 0, tolerance);
    CHECK_NEAR(error(run.var, plain.var), 0, tolerance);
    CHECK_NEAR(error(run.x_gradient, plain.x_gradient), 0, gradient_tolerance);
    CHECK_NEAR(error(run.gamma_gradient, plain.gamma_gradient), 0, gradient_tolerance);
    CHECK_NEAR(error(run.beta_gradient, plain.beta_gradient), 0, gradient_tolerance);
    size_t index = 0;
    for (const auto* chain : {&plain.main, &plain.projection})
        for (const auto& layer : *chain) {
            // Zero outside of what is used.
            Values wanted(run.weights[index].size());
            const int64_t columns = layer.layer.depthwise ? layer.layer.row : layer.layer.in;
            for (size_t i = 0; i < layer.weight_gradient.size(); ++i)
                wanted[i / columns * layer.layer.row + i % columns] = layer.weight_gradient[i];
            for (size_t i = 0; i < wanted.size(); ++i)
                CHECK(int64_t(i) / layer.layer.row < layer.layer.out || widen(run.weight_gradients[index][i]) == 0);
            CHECK_NEAR(error(run.weight_gradients[index++], wanted), 0, gradient_tolerance);
        }
    Run<T> unsaved(shape, affine);
    unsaved.forward(run_serially, false);
    CHECK(std::memcmp(run.out.data(), unsaved.out.data(), run.out.size() * sizeof(T)) == 0);
}

}  // namespace

// Every tile and every rest of rows and columns, both ways through A, with a start that is C itself.
TEST(products_are_sums) {
    for (const int64_t rows : {1, 3, 4, 14, 29, 112})
        for (const int64_t columns : {1, 16, 17, 40})
            for (const int64_t depth : {1, 7, 32})
                for (const bool transposed : {false, true}) {
                    const auto a = normal(rows * depth, 1), b = normal(depth * columns, 2);
                    const auto packed = pack_rows<float>(b.data(), columns, depth, columns);
                    const int64_t pitch = packed.packs() * kPack;
                    std::vector<float> c(rows * pitch, 0.5f);
                    for (int64_t panel = 0; panel < packed.panels(); ++panel) {
                        const int64_t packs = packed.packs_of(panel);
                        float* to = c.data() + panel * panel_packs() * kPack;
                        multiply(Product<float>{a.data(), transposed ? 1 : depth, transposed ? rows : 1,
                                                packed.panel(panel), packs * kPack, rows, packs, depth, to, pitch, to,
                                                pitch});
                    }
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t j = 0; j < columns; ++j) {
                            double sum = 0.5;
                            for (int64_t k = 0; k < depth; ++k)
                                sum += double(a[transposed ? k * rows + i : i * depth + k]) * b[k * columns + j];
                            CHECK_NEAR(c[i * pitch + j], sum, 1e-5 * (1 + std::fabs(sum)));
                        }
                }
}

// Stores of 16-bit floats round as the tests' own conversion does, and keep what is special.
TEST(halves_are_stored_rounded) {
    const float inf = std::numeric_limits<float>::infinity();
    FloatPack pack = {0.0f,    1.0f,    -1.5f,      0.1f,     65504.0f, -3.14159f, 1e-3f, 2049.0f,
                      2051.0f, 6.2e-5f, 1.0009765f, 70000.0f, inf,      -inf,      1e-7f, 3.0e-5f};
    Half halves[kPack];
    BFloat16 brains[kPack];
    store_pack(halves, pack);
    store_pack(brains, pack);
    for (int j = 0; j < 11; ++j) CHECK(halves[j].bits == spos::test::to_half_bits(pack[j]));
    for (int j = 0; j < 16; ++j) CHECK(brains[j].bits == spos::test::to_bfloat16_bits(pack[j]));
    CHECK(std::isinf(widen(halves[11])) && std::isinf(widen(halves[12])) && widen(halves[13]) == -inf);
    CHECK_NEAR(widen(halves[14]), 1e-7, 3e-8);  // below the normal halves: steps of 2^-24
    CHECK_NEAR(widen(halves[15]), 3e-5, 3e-8);
    pack[3] = std::numeric_limits<float>::quiet_NaN();
    store_pack(halves, pack);
    store_pack(brains, pack);
    CHECK(std::isnan(widen(halves[3])) && std::isnan(widen(brains[3])));
}

// Everything is right, nothing outside of the slice is read, and gradients there are zero.
TEST(units_are_what_plain_loops_make) {
    for (const Given& shape : every_kind())
        for (const bool affine : {false, true}) check_against_plain<double>(shape, affine, 1e-12, 1e-11);
}

// Not of a 1x1 depthwise kernel: BN takes its scale away, and what is left of its gradient is rounding.
TEST(float32_units_are_near) {
    for (const Given& shape : every_kind())
        if (shape.kernel > 1) check_against_plain<float>(shape, true, 2e-6, 3e-3);
}

// Inner layers are rounded to 16 bits.
TEST(units_of_16_bits_are_near) {
    const auto shapes = every_kind();
    for (const size_t i : {1, 6, 11, 12}) {
        check_against_plain<Half>(shapes[i], false, 4e-3, 0.12);
        check_against_plain<BFloat16>(shapes[i], false, 3e-2, 0.35);
    }
}

// The same bits for one thread and for one thread a task, several bands of rows included.
TEST(threads_do_not_change_a_bit) {
    for (const Given& shape : every_kind()) {
        Run<float> one(shape, true), many(shape, true);
        one.run(run_serially);
        many.run(one_thread_a_task);
        auto same = [](const auto& a, const auto& b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        CHECK(same(one.out, many.out) && same(one.mean, many.mean) && same(one.var, many.var));
        CHECK(same(one.x_gradient, many.x_gradient));
        CHECK(same(one.gamma_gradient, many.gamma_gradient) && same(one.beta_gradient, many.beta_gradient));
        for (size_t i = 0; i < one.weight_gradients.size(); ++i)
            CHECK(same(one.weight_gradients[i], many.weight_gradients[i]));
    }
}

RUN_TESTS()
