// Fused inference without torch, against plain loops in double.
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "check.h"
#include "csrc/cpu/unit_infer.h"
#include "moments_cases.h"

namespace {

using namespace spos;
using namespace spos::cpu;

template <typename T>
struct Stored;
template <>
struct Stored<float> {
    static constexpr DType dtype = DType::float32;
    static constexpr double tolerance = 2e-6;
    static float of(double value) { return static_cast<float>(value); }
};
template <>
struct Stored<double> {
    static constexpr DType dtype = DType::float64;
    static constexpr double tolerance = 1e-14;
    static double of(double value) { return value; }
};
template <>
struct Stored<Half> {
    static constexpr DType dtype = DType::float16;
    static constexpr double tolerance = 6e-4;
    static Half of(double value) { return {spos::test::to_half_bits(static_cast<float>(value))}; }
};
template <>
struct Stored<BFloat16> {
    static constexpr DType dtype = DType::bfloat16;
    static constexpr double tolerance = 5e-3;
    static BFloat16 of(double value) { return {spos::test::to_bfloat16_bits(static_cast<float>(value))}; }
};

// What a unit is made of, in one of the four types. `extra` weights are stored behind those that are used, all NaN.
struct Settings {
    int64_t samples, height, width, channels, mid, made, kernel, stride;
    bool split, xception;
    int64_t extra = 3;
    bool scaled = true;
};

struct Image {
    int64_t height, width, channels;
    std::vector<double> values;  // [pixel][channel]

    double at(int64_t y, int64_t x, int64_t c) const {
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        return inside ? values[(y * width + x) * channels + c] : 0;
    }
};

template <typename T>
class Unit {
    using Statistics = std::conditional_t<std::is_same_v<T, double>, double, float>;

  public:
    explicit Unit(const Settings& s) : s_(s), random_(7) {
        const int64_t half = s.split ? s.channels / 2 : s.channels;
        if (!s.split) begin_branch({{s.xception ? 3 : s.kernel, half}, {0, half}}, half);
        std::vector<std::pair<int64_t, int64_t>> main = {{0, s.mid}, {s.kernel, s.mid}, {0, s.made}};
        if (s.xception) main = {{3, half}, {0, s.mid}, {3, s.mid}, {0, s.mid}, {3, s.mid}, {0, s.made}};
        begin_branch(main, half);
        for (int64_t i = 0; i < s.samples * s.height * s.width * s.channels; ++i) x_.push_back(draw());
        for (int64_t i = 0; i < statistics_; ++i) {
            scale_.push_back(static_cast<Statistics>(s.scaled ? 0.5 + 0.25 * normal_(random_) : 1));
            shift_.push_back(static_cast<Statistics>(0.3 * normal_(random_)));
        }
    }

    std::vector<T> run(const ParallelFor& parallel_for) {
        UnitInference unit{Stored<T>::dtype, s_.samples, s_.height, s_.width,  s_.channels,
                           s_.stride,        s_.split,   {},        x_.data(), s_.scaled ? scale_.data() : nullptr,
                           shift_.data(),    nullptr};
        for (const auto& branch : branches_) {
            unit.branches.emplace_back();
            for (const Layer& layer : branch)
                unit.branches.back().push_back(
                    {layer.weights.data(), layer.pitch, layer.kernel, layer.channels, layer.first});
        }
        std::vector<T> out(s_.samples * unit.out_height() * unit.out_width() * unit.out_channels(),
                           Stored<T>::of(std::numeric_limits<double>::quiet_NaN()));
        unit.out = out.data();
        unit_infer(unit, parallel_for);
        return out;
    }

    // Largest difference from plain loops, relative to 1 and the value.
    double error(const std::vector<T>& out) const {
        double worst = 0;
        const int64_t image = s_.height * s_.width * s_.channels;
        auto at = out.begin();
        for (int64_t n = 0; n < s_.samples; ++n) {
            Image x{s_.height, s_.width, s_.channels, {}};
            for (int64_t i = 0; i < image; ++i) x.values.push_back(widen(x_[n * image + i]));
            std::vector<Image> parts;
            if (s_.split) parts.push_back(every_other(x, 0));
            for (const auto& branch : branches_) parts.push_back(apply(branch, s_.split ? every_other(x, 1) : x));
            for (int64_t pixel = 0; pixel < parts.back().height * parts.back().width; ++pixel)
                for (const Image& part : parts)
                    for (int64_t c = 0; c < part.channels; ++c, ++at) {
                        const double wanted = part.values[pixel * part.channels + c];
                        const double difference = std::fabs(widen(*at) - wanted) / (1 + std::fabs(wanted));
                        if (!(difference <= worst)) worst = difference;
                    }
        }
        return at == out.end() ? worst : 1e9;
    }

  private:
    struct Layer {
        int64_t kernel, in, channels, pitch, first;
        std::vector<T> weights;
    };

    T draw(double deviation = 1) { return Stored<T>::of(deviation * normal_(random_)); }

    void begin_branch(const std::vector<std::pair<int64_t, int64_t>>& layers, int64_t in) {
        branches_.emplace_back();
        const T nan = Stored<T>::of(std::numeric_limits<double>::quiet_NaN());
        for (const auto& [kernel, channels] : layers) {
            Layer layer{kernel, in, channels, in + s_.extra, statistics_, {}};
            const int64_t row = kernel ? kernel * kernel : layer.pitch, used = kernel ? row : in;
            layer.weights.assign((channels + s_.extra) * row, nan);
            for (int64_t o = 0; o < channels; ++o)
                for (int64_t k = 0; k < used; ++k) layer.weights[o * row + k] = draw(1 / std::sqrt(double(used)));
            branches_.back().push_back(layer);
            statistics_ += channels, in = channels;
        }
    }

    static Image every_other(const Image& x, int64_t first) {
        Image result{x.height, x.width, x.channels / 2, {}};
        for (size_t i = first; i < x.values.size(); i += 2) result.values.push_back(x.values[i]);
        return result;
    }

    Image apply(const std::vector<Layer>& layers, Image x) const {
        int64_t stride = s_.stride;
        for (const Layer& layer : layers) {
            const int64_t step = layer.kernel ? stride : 1;
            Image y{(x.height - 1) / step + 1, (x.width - 1) / step + 1, layer.channels, {}};
            for (int64_t row = 0; row < y.height; ++row)
                for (int64_t column = 0; column < y.width; ++column)
                    for (int64_t o = 0; o < layer.channels; ++o) {
                        double sum = 0;
                        for (int64_t k = 0; k < layer.kernel * layer.kernel; ++k)
                            sum += widen(layer.weights[o * layer.kernel * layer.kernel + k]) *
                                   x.at(row * step + k / layer.kernel - layer.kernel / 2,
                                        column * step + k % layer.kernel - layer.kernel / 2, o);
                        for (int64_t c = 0; c < layer.in && !layer.kernel; ++c)
                            sum += widen(layer.weights[o * layer.pitch + c]) * x.at(row, column, c);
                        sum = sum * scale_[layer.first + o] + shift_[layer.first + o];
                        y.values.push_back(layer.kernel || sum > 0 ? sum : 0);
                    }
            if (layer.kernel) stride = 1;
            x = y;
        }
        return x;
    }

    Settings s_;
    std::mt19937 random_;
    std::normal_distribution<double> normal_;
    int64_t statistics_ = 0;
    std::vector<std::vector<Layer>> branches_;
    std::vector<T> x_;
    std::vector<Statistics> scale_, shift_;
};

template <typename T>
void check_unit(const Settings& settings) {
    Unit<T> unit(settings);
    CHECK_NEAR(unit.error(unit.run(run_serially)), 0, Stored<T>::tolerance);
}

template <typename T>
void check_both(const Settings& settings) {
    for (const bool xception : {false, true}) {
        Settings own = settings;
        own.xception = xception;
        check_unit<T>(own);
    }
}

void one_thread_a_task(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> threads;
    for (int64_t task = tasks; task-- > 0;) threads.emplace_back(body, task, task + 1);
    for (std::thread& thread : threads) thread.join();
}

template <typename T>
void check_types() {
    for (const int64_t stride : {1, 2})
        for (const bool split : {true, false}) {
            if (split && stride == 2) continue;
            check_both<T>({2, 9, 7, 34, 21, 19, 5, stride, split, false});
            check_both<T>({1, 20, 18, 10, 6, 33, 3, stride, split, false});
        }
}

}  // namespace

// Every type, with and without projection and stride, channels that fill no pack; nothing outside of the slice is read
// (it is NaN), all of the output is written (it was NaN).
TEST(float32_is_right) {
    check_types<float>();
}
TEST(float64_is_right) {
    check_types<double>();
}
TEST(float16_is_right) {
    check_types<Half>();
}
TEST(bfloat16_is_right) {
    check_types<BFloat16>();
}

// Kernels with code of their own and without, larger than the image too, on images down to one pixel.
TEST(kernels_and_sizes_are_right) {
    for (const int64_t kernel : {1, 3, 5, 7, 9})
        for (const auto& [height, width] : {std::pair{1, 1}, std::pair{2, 3}, std::pair{5, 14}, std::pair{13, 25}})
            for (const int64_t stride : {1, 2}) {
                check_unit<float>({1, height, width, 6, 20, 5, kernel, stride, false, false});
                if (stride == 1) check_unit<float>({3, height, width, 6, 20, 5, kernel, 1, true, false});
            }
}

// Small images in groups, the last group smaller; large ones in bands of rows, and for many samples whole.
TEST(groups_and_bands_are_right) {
    check_both<float>({35, 4, 4, 12, 17, 6, 3, 1, true, false});
    check_both<float>({33, 6, 5, 12, 17, 6, 5, 2, false, false});
    check_both<float>({1, 40, 23, 8, 20, 4, 7, 1, true, false});
    check_both<float>({1, 64, 17, 6, 9, 4, 5, 2, false, false});
    check_both<float>({9, 17, 16, 8, 5, 4, 3, 1, true, false});
}

// Whole packs of output beyond what the caches keep are stored past them.
TEST(large_outputs_are_right) {
    check_unit<float>({1, 300, 120, 64, 3, 32, 3, 1, true, false});
}

// Batch normalisation that is in the weights already, and a slice of no channels: what is left is the shift.
TEST(absent_scale_and_absent_channels) {
    Settings settings{2, 6, 6, 8, 5, 4, 3, 1, true, false};
    settings.scaled = false;
    check_unit<float>(settings);
    settings.mid = 0;
    check_both<float>(settings);
}

// The same bits for one thread and for one thread a task: groups, bands, and panels of few small images.
TEST(threads_do_not_change_a_bit) {
    for (const Settings& settings :
         {Settings{20, 6, 6, 12, 40, 6, 3, 1, true, false}, Settings{1, 48, 20, 12, 40, 6, 5, 1, true, false},
          Settings{1, 14, 14, 40, 70, 66, 3, 1, true, true}, Settings{2, 14, 14, 40, 70, 66, 3, 2, false, false}}) {
        Unit<float> unit(settings);
        const auto one = unit.run(run_serially), many = unit.run(one_thread_a_task);
        CHECK(std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0);
    }
}

RUN_TESTS()
