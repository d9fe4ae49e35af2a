// The CUDA source of bn_merge and bn_finalize, run on the CPU by cuda_shim.h, against the formulas of the three modes.
#include <deque>

#include "device_values.h"
#include "kernels/cuda/bn_states.cu"

namespace {

using namespace spos;
using spos::test::Values;

Values numbers(DType dtype, int64_t size, double around, std::mt19937& random) {
    std::uniform_real_distribution<double> spread(-0.5, 0.5);
    Values values(dtype, size);
    for (int64_t i = 0; i < size; ++i) values.set(i, around + spread(random));
    return values;
}

const double* doubles(const Values& values) {
    return reinterpret_cast<const double*>(values.data());
}

// More layers than one launch takes; one value, odd numbers, more than all blocks of a layer take at once.
std::vector<int64_t> sizes() {
    std::vector<int64_t> found(2 * cuda::Layers<BnMerge>::kMost + 1, 3);
    found[0] = 1, found[1] = 257, found[2] = cuda::kThreads * cuda::kBlocksPerLayer + 5;
    return found;
}

enum class Mode { cumulative, pooled, ema };

void check_merge(Mode mode, bool first, bool wide) {
    std::mt19937 random(5);
    const DType dtype = wide ? DType::float64 : DType::float32;
    const int64_t done = 12, count = 9, batches = first ? 0 : 3;
    const double momentum = 0.2;
    std::deque<Values> mean, var, batch_mean, batch_m2, mean_out, var_out;
    std::vector<BnMerge> layers;
    for (const int64_t size : sizes()) {
        mean.push_back(numbers(DType::float64, size, 0, random)),
            var.push_back(numbers(DType::float64, size, 1, random));
        batch_mean.push_back(numbers(dtype, size, 0, random)), batch_m2.push_back(numbers(dtype, size, 1, random));
        mean_out.emplace_back(DType::float64, size), var_out.emplace_back(DType::float64, size);
        BnMerge layer{first ? nullptr : doubles(mean.back()),
                      first ? nullptr : doubles(var.back()),
                      batch_mean.back().data(),
                      batch_m2.back().data(),
                      reinterpret_cast<double*>(mean_out.back().data()),
                      reinterpret_cast<double*>(var_out.back().data()),
                      size,
                      0,
                      0,
                      0,
                      0,
                      0};
        if (mode == Mode::pooled)
            layer.pool(first ? 0 : done, count);
        else
            layer.average(mode == Mode::ema ? momentum : 1.0 / (batches + 1), count);
        layers.push_back(layer);
    }
    CHECK(cuda::bn_merge(layers, wide, nullptr) == nullptr);
    for (size_t l = 0; l < layers.size(); ++l) {
        CHECK(mean_out[l].guarded() && var_out[l].guarded());
        for (int64_t i = 0; i < layers[l].size; ++i) {
            const double m = first ? 0 : mean[l][i], v = first ? 1 : var[l][i];
            const double b = batch_mean[l][i], q = batch_m2[l][i];
            double wanted_mean, wanted_var;
            if (mode == Mode::pooled) {
                const double n = first ? 0 : done, delta = b - m;
                wanted_mean = (n * m + count * b) / (n + count);
                wanted_var = (first ? 0 : v) + q + delta * delta * n * count / (n + count);
            } else {
                const double weight = mode == Mode::ema ? momentum : 1.0 / (batches + 1);
                wanted_mean = (1 - weight) * m + weight * b;
                wanted_var = (1 - weight) * v + weight * q / (count - 1);
            }
            CHECK_NEAR(mean_out[l][i], wanted_mean, 1e-14);
            CHECK_NEAR(var_out[l][i], wanted_var, 1e-14);
        }
    }
}

}  // namespace

TEST(merges_by_the_formulas_of_the_modes) {
    for (const Mode mode : {Mode::cumulative, Mode::pooled, Mode::ema})
        for (const bool first : {false, true})
            for (const bool wide : {false, true}) check_merge(mode, first, wide);
}

// [rows, channels] with gamma and beta for each channel, or without; variances as they are, or second moments.
TEST(finalizes_in_double) {
    const double epsilon = 1e-3;
    for (const bool wide : {false, true})
        for (const bool affine : {false, true}) {
            std::mt19937 random(6);
            const DType dtype = wide ? DType::float64 : DType::float32;
            const int64_t channels = 7, rows = 80, size = rows * channels, count = 5;
            const Values mean = numbers(DType::float64, size, 0, random),
                         var = numbers(DType::float64, size, 1, random);
            const Values gamma = numbers(dtype, channels, 1, random), beta = numbers(dtype, channels, 0, random);
            Values scale(dtype, size), shift(dtype, size);
            BnFinalize layer{doubles(mean),
                             doubles(var),
                             affine ? gamma.data() : nullptr,
                             affine ? beta.data() : nullptr,
                             scale.data(),
                             shift.data(),
                             size,
                             channels,
                             1};
            if (wide) layer.from_second_moment(count);
            CHECK(cuda::bn_finalize({layer, layer}, wide, epsilon, nullptr) == nullptr);
            CHECK(scale.guarded() && shift.guarded());
            for (int64_t i = 0; i < size; ++i) {
                const double a =
                    (affine ? gamma[i % channels] : 1) / std::sqrt(var[i] / (wide ? count - 1 : 1) + epsilon);
                const double b = (affine ? beta[i % channels] : 0) - mean[i] * a;
                CHECK_NEAR(scale[i], a, test::rounding(dtype, a) + 1e-14);
                CHECK_NEAR(shift[i], b, test::rounding(dtype, b) + 1e-14);
            }
        }
}

RUN_TESTS()
