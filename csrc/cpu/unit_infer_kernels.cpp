#include "csrc/cpu/unit_infer_kernels.h"

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/unit_infer_vectors.h"

namespace spos::cpu {
namespace {

// kWidth neighbouring pixels of one row, one vector of channels; those from `used` on are computed and dropped.
template <typename V, int kKernel, int kStride, int kWidth, typename A>
SPOS_SIMD_INLINE void depthwise_tile(const DepthwiseRows<A>& r, int64_t slot, int64_t first, int64_t count, int64_t x,
                                     int64_t used, A* to) {
    V sum[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sum[i] = load_vector<V>(r.shift);
    const A* taps = r.taps + first * kKernel * kPack;
    for (int64_t ky = 0; ky < count; ++ky, taps += kKernel * kPack) {
        const A* row = r.window + slot * r.shape.length + x * kStride * kPack;
        if (++slot == r.shape.slots) slot = 0;
        V tap[kKernel];
#pragma GCC unroll 8
        for (int kx = 0; kx < kKernel; ++kx) tap[kx] = load_vector<V>(taps + kx * kPack);
#pragma GCC unroll 64
        for (int i = 0; i < (kWidth - 1) * kStride + kKernel; ++i) {
            V value = load_vector<V>(row + i * kPack);
            if constexpr (kKernel == 3) keep_in_register(value);
#pragma GCC unroll 8
            for (int kx = 0; kx < kKernel; ++kx)
                if (i >= kx && (i - kx) % kStride == 0 && (i - kx) / kStride < kWidth)
                    sum[(i - kx) / kStride] += tap[kx] * value;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
        if (i < used) std::memcpy(to + i * r.to.pitch, &sum[i], sizeof(V));
}

template <typename V, int kKernel, int kStride, bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise_tiles(const DepthwiseRows<A>& r, int64_t slot, int64_t first, int64_t count, A* to) {
    int64_t x = 0;
    if constexpr (kWide)
        for (; x + 14 <= r.width; x += 14)
            depthwise_tile<V, kKernel, kStride, 14>(r, slot, first, count, x, 14, to + x * r.to.pitch);
    for (; x + 7 <= r.width; x += 7)
        depthwise_tile<V, kKernel, kStride, 7>(r, slot, first, count, x, 7, to + x * r.to.pitch);
    for (; x < r.width; x += 4)
        depthwise_tile<V, kKernel, kStride, 4>(r, slot, first, count, x, r.width - x, to + x * r.to.pitch);
}

// Any kernel size and stride.
template <typename V, typename A>
SPOS_SIMD_INLINE void depthwise_any(const DepthwiseRows<A>& r, int64_t slot, int64_t first, int64_t count, A* to) {
    for (int64_t x = 0; x < r.width; ++x) {
        V sum = load_vector<V>(r.shift);
        for (int64_t ky = 0; ky < count; ++ky) {
            const A* row = r.window + (slot + ky) % r.shape.slots * r.shape.length + x * r.stride * kPack;
            for (int64_t kx = 0; kx < r.kernel; ++kx)
                sum +=
                    load_vector<V>(r.taps + ((first + ky) * r.kernel + kx) * kPack) * load_vector<V>(row + kx * kPack);
        }
        std::memcpy(to + x * r.to.pitch, &sum, sizeof sum);
    }
}

template <typename V, bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise_vector(const DepthwiseRows<A>& r) {
    A* to = r.to.start;
    for (int64_t y = r.begin; y < r.end; ++y, to += r.width * r.to.pitch) {
        const int64_t top = y * r.stride - r.kernel / 2, first = std::max<int64_t>(0, -top);
        const int64_t count = std::min(r.kernel, r.height - top) - first, slot = (top + first) % r.shape.slots;
        switch (r.stride > 2 ? 0 : 2 * r.kernel + r.stride) {
            case 2 * 3 + 1:
                depthwise_tiles<V, 3, 1, kWide>(r, slot, first, count, to);
                break;
            case 2 * 5 + 1:
                depthwise_tiles<V, 5, 1, kWide>(r, slot, first, count, to);
                break;
            case 2 * 7 + 1:
                depthwise_tiles<V, 7, 1, kWide>(r, slot, first, count, to);
                break;
            case 2 * 3 + 2:
                depthwise_tiles<V, 3, 2, kWide>(r, slot, first, count, to);
                break;
            case 2 * 5 + 2:
                depthwise_tiles<V, 5, 2, kWide>(r, slot, first, count, to);
                break;
            case 2 * 7 + 2:
                depthwise_tiles<V, 7, 2, kWide>(r, slot, first, count, to);
                break;
            default:
                depthwise_any<V>(r, slot, first, count, to);
        }
    }
}

// The vectors of a pack one after the other.
template <typename V, bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise(const DepthwiseRows<A>& rows) {
    DepthwiseRows<A> r = rows;
    constexpr int64_t kLanes = sizeof(V) / sizeof(A);
    for (int64_t lane = 0; lane < kPack; lane += kLanes) {
        depthwise_vector<V, kWide>(r);
        r.window += kLanes, r.taps += kLanes, r.shift += kLanes, r.to.start += kLanes;
    }
}

SPOS_SIMD_INLINE Float8 even_values(const Float8& low, const Float8& high) {
    return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
}
SPOS_SIMD_INLINE Float8 odd_values(const Float8& low, const Float8& high) {
    return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
}
SPOS_SIMD_INLINE Double4 even_values(const Double4& low, const Double4& high) {
    return __builtin_shufflevector(low, high, 0, 2, 4, 6);
}
SPOS_SIMD_INLINE Double4 odd_values(const Double4& low, const Double4& high) {
    return __builtin_shufflevector(low, high, 1, 3, 5, 7);
}

// The even and odd ones of 2 * kPack values.
template <typename A, typename T>
SPOS_SIMD_INLINE void split_pack(const T* x, T* even, A* odd) {
    if constexpr (sizeof(T) == sizeof(A)) {
        using V = NarrowVector<A>;
        constexpr int64_t kLanes = sizeof(V) / sizeof(A);
        for (int64_t c = 0; c < kPack; c += kLanes) {
            const V low = load_vector<V>(x + 2 * c), high = load_vector<V>(x + 2 * c + kLanes);
            const V even_part = even_values(low, high), odd_part = odd_values(low, high);
            std::memcpy(even + c, &even_part, sizeof(V));
            std::memcpy(odd + c, &odd_part, sizeof(V));
        }
    } else {  // both halves of 32-bit words
        detail::WordPack words;
        std::memcpy(&words, x, sizeof words);
        const auto low = __builtin_convertvector(words, detail::ShortPack);
        const auto high = __builtin_convertvector(words >> 16, detail::ShortPack);
        std::memcpy(even, &low, sizeof low);
        T narrow[kPack];
        std::memcpy(narrow, &high, sizeof high);
        store_pack(odd, load_pack(narrow));
    }
}

template <typename A, typename T>
SPOS_SIMD_INLINE void split_rows(PixelRows<const T> x, int64_t pixels, int64_t half, const ToImage<T>& even,
                                 PixelRows<A> odd) {
    for (int64_t p = 0; p < pixels; ++p) {
        const T* from = x.start + p * x.pitch;
        T* even_to = even.start + p * even.pitch;
        A* odd_to = odd.start + p * odd.pitch;
        int64_t c = 0;
        for (; c + kPack <= half; c += kPack) split_pack(from + 2 * c, even_to + c, odd_to + c);
        for (; c < half; ++c) {
            even_to[c] = from[2 * c];
            odd_to[c] = widen(from[2 * c + 1]);
        }
    }
}

SPOS_SIMD_WIDE void split_stream(PixelRows<const float> x, int64_t pixels, int64_t half, PixelRows<float> even,
                                 PixelRows<float> odd) {
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < half; c += kPack) {
            const float* from = x.start + p * x.pitch + 2 * c;
            const FloatPack low = load_pack(from), high = load_pack(from + kPack);
            stream_pack(even.start + p * even.pitch + c, even_lanes(low, high));
            store_pack(odd.start + p * odd.pitch + c, odd_lanes(low, high));
        }
}

template <typename A, typename T>
SPOS_SIMD_INLINE void widen_rows(PixelRows<const T> x, int64_t pixels, int64_t channels, PixelRows<A> to) {
    for (int64_t p = 0; p < pixels; ++p) {
        const T* from = x.start + p * x.pitch;
        A* place = to.start + p * to.pitch;
        int64_t c = 0;
        for (; c + kPack <= channels; c += kPack) store_pack(place + c, load_pack(from + c));
        for (; c < channels; ++c) place[c] = widen(from[c]);
    }
}

template <typename A>
SPOS_SIMD_INLINE void fill_rows(PixelRows<const A> x, int64_t pixels, int64_t channels, const ToWindow<A>& to) {
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; c += kPack) {
            const A* from = x.start + p * x.pitch + c;
            store_pack(to.start + to.places[p] + c / kPack * to.plane,
                       c + kPack <= channels ? load_pack(from) : load_partial(from, channels - c));
        }
}

// Clones cannot be templates: one named function for each pair of types.
#define SPOS_STORAGE(T, A)                                                                                        \
    SPOS_SIMD_CLONES void split_clone(PixelRows<const T> x, int64_t pixels, int64_t half, const ToImage<T>& even, \
                                      PixelRows<A> odd) {                                                         \
        split_rows(x, pixels, half, even, odd);                                                                   \
    }                                                                                                             \
    SPOS_SIMD_CLONES void widen_clone(PixelRows<const T> x, int64_t pixels, int64_t channels, PixelRows<A> to) {  \
        widen_rows(x, pixels, channels, to);                                                                      \
    }
SPOS_STORAGE(float, float)
SPOS_STORAGE(double, double)
SPOS_STORAGE(Half, float)
SPOS_STORAGE(BFloat16, float)
#undef SPOS_STORAGE

#define SPOS_COMPUTE(A)                                                                                               \
    SPOS_SIMD_CLONES void depthwise_narrow(const DepthwiseRows<A>& r) {                                               \
        depthwise<NarrowVector<A>, false>(r);                                                                         \
    }                                                                                                                 \
    SPOS_SIMD_CLONES void fill_clone(PixelRows<const A> x, int64_t pixels, int64_t channels, const ToWindow<A>& to) { \
        fill_rows(x, pixels, channels, to);                                                                           \
    }
SPOS_COMPUTE(float)
SPOS_COMPUTE(double)
#undef SPOS_COMPUTE
SPOS_SIMD_WIDE void finish_wide() {
    end_of_stream();
}
SPOS_SIMD_WIDE void depthwise_wide(const DepthwiseRows<float>& r) {
    depthwise<WideVector<float>, true>(r);
}
SPOS_SIMD_WIDE void depthwise_wide(const DepthwiseRows<double>& r) {
    depthwise<WideVector<double>, true>(r);
}

}  // namespace

void finish_streams() {
    if (machine_is_wide()) finish_wide();
}

template <typename A>
void depthwise_rows(const DepthwiseRows<A>& rows) {
    machine_is_wide() ? depthwise_wide(rows) : depthwise_narrow(rows);
}

template <typename A, typename T>
void split_channels(PixelRows<const T> x, int64_t pixels, int64_t half, const ToImage<T>& even, PixelRows<A> odd) {
    if constexpr (std::is_same_v<T, float>)
        if (even.stream && machine_is_wide())
            return split_stream(x, pixels, half, PixelRows<float>{even.start, even.pitch}, odd);
    split_clone(x, pixels, half, even, odd);
}

template <typename A, typename T>
void widen_channels(PixelRows<const T> x, int64_t pixels, int64_t channels, PixelRows<A> to) {
    widen_clone(x, pixels, channels, to);
}

template <typename A>
void fill_window(PixelRows<const A> x, int64_t pixels, int64_t channels, const ToWindow<A>& to) {
    fill_clone(x, pixels, channels, to);
}

#define SPOS_INSTANTIATE(T, A)                                                                           \
    template void split_channels(PixelRows<const T>, int64_t, int64_t, const ToImage<T>&, PixelRows<A>); \
    template void widen_channels(PixelRows<const T>, int64_t, int64_t, PixelRows<A>);
SPOS_INSTANTIATE(float, float)
SPOS_INSTANTIATE(double, double)
SPOS_INSTANTIATE(Half, float)
SPOS_INSTANTIATE(BFloat16, float)
#undef SPOS_INSTANTIATE
#define SPOS_INSTANTIATE(A)                                \
    template void depthwise_rows(const DepthwiseRows<A>&); \
    template void fill_window(PixelRows<const A>, int64_t, int64_t, const ToWindow<A>&);
SPOS_INSTANTIATE(float)
SPOS_INSTANTIATE(double)
#undef SPOS_INSTANTIATE

}  // namespace spos::cpu
