#include "csrc/cpu/unit_gradient_kernels.h"

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/simd.h"

namespace spos::cpu {
namespace {

template <typename T>
SPOS_SIMD_INLINE auto load_some(const T* from, int64_t lanes) {
    return lanes == kPack ? load_pack(from) : load_partial(from, lanes);
}

template <bool kRelu, typename Pack, typename A>
SPOS_SIMD_INLINE Pack passed_gradient(const Pack& grad, const Pack& z, const NormGradient<A>& norm, int64_t c) {
    if constexpr (!kRelu) return grad;
    const Pack y = load_pack(norm.scale + c) * z + load_pack(norm.shift + c), zero = {};
    return y > zero ? grad : zero;
}

template <bool kRelu, typename T, typename A>
SPOS_SIMD_INLINE void sums_rows(const T* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels,
                                int64_t channels, const NormGradient<A>& norm, double* sum, double* product) {
    using Pack = decltype(load_pack(norm.mean));
    constexpr int kChains = 4;
    for (int64_t c = 0; c < channels; c += kPack) {
        const int64_t lanes = std::min(kPack, channels - c);
        const Pack mean = load_pack(norm.mean + c);
        Pack s[kChains] = {}, q[kChains] = {};
        auto take = [&](int64_t p, int chain) __attribute__((always_inline)) {
            const Pack value = load_some(z + p * z_pitch + c, lanes);
            const Pack g = passed_gradient<kRelu>(Pack(load_some(grad + p * grad_pitch + c, lanes)), value, norm, c);
            s[chain] += g;
            q[chain] += g * (value - mean);
        };
        int64_t p = 0;
        for (; p + kChains <= pixels; p += kChains)
            for (int i = 0; i < kChains; ++i) take(p + i, i);
        for (; p < pixels; ++p) take(p, 0);
        A sums[kPack], products[kPack];
        store_pack(sums, Pack((s[0] + s[1]) + (s[2] + s[3])));
        store_pack(products, Pack((q[0] + q[1]) + (q[2] + q[3])));
        for (int64_t j = 0; j < lanes; ++j) sum[c + j] += sums[j], product[c + j] += products[j];
    }
}

template <bool kRelu, typename G, typename T, typename A>
SPOS_SIMD_INLINE void norm_rows(const G* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels,
                                int64_t channels, const NormGradient<A>& norm, A* to, int64_t to_pitch, int64_t ahead) {
    using Pack = decltype(load_pack(norm.mean));
    const NormGradient<A> n = norm;  // the compiler must not fear that `to` is part of it
    auto result = [&](const Pack& from, const Pack& value, int64_t c) __attribute__((always_inline)) {
        const Pack g = passed_gradient<kRelu>(from, value, n, c), d = value - load_pack(n.mean + c);
        return Pack(load_pack(n.scale + c) * ((g - load_pack(n.offset + c)) - load_pack(n.slope + c) * d));
    };
    constexpr int64_t kSoon = 8;
    for (int64_t p = 0; p < pixels; ++p, grad += grad_pitch, z += z_pitch, to += to_pitch) {
        const int64_t soon = ahead ? ahead : std::min(kSoon, pixels - 1 - p);
        int64_t c = 0;
        for (; c + kPack <= channels; c += kPack) {
            __builtin_prefetch(grad + soon * grad_pitch + c);
            __builtin_prefetch(z + soon * z_pitch + c);
            store_pack(to + c, result(load_pack(grad + c), load_pack(z + c), c));
        }
        if (c < channels)
            store_pack(to + c, result(load_partial(grad + c, channels - c), load_partial(z + c, channels - c), c));
    }
}

template <bool kMask, bool kSums, typename T, typename A>
SPOS_SIMD_INLINE void masked_rows(const A* grad, int64_t grad_pitch, const A* y, int64_t y_pitch, const T* z,
                                  int64_t z_pitch, int64_t pixels, int64_t channels, const A* centre, A* to,
                                  int64_t to_pitch, double* sum, double* product) {
    using Pack = decltype(load_pack(grad));
    const Pack zero = {};
    Pack mean = {}, s[2] = {}, q[2] = {};
    if constexpr (kSums) mean = load_pack(centre);
    for (int64_t p = 0; p < pixels; ++p) {
        Pack g = load_pack(grad + p * grad_pitch);
        if constexpr (kMask) g = load_pack(y + p * y_pitch) > zero ? g : zero;
        store_pack(to + p * to_pitch, g);
        if constexpr (kSums) {
            s[p % 2] += g;
            q[p % 2] += g * (load_some(z + p * z_pitch, channels) - mean);
        }
    }
    if constexpr (kSums) {
        A sums[kPack], products[kPack];
        store_pack(sums, Pack(s[0] + s[1])), store_pack(products, Pack(q[0] + q[1]));
        for (int64_t j = 0; j < channels; ++j) sum[j] += sums[j], product[j] += products[j];
    }
}

template <int kKernel, int kWidth, typename A>
SPOS_SIMD_INLINE void depthwise_tile(const A* const* rows, int64_t offset, int64_t count, const A* weights,
                                     int64_t used, const A* y, A* to, A* taps) {
    using Pack = decltype(load_pack(weights));
    Pack sum[kWidth] = {};
    y += offset * kPack;
    for (int64_t ky = 0; ky < count; ++ky) {
        const A* row = rows[ky] + offset * kPack;
        const A* weight = weights + ky * kKernel * kPack;
        A* tap = taps + ky * kKernel * kPack;
        Pack w[kKernel], gradient[kKernel];
#pragma GCC unroll 8
        for (int kx = 0; kx < kKernel; ++kx)
            w[kx] = load_pack(weight + kx * kPack), gradient[kx] = load_pack(tap + kx * kPack);
#pragma GCC unroll 32
        for (int i = 0; i < kWidth + kKernel - 1; ++i) {
            const Pack value = load_pack(row + i * kPack);
#pragma GCC unroll 8
            for (int kx = 0; kx < kKernel; ++kx)
                if (i >= kx && i - kx < kWidth) {
                    sum[i - kx] += w[kx] * value;
                    gradient[kx] += load_pack(y + (i - kx) * kPack) * value;
                }
        }
#pragma GCC unroll 8
        for (int kx = 0; kx < kKernel; ++kx) store_pack(tap + kx * kPack, gradient[kx]);
    }
    A all[kWidth][kPack];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store_pack(all[i], sum[i]);
    std::memcpy(to + offset * kPack, all, std::min<int64_t>(used, kWidth) * kPack * sizeof(A));
}

template <int kKernel, bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise_tiles(const A* const* rows, int64_t count, const A* weights, int64_t width, const A* y,
                                      A* to, A* taps) {
    int64_t x = 0;
    if constexpr (kWide)
        for (; x + 7 <= width; x += 7) depthwise_tile<kKernel, 7>(rows, x, count, weights, 7, y, to, taps);
    for (; x < width; x += 4) depthwise_tile<kKernel, 4>(rows, x, count, weights, width - x, y, to, taps);
}

template <typename A>
SPOS_SIMD_INLINE void depthwise_any(const A* const* rows, int64_t count, const A* weights, int64_t kernel,
                                    int64_t width, const A* y, A* to, A* taps) {
    for (int64_t x = 0; x < width; ++x) {
        decltype(load_pack(weights)) sum = {};
        const auto centre = load_pack(y + x * kPack);
        for (int64_t ky = 0; ky < count; ++ky)
            for (int64_t kx = 0; kx < kernel; ++kx) {
                const int64_t at = (ky * kernel + kx) * kPack;
                const auto value = load_pack(rows[ky] + (x + kx) * kPack);
                sum += load_pack(weights + at) * value;
                store_pack(taps + at, load_pack(taps + at) + centre * value);
            }
        store_pack(to + x * kPack, sum);
    }
}

template <bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise(const A* const* rows, int64_t count, const A* weights, int64_t kernel, int64_t width,
                                const A* y, A* to, A* taps) {
    switch (kernel) {
        case 1:
            return depthwise_tiles<1, kWide>(rows, count, weights, width, y, to, taps);
        case 2:
            return depthwise_tiles<2, kWide>(rows, count, weights, width, y, to, taps);
        case 3:
            return depthwise_tiles<3, kWide>(rows, count, weights, width, y, to, taps);
        case 4:
            return depthwise_tiles<4, kWide>(rows, count, weights, width, y, to, taps);
        case 5:
            return depthwise_tiles<5, kWide>(rows, count, weights, width, y, to, taps);
        case 7:
            return depthwise_tiles<7, kWide>(rows, count, weights, width, y, to, taps);
        default:
            return depthwise_any(rows, count, weights, kernel, width, y, to, taps);
    }
}

SPOS_SIMD_WIDE void depthwise_wide(const float* const* rows, int64_t count, const float* weights, int64_t kernel,
                                   int64_t width, const float* y, float* to, float* taps) {
    depthwise<true>(rows, count, weights, kernel, width, y, to, taps);
}
SPOS_SIMD_CLONES void depthwise_narrow(const float* const* rows, int64_t count, const float* weights, int64_t kernel,
                                       int64_t width, const float* y, float* to, float* taps) {
    depthwise<false>(rows, count, weights, kernel, width, y, to, taps);
}
SPOS_SIMD_CLONES void depthwise_narrow(const double* const* rows, int64_t count, const double* weights, int64_t kernel,
                                       int64_t width, const double* y, double* to, double* taps) {
    depthwise<false>(rows, count, weights, kernel, width, y, to, taps);
}

template <typename T, typename A>
SPOS_SIMD_INLINE void interleave_rows(const T* even, int64_t even_pitch, const A* odd, int64_t odd_pitch,
                                      int64_t pixels, int64_t channels, T* to, int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, even += even_pitch, odd += odd_pitch, to += to_pitch)
        for (int64_t c = 0; c < channels; c += kPack) {
            const int64_t lanes = std::min(kPack, channels - c);
            if constexpr (sizeof(T) == sizeof(A)) {
                if (lanes == kPack) {
                    const auto left = load_pack(even + c), right = load_pack(odd + c);
                    store_pack(to + 2 * c, low_lanes_in_turn(left, right));
                    store_pack(to + 2 * c + kPack, high_lanes_in_turn(left, right));
                    continue;
                }
            }
            T narrowed[kPack];
            store_pack(narrowed, load_pack(odd + c));
            for (int64_t j = 0; j < lanes; ++j) to[2 * (c + j)] = even[c + j], to[2 * (c + j) + 1] = narrowed[j];
        }
}

SPOS_SIMD_WIDE void interleave_stream(const float* even, int64_t even_pitch, const float* odd, int64_t odd_pitch,
                                      int64_t pixels, int64_t channels, float* to, int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, even += even_pitch, odd += odd_pitch, to += to_pitch)
        for (int64_t c = 0; c < channels; c += kPack) {
            const FloatPack left = load_pack(even + c), right = load_pack(odd + c);
            stream_pack(to + 2 * c, low_lanes_in_turn(left, right));
            stream_pack(to + 2 * c + kPack, high_lanes_in_turn(left, right));
        }
    end_of_stream();
}

SPOS_SIMD_WIDE void rows_stream(const float* from, int64_t pitch, int64_t pixels, int64_t channels, float* to,
                                int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, from += pitch, to += to_pitch)
        for (int64_t c = 0; c < channels; c += kPack) stream_pack(to + c, load_pack(from + c));
    end_of_stream();
}

template <typename A, typename T>
SPOS_SIMD_INLINE void rounded_rows(const A* from, int64_t pitch, int64_t pixels, int64_t channels, T* to,
                                   int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, from += pitch, to += to_pitch) {
        int64_t c = 0;
        for (; c + kPack <= channels; c += kPack) store_pack(to + c, load_pack(from + c));
        if (c < channels) store_partial(to + c, load_partial(from + c, channels - c), channels - c);
    }
}

template <typename A>
SPOS_SIMD_INLINE void added_rows(const A* from, int64_t pitch, int64_t pixels, int64_t channels, A* to,
                                 int64_t to_pitch) {
    for (int64_t p = 0; p < pixels; ++p, from += pitch, to += to_pitch) {
        int64_t c = 0;
        for (; c + kPack <= channels; c += kPack) store_pack(to + c, load_pack(to + c) + load_pack(from + c));
        for (; c < channels; ++c) to[c] += from[c];
    }
}

// Clones cannot be templates: one named function for each pair of types.
#define SPOS_STORAGE(T, A)                                                                                             \
    SPOS_SIMD_CLONES void sums_clone(const T* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels,   \
                                     int64_t channels, const NormGradient<A>& norm, double* sum, double* product) {    \
        if (norm.relu)                                                                                                 \
            sums_rows<true>(grad, grad_pitch, z, z_pitch, pixels, channels, norm, sum, product);                       \
        else                                                                                                           \
            sums_rows<false>(grad, grad_pitch, z, z_pitch, pixels, channels, norm, sum, product);                      \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void masked_clone(const A* grad, int64_t grad_pitch, const A* y, int64_t y_pitch, const T* z,     \
                                       int64_t z_pitch, int64_t pixels, int64_t channels, const A* centre, A* to,      \
                                       int64_t to_pitch, double* sum, double* product) {                               \
        if (y && centre)                                                                                               \
            masked_rows<true, true>(grad, grad_pitch, y, y_pitch, z, z_pitch, pixels, channels, centre, to, to_pitch,  \
                                    sum, product);                                                                     \
        else if (y)                                                                                                    \
            masked_rows<true, false>(grad, grad_pitch, y, y_pitch, z, z_pitch, pixels, channels, centre, to, to_pitch, \
                                     sum, product);                                                                    \
        else if (centre)                                                                                               \
            masked_rows<false, true>(grad, grad_pitch, y, y_pitch, z, z_pitch, pixels, channels, centre, to, to_pitch, \
                                     sum, product);                                                                    \
        else                                                                                                           \
            masked_rows<false, false>(grad, grad_pitch, y, y_pitch, z, z_pitch, pixels, channels, centre, to,          \
                                      to_pitch, sum, product);                                                         \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void interleave_clone(const T* even, int64_t even_pitch, const A* odd, int64_t odd_pitch,         \
                                           int64_t pixels, int64_t channels, T* to, int64_t to_pitch) {                \
        interleave_rows(even, even_pitch, odd, odd_pitch, pixels, channels, to, to_pitch);                             \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void rounded_clone(const A* from, int64_t pitch, int64_t pixels, int64_t channels, T* to,         \
                                        int64_t to_pitch) {                                                            \
        rounded_rows(from, pitch, pixels, channels, to, to_pitch);                                                     \
    }
#define SPOS_GRADIENT(G, T, A)                                                                                       \
    SPOS_SIMD_CLONES void norm_clone(const G* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels, \
                                     int64_t channels, const NormGradient<A>& norm, A* to, int64_t to_pitch,         \
                                     int64_t ahead) {                                                                \
        if (norm.relu)                                                                                               \
            norm_rows<true>(grad, grad_pitch, z, z_pitch, pixels, channels, norm, to, to_pitch, ahead);              \
        else                                                                                                         \
            norm_rows<false>(grad, grad_pitch, z, z_pitch, pixels, channels, norm, to, to_pitch, ahead);             \
    }
SPOS_STORAGE(float, float)
SPOS_STORAGE(double, double)
SPOS_STORAGE(Half, float)
SPOS_STORAGE(BFloat16, float)
SPOS_GRADIENT(float, float, float)
SPOS_GRADIENT(double, double, double)
SPOS_GRADIENT(Half, Half, float)
SPOS_GRADIENT(BFloat16, BFloat16, float)
SPOS_GRADIENT(float, Half, float)
SPOS_GRADIENT(float, BFloat16, float)
#undef SPOS_STORAGE
#undef SPOS_GRADIENT
SPOS_SIMD_CLONES void added_clone(const float* from, int64_t pitch, int64_t pixels, int64_t channels, float* to,
                                  int64_t to_pitch) {
    added_rows(from, pitch, pixels, channels, to, to_pitch);
}
SPOS_SIMD_CLONES void added_clone(const double* from, int64_t pitch, int64_t pixels, int64_t channels, double* to,
                                  int64_t to_pitch) {
    added_rows(from, pitch, pixels, channels, to, to_pitch);
}

}  // namespace

template <typename T, typename A>
void gradient_sums(const T* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels, int64_t channels,
                   const NormGradient<A>& norm, double* sum, double* product) {
    sums_clone(grad, grad_pitch, z, z_pitch, pixels, channels, norm, sum, product);
}

template <typename G, typename T, typename A>
void norm_gradient(const G* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels, int64_t channels,
                   const NormGradient<A>& norm, A* to, int64_t to_pitch, int64_t ahead) {
    norm_clone(grad, grad_pitch, z, z_pitch, pixels, channels, norm, to, to_pitch, ahead);
}

template <typename T, typename A>
void masked_gradient(const A* grad, int64_t grad_pitch, const A* y, int64_t y_pitch, const T* z, int64_t z_pitch,
                     int64_t pixels, int64_t channels, const A* centre, A* to, int64_t to_pitch, double* sum,
                     double* product) {
    masked_clone(grad, grad_pitch, y, y_pitch, z, z_pitch, pixels, channels, centre, to, to_pitch, sum, product);
}

template <typename A>
void depthwise_gradient_row(const A* const* rows, int64_t first, int64_t count, const A* weights, int64_t kernel,
                            int64_t width, const A* y, A* to, A* taps) {
    weights += first * kernel * kPack;
    taps += first * kernel * kPack;
    if constexpr (std::is_same_v<A, float>)
        if (machine_is_wide()) return depthwise_wide(rows, count, weights, kernel, width, y, to, taps);
    depthwise_narrow(rows, count, weights, kernel, width, y, to, taps);
}

template <typename T, typename A>
void interleave(const T* even, int64_t even_pitch, const A* odd, int64_t odd_pitch, int64_t pixels, int64_t channels,
                T* to, int64_t to_pitch, bool stream) {
    if constexpr (std::is_same_v<T, float>)
        if (stream && machine_is_wide() && streamable(to, to_pitch, channels))
            return interleave_stream(even, even_pitch, odd, odd_pitch, pixels, channels, to, to_pitch);
    interleave_clone(even, even_pitch, odd, odd_pitch, pixels, channels, to, to_pitch);
}

template <typename A, typename T>
void store_rows(const A* from, int64_t pitch, int64_t pixels, int64_t channels, T* to, int64_t to_pitch, bool stream) {
    if constexpr (std::is_same_v<T, float>)
        if (stream && machine_is_wide() && streamable(to, to_pitch, channels))
            return rows_stream(from, pitch, pixels, channels, to, to_pitch);
    rounded_clone(from, pitch, pixels, channels, to, to_pitch);
}

template <typename A>
void add_rows(const A* from, int64_t pitch, int64_t pixels, int64_t channels, A* to, int64_t to_pitch) {
    added_clone(from, pitch, pixels, channels, to, to_pitch);
}

#define SPOS_INSTANTIATE(T, A)                                                                                         \
    template void gradient_sums(const T*, int64_t, const T*, int64_t, int64_t, int64_t, const NormGradient<A>&,        \
                                double*, double*);                                                                     \
    template void norm_gradient(const T*, int64_t, const T*, int64_t, int64_t, int64_t, const NormGradient<A>&, A*,    \
                                int64_t, int64_t);                                                                     \
    template void masked_gradient(const A*, int64_t, const A*, int64_t, const T*, int64_t, int64_t, int64_t, const A*, \
                                  A*, int64_t, double*, double*);                                                      \
    template void interleave(const T*, int64_t, const A*, int64_t, int64_t, int64_t, T*, int64_t, bool);               \
    template void store_rows(const A*, int64_t, int64_t, int64_t, T*, int64_t, bool);
SPOS_INSTANTIATE(float, float)
SPOS_INSTANTIATE(double, double)
SPOS_INSTANTIATE(Half, float)
SPOS_INSTANTIATE(BFloat16, float)
#undef SPOS_INSTANTIATE
template void add_rows(const float*, int64_t, int64_t, int64_t, float*, int64_t);
template void add_rows(const double*, int64_t, int64_t, int64_t, double*, int64_t);
template void norm_gradient(const float*, int64_t, const Half*, int64_t, int64_t, int64_t, const NormGradient<float>&,
                            float*, int64_t, int64_t);
template void norm_gradient(const float*, int64_t, const BFloat16*, int64_t, int64_t, int64_t,
                            const NormGradient<float>&, float*, int64_t, int64_t);
template void depthwise_gradient_row(const float* const*, int64_t, int64_t, const float*, int64_t, int64_t,
                                     const float*, float*, float*);
template void depthwise_gradient_row(const double* const*, int64_t, int64_t, const double*, int64_t, int64_t,
                                     const double*, double*, double*);

}  // namespace spos::cpu
