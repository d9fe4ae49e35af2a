// The unit's CPU kernels without torch: matrix products against plain sums, stores of halves, threads.
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/shuffle_unit.h"
#include "moments_cases.h"

namespace {

using namespace spos;
using namespace spos::cpu;

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

// A unit with more weights stored than used, NaN in the others, and everything that its passes write.
struct Unit {
    int64_t pixels, half, mid, made, kernel, stored;
    std::vector<float> x, pw1, dw, pw2, out, z1, z2, z3, mean, var, grad, dx, dpw1, ddw, dpw2, dgamma, dbeta;
    ShuffleUnit unit;

    Unit(int64_t samples, int64_t height, int64_t width, int64_t half, int64_t mid, int64_t made, int64_t kernel)
        : pixels(samples * height * width), half(half), mid(mid), made(made), kernel(kernel), stored(mid + 3) {
        x = normal(pixels * 2 * half, 1), grad = normal(pixels * (half + made), 2);
        pw1 = normal(stored * half, 3), dw = normal(stored * kernel * kernel, 4), pw2 = normal(made * stored, 5);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        std::fill(pw1.begin() + mid * half, pw1.end(), nan);
        std::fill(dw.begin() + mid * kernel * kernel, dw.end(), nan);
        for (int64_t o = 0; o < made; ++o) std::fill_n(pw2.begin() + o * stored + mid, stored - mid, nan);
        for (auto* to : {&z1, &z2}) to->assign(pixels * mid, nan);
        z3.assign(pixels * made, nan), out.assign(pixels * (half + made), nan), dx.assign(x.size(), nan);
        for (auto* to : {&mean, &var, &dgamma, &dbeta}) to->assign(2 * mid + made, nan);
        dpw1.assign(pw1.size(), nan), ddw.assign(dw.size(), nan), dpw2.assign(pw2.size(), nan);
        unit = {DType::float32, samples,  height,     width,     half,       mid,     made,    kernel,
                stored,         x.data(), pw1.data(), dw.data(), pw2.data(), nullptr, nullptr, 1e-5};
    }

    void run(const ParallelFor& parallel_for) {
        shuffle_unit_forward(unit,
                             {out.data(), z1.data(), z2.data(), z3.data(), {mid, mid, made}, mean.data(), var.data()},
                             parallel_for);
        shuffle_unit_backward(unit,
                              {grad.data(), z1.data(), z2.data(), z3.data(), mean.data(), var.data(), dx.data(),
                               dpw1.data(), ddw.data(), dpw2.data(), dgamma.data(), dbeta.data()},
                              parallel_for);
    }
    std::vector<const std::vector<float>*> results() const {
        return {&out, &z1, &z2, &z3, &mean, &var, &dx, &dpw1, &ddw, &dpw2, &dgamma, &dbeta};
    }
};

}  // namespace

// Every tile and every rest of rows and columns, both ways through A, with a start that is C itself.
TEST(products_are_sums) {
    for (const int64_t rows : {1, 3, 4, 14, 29, 112})
        for (const int64_t columns : {1, 16, 17, 40})
            for (const int64_t depth : {1, 7, 32})
                for (const bool transposed : {false, true}) {
                    const auto a = normal(rows * depth, 1), b = normal(depth * columns, 2);
                    const auto packed =
                        pack<float>(depth, columns, [&](int64_t k, int64_t j) { return b[k * columns + j]; });
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

// Everything is written, nothing outside of the slice is read, and gradients there are zero.
TEST(slices_are_closed) {
    for (const int64_t kernel : {1, 3, 5, 7, 9}) {
        Unit unit(2, 5, 6, 5, 19, 4, kernel);
        unit.run(run_serially);
        for (const auto* result : unit.results())
            for (const float value : *result) CHECK(std::isfinite(value));
        for (int64_t i = unit.mid * unit.half; i < unit.stored * unit.half; ++i) CHECK(unit.dpw1[i] == 0);
        for (int64_t o = 0; o < unit.made; ++o)
            for (int64_t m = unit.mid; m < unit.stored; ++m) CHECK(unit.dpw2[o * unit.stored + m] == 0);
    }
}

// The same bits for one thread and for one thread a task, several bands of rows included.
TEST(threads_do_not_change_a_bit) {
    for (const auto& [samples, side] : {std::pair{6, 15}, std::pair{1, 80}}) {
        Unit one(samples, side, side, 8, 40, 8, 3), many(samples, side, side, 8, 40, 8, 3);
        one.run(run_serially);
        many.run(one_thread_a_task);
        for (size_t i = 0; i < one.results().size(); ++i)
            CHECK(std::memcmp(one.results()[i]->data(), many.results()[i]->data(),
                              one.results()[i]->size() * sizeof(float)) == 0);
    }
}

RUN_TESTS()
