#include "csrc/cpu/unit_kernels.h"

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/deviations.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {
namespace {

SPOS_SIMD_WIDE void even_stream(const float* x, int64_t pitch, int64_t pixels, int64_t channels, float* to,
                                int64_t to_pitch, const float* ahead) {
    for (int64_t p = 0; p < pixels; ++p, x += pitch, to += to_pitch, ahead += pitch)
        for (int64_t c = 0; c < channels; c += kPack) {
            __builtin_prefetch(ahead + 2 * c);
            __builtin_prefetch(ahead + 2 * c + kPack);
            stream_pack(to + c, even_lanes(load_pack(x + 2 * c), load_pack(x + 2 * c + kPack)));
        }
    end_of_stream();
}

SPOS_SIMD_WIDE void affine_relu_stream(const float* from, int64_t pitch, int64_t pixels, int64_t channels,
                                       const float* scale, const float* shift, float* to, int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, from += pitch, to += to_pitch)
        for (int64_t c = 0; c < channels; c += kPack) {
            const FloatPack y = load_pack(scale + c) * load_pack(from + c) + load_pack(shift + c), zero = {};
            stream_pack(to + c, y < zero ? zero : y);
        }
    end_of_stream();
}

// 16 of every other value, of which the last is the 31st: nothing behind it is read.
template <typename T>
SPOS_SIMD_INLINE auto load_every_other(const T* from) {
    return __builtin_shufflevector(load_pack(from), load_pack(from + kPack - 1), 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21,
                                   23, 25, 27, 29, 31);
}

template <typename T>
SPOS_SIMD_INLINE void even_rows(const T* x, int64_t pitch, int64_t pixels, int64_t channels, T* to, int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, x += pitch, to += to_pitch) {
        int64_t c = 0;
        if constexpr (sizeof(T) >= sizeof(float))
            for (; c + kPack <= channels; c += kPack) store_pack(to + c, load_every_other(x + 2 * c));
        for (; c < channels; ++c) to[c] = x[2 * c];
    }
}

template <typename T, typename A>
SPOS_SIMD_INLINE void copy_rows(const T* from, int64_t pitch, int64_t step, int64_t pixels, int64_t channels, A* to,
                                int64_t to_pitch, const T* ahead) {
    if (step == 1 && channels == kPack) {
        for (int64_t p = 0; p < pixels; ++p) {
            __builtin_prefetch(ahead + p * pitch);
            store_pack(to + p * to_pitch, load_pack(from + p * pitch));
        }
        return;
    }
    for (int64_t p = 0; p < pixels; ++p, from += pitch, to += to_pitch) {
        int64_t c = 0;
        if (step == 1)
            for (; c + kPack <= channels; c += kPack) store_pack(to + c, load_pack(from + c));
        else if (step == 2)
            for (; c + kPack <= channels; c += kPack) store_pack(to + c, load_every_other(from + 2 * c));
        for (; c < channels; ++c) to[c] = widen(from[step * c]);
    }
}

template <bool kRelu, typename T, typename U, typename A>
SPOS_SIMD_INLINE void affine_rows(const T* from, int64_t pitch, int64_t pixels, int64_t channels, const A* scale,
                                  const A* shift, U* to, int64_t to_pitch, const T* ahead) {
    using Pack = decltype(load_pack(scale));
    auto result = [](const Pack& value, const Pack& a, const Pack& b) __attribute__((always_inline)) {
        const Pack y = a * value + b, zero = {};
        return kRelu ? (y < zero ? zero : y) : y;  // a NaN stays one
    };
    if (channels == kPack) {
        const Pack a = load_pack(scale), b = load_pack(shift);
        for (int64_t p = 0; p < pixels; ++p) {
            __builtin_prefetch(ahead + p * pitch);
            store_pack(to + p * to_pitch, result(load_pack(from + p * pitch), a, b));
        }
        return;
    }
    constexpr int64_t kSoon = 8;
    for (int64_t p = 0; p < pixels; ++p, from += pitch, to += to_pitch) {
        const int64_t soon = std::min(kSoon, pixels - 1 - p);
        int64_t c = 0;
        for (; c + kPack <= channels; c += kPack) {
            __builtin_prefetch(from + soon * pitch + c);
            __builtin_prefetch(to + soon * to_pitch + c, 1);
            store_pack(to + c, result(load_pack(from + c), load_pack(scale + c), load_pack(shift + c)));
        }
        if (c < channels)
            store_partial(to + c,
                          result(load_partial(from + c, channels - c), load_pack(scale + c), load_pack(shift + c)),
                          channels - c);
    }
}

template <typename Pack, typename A>
SPOS_SIMD_INLINE void store_pixel(const Pack& value, const PixelPacks<A>& out) {
    if (out.deviations) add_deviations(&value, 1, 1, out.deviations, out.fresh);
    store_pack(out.to, value);
}

// kWidth neighbouring pixels; those from `used` on are computed and dropped.
template <int kKernel, int kStride, int kWidth, typename A>
SPOS_SIMD_INLINE void depthwise_tile(const A* const* rows, int64_t offset, int64_t count, const A* weights,
                                     int64_t used, const PixelPacks<A>& out) {
    using Pack = decltype(load_pack(weights));
    Pack sum[kWidth] = {};
    for (int64_t ky = 0; ky < count; ++ky) {
        const A* row = rows[ky] + offset * kStride * kPack;
        const A* taps = weights + ky * kKernel * kPack;
        Pack tap[kKernel];
#pragma GCC unroll 8
        for (int kx = 0; kx < kKernel; ++kx) tap[kx] = load_pack(taps + kx * kPack);
#pragma GCC unroll 32
        for (int i = 0; i < kStride * (kWidth - 1) + kKernel; ++i) {
            const Pack value = load_pack(row + i * kPack);
#pragma GCC unroll 8
            for (int kx = 0; kx < kKernel; ++kx)
                if (i >= kx && (i - kx) % kStride == 0 && (i - kx) / kStride < kWidth)
                    sum[(i - kx) / kStride] += tap[kx] * value;
        }
    }
    if (used >= kWidth) {
        if (out.deviations) add_deviations(sum, kWidth, 1, out.deviations, out.fresh);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store_pack(out.to + i * out.pitch, sum[i]);
    } else {
        A all[kWidth][kPack];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store_pack(all[i], sum[i]);
        for (int64_t i = 0; i < used; ++i) store_pixel(load_pack(all[i]), out.behind(i));
    }
}

// Rows of 7, 14, 28 and 56 pixels, of 6, 12, 24 and 48 (ImageNet at 224 and 96), and multiples of 4 are cut evenly.
template <int kKernel, int kStride, bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise_tiles(const A* const* rows, int64_t count, const A* weights, int64_t width,
                                      const PixelPacks<A>& out) {
    int64_t x = 0;
    auto take = [&](auto tile) __attribute__((always_inline)) {
        depthwise_tile<kKernel, kStride, tile>(rows, x, count, weights, tile, out.behind(x));
        x += tile;
    };
    if constexpr (kWide) {
        while (width % 12 == 0 && x < width) take(std::integral_constant<int, 12>());
        while (x + 14 <= width) take(std::integral_constant<int, 14>());
        if (x + 7 <= width) take(std::integral_constant<int, 7>());
        if (x + 6 <= width) take(std::integral_constant<int, 6>());
    }
    for (; x < width; x += 4) depthwise_tile<kKernel, kStride, 4>(rows, x, count, weights, width - x, out.behind(x));
}

// Any kernel size.
template <typename A>
SPOS_SIMD_INLINE void depthwise_any(const A* const* rows, int64_t count, const A* weights, int64_t kernel,
                                    int64_t width, const PixelPacks<A>& out, int64_t stride) {
    for (int64_t x = 0; x < width; ++x) {
        decltype(load_pack(weights)) sum = {};
        for (int64_t ky = 0; ky < count; ++ky)
            for (int64_t kx = 0; kx < kernel; ++kx)
                sum +=
                    load_pack(weights + (ky * kernel + kx) * kPack) * load_pack(rows[ky] + (stride * x + kx) * kPack);
        store_pixel(sum, out.behind(x));
    }
}

template <bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise(const A* const* rows, int64_t count, const A* weights, int64_t kernel, int64_t width,
                                const PixelPacks<A>& out, int64_t stride) {
    switch (kernel < 8 ? 8 * stride + kernel : 0) {
        case 8 + 3:
            return depthwise_tiles<3, 1, kWide>(rows, count, weights, width, out);
        case 8 + 5:
            return depthwise_tiles<5, 1, kWide>(rows, count, weights, width, out);
        case 8 + 7:
            return depthwise_tiles<7, 1, kWide>(rows, count, weights, width, out);
        case 16 + 3:
            return depthwise_tiles<3, 2, kWide>(rows, count, weights, width, out);
        case 16 + 5:
            return depthwise_tiles<5, 2, kWide>(rows, count, weights, width, out);
        case 16 + 7:
            return depthwise_tiles<7, 2, kWide>(rows, count, weights, width, out);
        default:
            return depthwise_any(rows, count, weights, kernel, width, out, stride);
    }
}

// Clones cannot be templates: one named function for each pair of types.
SPOS_SIMD_WIDE void depthwise_wide(const float* const* rows, int64_t count, const float* weights, int64_t kernel,
                                   int64_t width, const PixelPacks<float>& out, int64_t stride) {
    depthwise<true>(rows, count, weights, kernel, width, out, stride);
}
SPOS_SIMD_CLONES void depthwise_narrow(const float* const* rows, int64_t count, const float* weights, int64_t kernel,
                                       int64_t width, const PixelPacks<float>& out, int64_t stride) {
    depthwise<false>(rows, count, weights, kernel, width, out, stride);
}
SPOS_SIMD_CLONES void depthwise_narrow(const double* const* rows, int64_t count, const double* weights, int64_t kernel,
                                       int64_t width, const PixelPacks<double>& out, int64_t stride) {
    depthwise<false>(rows, count, weights, kernel, width, out, stride);
}

template <typename A>
SPOS_SIMD_INLINE void settle(A* deviations, double* totals, int64_t packs) {
    for (int64_t pack = 0; pack < packs; ++pack, totals += 2 * kPack) {
        A* from = deviations + pack * kDeviations + kPack;
        for (int64_t j = 0; j < 2 * kPack; ++j) totals[j] += from[j], from[j] = 0;
    }
}
SPOS_SIMD_CLONES void settle_clone(float* deviations, double* totals, int64_t packs) {
    settle(deviations, totals, packs);
}
SPOS_SIMD_CLONES void settle_clone(double* deviations, double* totals, int64_t packs) {
    settle(deviations, totals, packs);
}

template <typename A>
SPOS_SIMD_INLINE void all_moments(const A* deviations, const double* totals, int64_t count, int64_t channels,
                                  double* mean, double* m2) {
    const double inverse = 1.0 / static_cast<double>(count);
    auto one = [&](int64_t lane, int64_t c) __attribute__((always_inline)) {
        const double sum = totals[lane], second = totals[kPack + lane] - sum * sum * inverse;
        mean[c] = deviations[lane] + sum * inverse;
        m2[c] = second < 0 ? 0 : second;
    };
    int64_t c = 0;
    for (; c + kPack <= channels; c += kPack, deviations += kDeviations, totals += 2 * kPack)
        for (int64_t lane = 0; lane < kPack; ++lane) one(lane, c + lane);
    for (int64_t lane = 0; c + lane < channels; ++lane) one(lane, c + lane);
}
SPOS_SIMD_CLONES void moments_clone(const float* deviations, const double* totals, int64_t count, int64_t channels,
                                    double* mean, double* m2) {
    all_moments(deviations, totals, count, channels, mean, m2);
}
SPOS_SIMD_CLONES void moments_clone(const double* deviations, const double* totals, int64_t count, int64_t channels,
                                    double* mean, double* m2) {
    all_moments(deviations, totals, count, channels, mean, m2);
}

#define SPOS_STORAGE(T, A)                                                                                         \
    SPOS_SIMD_CLONES void even_clone(const T* x, int64_t pitch, int64_t pixels, int64_t channels, T* to,           \
                                     int64_t to_pitch) {                                                           \
        even_rows(x, pitch, pixels, channels, to, to_pitch);                                                       \
    }                                                                                                              \
    SPOS_SIMD_CLONES void copy_clone(const T* from, int64_t pitch, int64_t step, int64_t pixels, int64_t channels, \
                                     A* to, int64_t to_pitch, const T* ahead) {                                    \
        copy_rows(from, pitch, step, pixels, channels, to, to_pitch, ahead);                                       \
    }
#define SPOS_CONVERSION(T, U, A)                                                                                       \
    SPOS_SIMD_CLONES void affine_clone(const T* from, int64_t pitch, int64_t pixels, int64_t channels, const A* scale, \
                                       const A* shift, U* to, int64_t to_pitch, const T* ahead) {                      \
        affine_rows<false>(from, pitch, pixels, channels, scale, shift, to, to_pitch, ahead);                          \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void affine_relu_clone(const T* from, int64_t pitch, int64_t pixels, int64_t channels,            \
                                            const A* scale, const A* shift, U* to, int64_t to_pitch, const T* ahead) { \
        affine_rows<true>(from, pitch, pixels, channels, scale, shift, to, to_pitch, ahead);                           \
    }
SPOS_STORAGE(float, float)
SPOS_STORAGE(double, double)
SPOS_STORAGE(Half, float)
SPOS_STORAGE(BFloat16, float)
SPOS_CONVERSION(float, float, float)
SPOS_CONVERSION(double, double, double)
SPOS_CONVERSION(Half, float, float)
SPOS_CONVERSION(BFloat16, float, float)
SPOS_CONVERSION(float, Half, float)
SPOS_CONVERSION(float, BFloat16, float)
SPOS_CONVERSION(Half, Half, float)
SPOS_CONVERSION(BFloat16, BFloat16, float)
#undef SPOS_STORAGE
#undef SPOS_CONVERSION

}  // namespace

void settle_deviations(float* deviations, double* totals, int64_t packs) {
    settle_clone(deviations, totals, packs);
}
void settle_deviations(double* deviations, double* totals, int64_t packs) {
    settle_clone(deviations, totals, packs);
}

void deviation_moments(const float* deviations, const double* totals, int64_t count, int64_t channels, double* mean,
                       double* m2) {
    moments_clone(deviations, totals, count, channels, mean, m2);
}
void deviation_moments(const double* deviations, const double* totals, int64_t count, int64_t channels, double* mean,
                       double* m2) {
    moments_clone(deviations, totals, count, channels, mean, m2);
}

template <typename T>
void copy_even_channels(const T* x, int64_t pitch, int64_t pixels, int64_t channels, T* to, int64_t to_pitch,
                        bool stream, const T* ahead) {
    if constexpr (std::is_same_v<T, float>)
        if (stream && machine_is_wide() && streamable(to, to_pitch, channels))
            return even_stream(x, pitch, pixels, channels, to, to_pitch, ahead ? ahead : x);
    even_clone(x, pitch, pixels, channels, to, to_pitch);
}

template <typename T, typename A>
void copy_channels(const T* from, int64_t pitch, int64_t step, int64_t pixels, int64_t channels, A* to,
                   int64_t to_pitch, const T* ahead) {
    copy_clone(from, pitch, step, pixels, channels, to, to_pitch, ahead ? ahead : from);
}

template <typename T, typename U, typename A>
void scale_and_shift(const T* from, int64_t pitch, int64_t pixels, int64_t channels, const A* scale, const A* shift,
                     bool relu, U* to, int64_t to_pitch, bool stream, const T* ahead) {
    if constexpr (std::is_same_v<T, float> && std::is_same_v<U, float>)
        if (stream && relu && machine_is_wide() && streamable(to, to_pitch, channels))
            return affine_relu_stream(from, pitch, pixels, channels, scale, shift, to, to_pitch);
    if (relu)
        affine_relu_clone(from, pitch, pixels, channels, scale, shift, to, to_pitch, ahead ? ahead : from);
    else
        affine_clone(from, pitch, pixels, channels, scale, shift, to, to_pitch, ahead ? ahead : from);
}

template <typename A>
void depthwise_row(const A* const* rows, int64_t first, int64_t count, const A* weights, int64_t kernel, int64_t width,
                   const PixelPacks<A>& out, int64_t stride) {
    weights += first * kernel * kPack;
    if constexpr (std::is_same_v<A, float>)
        if (machine_is_wide()) return depthwise_wide(rows, count, weights, kernel, width, out, stride);
    depthwise_narrow(rows, count, weights, kernel, width, out, stride);
}

#define SPOS_INSTANTIATE(T, A)                                                                                      \
    template void copy_channels(const T*, int64_t, int64_t, int64_t, int64_t, A*, int64_t, const T*);               \
    template void copy_even_channels(const T*, int64_t, int64_t, int64_t, T*, int64_t, bool, const T*);             \
    template void scale_and_shift(const T*, int64_t, int64_t, int64_t, const A*, const A*, bool, T*, int64_t, bool, \
                                  const T*);
SPOS_INSTANTIATE(float, float)
SPOS_INSTANTIATE(double, double)
SPOS_INSTANTIATE(Half, float)
SPOS_INSTANTIATE(BFloat16, float)
#undef SPOS_INSTANTIATE
template void scale_and_shift(const Half*, int64_t, int64_t, int64_t, const float*, const float*, bool, float*, int64_t,
                              bool, const Half*);
template void scale_and_shift(const BFloat16*, int64_t, int64_t, int64_t, const float*, const float*, bool, float*,
                              int64_t, bool, const BFloat16*);
template void scale_and_shift(const float*, int64_t, int64_t, int64_t, const float*, const float*, bool, Half*, int64_t,
                              bool, const float*);
template void scale_and_shift(const float*, int64_t, int64_t, int64_t, const float*, const float*, bool, BFloat16*,
                              int64_t, bool, const float*);
template void depthwise_row(const float* const*, int64_t, int64_t, const float*, int64_t, int64_t,
                            const PixelPacks<float>&, int64_t);
template void depthwise_row(const double* const*, int64_t, int64_t, const double*, int64_t, int64_t,
                            const PixelPacks<double>&, int64_t);

}  // namespace spos::cpu
