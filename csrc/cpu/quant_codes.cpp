// Pixels in blocks that stay in the first-level cache; in a block, a few packs of channels at a time go down its
// pixels, so that scale, shift and sums stay in registers.
#include "csrc/cpu/quant_codes.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/unit_kernels.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kTaskElements = 65536;
constexpr int64_t kPacks = 4;  // side by side, where there are as many

// A block of pixels, and its channels from the first of some packs on.
struct Columns {
    int64_t pixels, pitch;
    int64_t lanes;  // of the last pack
};

// Returns not a number if a value is none, else anything else.
template <int64_t kCount, bool kWhole, typename T, typename A>
SPOS_SIMD_INLINE A code_columns(const T* x, const Columns& columns, const A* scale, const A* shift, A step, A high,
                                uint8_t* codes) {
    using Pack = decltype(load_pack(scale));
    const Pack zero{}, most = zero + high;
    Pack scales[kCount], shifts[kCount], bad{};
    for (int64_t j = 0; j < kCount; ++j)
        scales[j] = load_pack(scale + j * kPack), shifts[j] = load_pack(shift + j * kPack);
    for (int64_t pixel = 0; pixel < columns.pixels; ++pixel, x += columns.pitch, codes += columns.pitch)
        for (int64_t j = 0; j < kCount; ++j) {
            const Pack value = load_lanes<kWhole>(x + j * kPack, columns.lanes);
            const Pack v = (scales[j] * value + shifts[j]) / step;
            const Pack raised = v > zero ? v : zero;  // a NaN is 0
            bad = v == v ? bad : v;
            const BytePack bytes = bytes_of(raised > most ? most : raised);
            std::memcpy(codes + j * kPack, &bytes, kWhole ? kPack : columns.lanes);
        }
    A sum = 0;
    for (int64_t lane = 0; lane < kPack; ++lane) sum += bad[lane];
    return sum;
}

template <int64_t kCount, bool kWhole, bool kResidual, typename T, typename A>
SPOS_SIMD_INLINE double pass_columns_back(const T* grad, const T* x, const Columns& columns, const A* scale,
                                          const A* shift, A step, const Inside<A>& bounds, T* grad_x,
                                          double* scale_sums, double* shift_sums) {
    using Pack = decltype(load_pack(scale));
    Pack scales[kCount], shifts[kCount], scale_sum[kCount] = {}, shift_sum[kCount] = {}, step_sum[kCount] = {};
    for (int64_t j = 0; j < kCount; ++j)
        scales[j] = load_pack(scale + j * kPack), shifts[j] = load_pack(shift + j * kPack);
    for (int64_t pixel = 0; pixel < columns.pixels; ++pixel) {
        for (int64_t j = 0; j < kCount; ++j) {
            const Pack g = load_lanes<kWhole>(grad + j * kPack, columns.lanes);
            const Pack value = load_lanes<kWhole>(x + j * kPack, columns.lanes);
            const Pack v = (scales[j] * value + shifts[j]) / step;
            const auto passed = pass_back<false, kResidual>(g, v, bounds);
            store_lanes<kWhole>(grad_x + j * kPack, passed.inside * scales[j], columns.lanes);
            step_sum[j] += passed.step;
            shift_sum[j] += passed.inside;
            scale_sum[j] += passed.inside * value;
        }
        grad += columns.pitch, x += columns.pitch, grad_x += columns.pitch;
    }
    double total = 0;
    for (int64_t j = 0; j < kCount; ++j) {
        store_pack(scale_sums + j * kPack, load_pack(scale_sums + j * kPack) + in_double(scale_sum[j]));
        store_pack(shift_sums + j * kPack, load_pack(shift_sums + j * kPack) + in_double(shift_sum[j]));
        total += sum_of<double>(step_sum[j]);
    }
    return total;
}

// The channels of a block of pixels, all of them: kPacks packs at a time, then one, then what is left.
template <typename Body>
SPOS_SIMD_INLINE void each_columns(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + kPacks * kPack <= channels; c += kPacks * kPack)
        body(c, std::integral_constant<int64_t, kPacks>{}, std::true_type{}, kPack);
    for (; c + kPack <= channels; c += kPack) body(c, std::integral_constant<int64_t, 1>{}, std::true_type{}, kPack);
    if (c < channels) body(c, std::integral_constant<int64_t, 1>{}, std::false_type{}, channels - c);
}

// Clones cannot be templates: named functions for each element type.
#define SPOS_BLOCKS(T, A)                                                                                             \
    SPOS_SIMD_CLONES A code_block(const T* x, int64_t pixels, int64_t channels, const A* scale, const A* shift,       \
                                  A step, A high, uint8_t* codes) {                                                   \
        A bad = 0;                                                                                                    \
        each_columns(channels, [&](int64_t c, auto count, auto whole, int64_t lanes) __attribute__((always_inline)) { \
            bad += code_columns<count, whole>(x + c, Columns{pixels, channels, lanes}, scale + c, shift + c, step,    \
                                              high, codes + c);                                                       \
        });                                                                                                           \
        return bad;                                                                                                   \
    }                                                                                                                 \
    SPOS_SIMD_CLONES double backward_block(                                                                           \
        const T* grad, const T* x, int64_t pixels, int64_t channels, const A* scale, const A* shift, bool residual,   \
        A step, const Inside<A>& bounds, T* grad_x, double* scale_sums, double* shift_sums) {                         \
        double sum = 0;                                                                                               \
        each_columns(channels, [&](int64_t c, auto count, auto whole, int64_t lanes) __attribute__((always_inline)) { \
            const Columns columns{pixels, channels, lanes};                                                           \
            sum += residual                                                                                           \
                       ? pass_columns_back<count, whole, true>(grad + c, x + c, columns, scale + c, shift + c, step,  \
                                                               bounds, grad_x + c, scale_sums + c, shift_sums + c)    \
                       : pass_columns_back<count, whole, false>(grad + c, x + c, columns, scale + c, shift + c, step, \
                                                                bounds, grad_x + c, scale_sums + c, shift_sums + c);  \
        });                                                                                                           \
        return sum;                                                                                                   \
    }
SPOS_BLOCKS(float, float)
SPOS_BLOCKS(double, double)
SPOS_BLOCKS(Half, float)
SPOS_BLOCKS(BFloat16, float)
#undef SPOS_BLOCKS

// That stay in the first-level cache.
int64_t block_of(int64_t channels) {
    return std::clamp<int64_t>(8192 / channels, 8, 64);
}

// Pixels in tasks, and those in blocks, by the shape alone.
struct Pixels {
    int64_t pixels, block, per_task, tasks;

    Pixels(int64_t pixels, int64_t channels)
        : pixels(pixels),
          block(block_of(channels)),
          per_task(divide_up(std::max<int64_t>(1, kTaskElements / channels), block) * block),
          tasks(divide_up(pixels, per_task)) {}

    // Calls body(first, pixels of the block).
    template <typename Body>
    void each_block(int64_t task, Body body) const {
        const int64_t end = std::min(pixels, (task + 1) * per_task);
        for (int64_t first = task * per_task; first < end; first += block) body(first, std::min(block, end - first));
    }
};

template <typename T>
bool forward(const void* x, int64_t pixels, int64_t channels, const void* scale, const void* shift,
             const Quantizer& quantizer, const void* step, uint8_t* codes, const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const Prologue<A> prologue(channels, scale, shift);
    const Pixels split(pixels, channels);
    const A size = *static_cast<const A*>(step);
    std::atomic<bool> numbers{true};
    parallel_for(split.tasks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            split.each_block(task, [&](int64_t first, int64_t count) {
                if (!quantize_pixels(static_cast<const T*>(x) + first * channels, count, prologue, quantizer, size,
                                     codes + first * channels))
                    numbers = false;
            });
    });
    return numbers;
}

template <typename T>
void backward(const void* grad, const void* x, int64_t pixels, int64_t channels, const void* scale, const void* shift,
              const Quantizer& quantizer, const void* step, void* grad_x, double* step_sum, double* scale_sums,
              double* shift_sums, const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const Prologue<A> prologue(channels, scale, shift);
    const Pixels split(pixels, channels);
    const A size = *static_cast<const A*>(step);
    const Inside<A> bounds(quantizer);
    const int64_t packed = prologue.scale.size();
    std::vector<double> step_partials(split.tasks), partials(2 * split.tasks * packed);
    parallel_for(split.tasks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            split.each_block(task, [&](int64_t first, int64_t count) {
                const int64_t at = first * channels;
                double* own = &partials[2 * task * packed];
                step_partials[task] +=
                    backward_block(static_cast<const T*>(grad) + at, static_cast<const T*>(x) + at, count, channels,
                                   prologue.scale.data(), prologue.shift.data(), quantizer.residual, size, bounds,
                                   static_cast<T*>(grad_x) + at, own, own + packed);
            });
    });
    *step_sum = 0;
    std::fill_n(scale_sums, channels, 0.0), std::fill_n(shift_sums, channels, 0.0);
    for (int64_t task = 0; task < split.tasks; ++task) {
        *step_sum += step_partials[task];
        for (int64_t c = 0; c < channels; ++c) {
            scale_sums[c] += partials[2 * task * packed + c];
            shift_sums[c] += partials[(2 * task + 1) * packed + c];
        }
    }
}

}  // namespace

#define SPOS_PIXELS(T, A)                                                                                             \
    bool quantize_pixels(const T* x, int64_t pixels, const Prologue<A>& prologue, const Quantizer& quantizer, A step, \
                         uint8_t* codes) {                                                                            \
        const int64_t channels = prologue.channels, block = block_of(channels);                                       \
        A bad = 0;                                                                                                    \
        for (int64_t first = 0; first < pixels; first += block)                                                       \
            bad += code_block(x + first * channels, std::min(block, pixels - first), channels, prologue.scale.data(), \
                              prologue.shift.data(), step, A(quantizer.high), codes + first * channels);              \
        return bad == bad;                                                                                            \
    }
SPOS_PIXELS(float, float)
SPOS_PIXELS(double, double)
SPOS_PIXELS(Half, float)
SPOS_PIXELS(BFloat16, float)
#undef SPOS_PIXELS

bool quantize_codes(DType dtype, const void* x, int64_t pixels, int64_t channels, const void* scale, const void* shift,
                    const Quantizer& quantizer, const void* step, uint8_t* codes, const ParallelFor& parallel_for) {
    switch (dtype) {
        case DType::float32:
            return forward<float>(x, pixels, channels, scale, shift, quantizer, step, codes, parallel_for);
        case DType::float64:
            return forward<double>(x, pixels, channels, scale, shift, quantizer, step, codes, parallel_for);
        case DType::float16:
            return forward<Half>(x, pixels, channels, scale, shift, quantizer, step, codes, parallel_for);
        case DType::bfloat16:
            return forward<BFloat16>(x, pixels, channels, scale, shift, quantizer, step, codes, parallel_for);
    }
    return false;
}

void quantize_codes_backward(DType dtype, const void* grad, const void* x, int64_t pixels, int64_t channels,
                             const void* scale, const void* shift, const Quantizer& quantizer, const void* step,
                             void* grad_x, double* step_sum, double* scale_sums, double* shift_sums,
                             const ParallelFor& parallel_for) {
    const auto run = dtype == DType::float64    ? backward<double>
                     : dtype == DType::float16  ? backward<Half>
                     : dtype == DType::bfloat16 ? backward<BFloat16>
                                                : backward<float>;
    run(grad, x, pixels, channels, scale, shift, quantizer, step, grad_x, step_sum, scale_sums, shift_sums,
        parallel_for);
}

}  // namespace spos::cpu
