#include "csrc/cpu/unit_infer_kernels.h"

#include <algorithm>
#include <type_traits>

namespace spos::cpu {
namespace {

template <typename Pack>
SPOS_SIMD_INLINE Pack relu(const Pack& value) {
    const Pack zero = {};
    return value < zero ? zero : value;  // a NaN stays one
}

template <typename A, typename Pack>
SPOS_SIMD_INLINE void put(const ToWindow<A>& to, int64_t pixel, int64_t pack, const Pack& value) {
    store_pack(to.start + to.places[pixel] + pack * to.plane, value);
}

template <typename T, typename Pack>
SPOS_SIMD_INLINE void put(const ToImage<T>& to, int64_t pixel, int64_t pack, const Pack& value) {
    store_pack(to.start + pixel * to.pitch + pack * kPack, value);
}

// An image that takes whole packs past the caches; only for code under SPOS_SIMD_WIDE. In assembly, because a template
// for all targets may not call an intrinsic of one of them, even where it is only inlined into code for that one.
struct ToStream {
    float* start;
    int64_t pitch;
};
SPOS_SIMD_INLINE void put(const ToStream& to, int64_t pixel, int64_t pack, const FloatPack& value) {
    float* place = to.start + pixel * to.pitch + pack * kPack;
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<FloatPack*>(place)) : "v"(value));
#else
    store_pack(place, value);
#endif
}

// Whether `packs` packs from `first` on are whole ones.
template <typename T>
SPOS_SIMD_INLINE bool are_whole(const ToImage<T>& to, int64_t first, int64_t packs) {
    return to.channels >= (first + packs) * kPack;
}
template <typename To>
SPOS_SIMD_INLINE bool are_whole(const To&, int64_t, int64_t) {
    return true;
}
template <typename T, typename Pack>
SPOS_SIMD_INLINE void put_partial(const ToImage<T>& to, int64_t pixel, int64_t pack, const Pack& value) {
    const int64_t left = to.channels - pack * kPack;
    if (left >= kPack)
        put(to, pixel, pack, value);
    else
        store_partial(to.start + pixel * to.pitch + pack * kPack, value, left);
}
template <typename To, typename Pack>
SPOS_SIMD_INLINE void put_partial(const To&, int64_t, int64_t, const Pack&) {}

// Asks for the lines of an image that a tile will write: it would wait for each of them. What goes past the caches, or
// into a window that lies in them, needs none.
template <typename T>
SPOS_SIMD_INLINE void expect(const ToImage<T>& to, int64_t pixel, int64_t pack) {
    __builtin_prefetch(to.start + pixel * to.pitch + pack * kPack, 1);
}
template <typename To>
SPOS_SIMD_INLINE void expect(const To&, int64_t, int64_t) {}

constexpr int64_t kLine = 64;

// R pixels by N packs in registers, from pack `first` on. Pixels are reached from every third one's pointer: one
// pointer a pixel would not fit in the general registers, and base + pitch and base + 2 pitch cost nothing.
template <int R, int N, typename A, typename To>
SPOS_SIMD_INLINE void tile(const PointwisePanel<A>& p, int64_t pixel, int64_t first, const To& to) {
    using Pack = decltype(load_pack(p.b));
    constexpr int kGroups = (R + 2) / 3;
    const A* base[kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) base[g] = p.a.start + (pixel + 3 * g) * p.a.pitch;
    Pack sum[R][N];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = load_pack(p.shift + (first + j) * kPack);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) expect(to, pixel + i, first + j);
    const A* b = p.b + first * kPack;
    const char* next = p.ahead->next;
    for (int64_t left = p.depth; left > 0; left -= kStepsAShare) {
        const char* end = std::min(p.ahead->end, next + p.ahead->share);
        for (; next < end; next += kLine) __builtin_prefetch(next, 0, 2);
        for (int64_t k = std::min(left, kStepsAShare); k > 0; --k) {
            Pack row[N];
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) row[j] = load_pack(b + j * kPack);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) {
                const A value = base[i / 3][(i % 3) * p.a.pitch];
#pragma GCC unroll 4
                for (int j = 0; j < N; ++j) sum[i][j] += value * row[j];
            }
            b += p.packs * kPack;
#pragma GCC unroll 8
            for (int g = 0; g < kGroups; ++g) ++base[g];
        }
    }
    p.ahead->next = next;
    if (are_whole(to, first, N)) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) put(to, pixel + i, first + j, relu(sum[i][j]));
    } else {
        Pack all[R][N];  // a copy in memory: the sums themselves stay in registers
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) all[i][j] = relu(sum[i][j]);
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) put_partial(to, pixel + i, first + j, all[i][j]);
    }
}

template <int R, int N, typename A, typename To>
SPOS_SIMD_INLINE void tiles(const PointwisePanel<A>& p, int64_t pixel, int64_t first, const To& to) {
    for (; pixel + R <= p.pixels; pixel += R) tile<R, N>(p, pixel, first, to);
    if constexpr (R > 1) tiles<R == 14 ? 7 : R / 2, N>(p, pixel, first, to);
}

// With the 32 registers of AVX-512, 28 of them sums; with fewer or narrower ones, 12.
template <typename To>
SPOS_SIMD_WIDE inline __attribute__((always_inline)) void wide_tiles(const PointwisePanel<float>& p, const To& to) {
    if (p.packs == 2)
        tiles<14, 2>(p, 0, 0, to);
    else
        tiles<14, 1>(p, 0, 0, to);
}
template <typename To>
SPOS_SIMD_WIDE inline __attribute__((always_inline)) void wide_tiles(const PointwisePanel<double>& p, const To& to) {
    for (int64_t pack = 0; pack < p.packs; ++pack) tiles<14, 1>(p, 0, pack, to);
}
template <typename A, typename To>
SPOS_SIMD_INLINE void narrow_tiles(const PointwisePanel<A>& p, const To& to) {
    for (int64_t pack = 0; pack < p.packs; ++pack) tiles<sizeof(A) == sizeof(float) ? 6 : 3, 1>(p, 0, pack, to);
}

// kWidth neighbouring pixels of one row; those from `used` on are computed and dropped.
template <int kKernel, int kStride, int kWidth, typename A>
SPOS_SIMD_INLINE void depthwise_tile(const DepthwiseRows<A>& r, int64_t slot, int64_t first, int64_t count, int64_t x,
                                     int64_t used, A* to) {
    using Pack = decltype(load_pack(r.taps));
    Pack sum[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sum[i] = load_pack(r.shift);
    const A* taps = r.taps + first * kKernel * kPack;
    for (int64_t ky = 0; ky < count; ++ky, taps += kKernel * kPack) {
        const A* row = r.window + slot * r.shape.length + x * kStride * kPack;
        if (++slot == r.shape.slots) slot = 0;
        Pack tap[kKernel];
#pragma GCC unroll 8
        for (int kx = 0; kx < kKernel; ++kx) tap[kx] = load_pack(taps + kx * kPack);
#pragma GCC unroll 64
        for (int i = 0; i < (kWidth - 1) * kStride + kKernel; ++i) {
            const Pack value = load_pack(row + i * kPack);
#pragma GCC unroll 8
            for (int kx = 0; kx < kKernel; ++kx)
                if (i >= kx && (i - kx) % kStride == 0 && (i - kx) / kStride < kWidth)
                    sum[(i - kx) / kStride] += tap[kx] * value;
        }
    }
    if (used >= kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store_pack(to + i * r.to.pitch, sum[i]);
    } else {
        A all[kWidth][kPack];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store_pack(all[i], sum[i]);
        for (int64_t i = 0; i < used; ++i) std::memcpy(to + i * r.to.pitch, all[i], sizeof all[i]);
    }
}

template <int kKernel, int kStride, bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise_tiles(const DepthwiseRows<A>& r, int64_t slot, int64_t first, int64_t count, A* to) {
    int64_t x = 0;
    if constexpr (kWide) {
        for (; x + 14 <= r.width; x += 14)
            depthwise_tile<kKernel, kStride, 14>(r, slot, first, count, x, 14, to + x * r.to.pitch);
        if (x + 7 <= r.width) {
            depthwise_tile<kKernel, kStride, 7>(r, slot, first, count, x, 7, to + x * r.to.pitch);
            x += 7;
        }
    }
    for (; x < r.width; x += 4)
        depthwise_tile<kKernel, kStride, 4>(r, slot, first, count, x, r.width - x, to + x * r.to.pitch);
}

// Any kernel size and stride.
template <typename A>
SPOS_SIMD_INLINE void depthwise_any(const DepthwiseRows<A>& r, int64_t slot, int64_t first, int64_t count, A* to) {
    for (int64_t x = 0; x < r.width; ++x) {
        auto sum = load_pack(r.shift);
        for (int64_t ky = 0; ky < count; ++ky) {
            const A* row = r.window + (slot + ky) % r.shape.slots * r.shape.length + x * r.stride * kPack;
            for (int64_t kx = 0; kx < r.kernel; ++kx)
                sum += load_pack(r.taps + ((first + ky) * r.kernel + kx) * kPack) * load_pack(row + kx * kPack);
        }
        store_pack(to + x * r.to.pitch, sum);
    }
}

template <bool kWide, typename A>
SPOS_SIMD_INLINE void depthwise(const DepthwiseRows<A>& r) {
    A* to = r.to.start;
    for (int64_t y = r.begin; y < r.end; ++y, to += r.width * r.to.pitch) {
        const int64_t top = y * r.stride - r.kernel / 2, first = std::max<int64_t>(0, -top);
        const int64_t count = std::min(r.kernel, r.height - top) - first, slot = (top + first) % r.shape.slots;
        switch (r.stride > 2 ? 0 : 2 * r.kernel + r.stride) {
            case 2 * 3 + 1:
                depthwise_tiles<3, 1, kWide>(r, slot, first, count, to);
                break;
            case 2 * 5 + 1:
                depthwise_tiles<5, 1, kWide>(r, slot, first, count, to);
                break;
            case 2 * 7 + 1:
                depthwise_tiles<7, 1, kWide>(r, slot, first, count, to);
                break;
            case 2 * 3 + 2:
                depthwise_tiles<3, 2, kWide>(r, slot, first, count, to);
                break;
            case 2 * 5 + 2:
                depthwise_tiles<5, 2, kWide>(r, slot, first, count, to);
                break;
            case 2 * 7 + 2:
                depthwise_tiles<7, 2, kWide>(r, slot, first, count, to);
                break;
            default:
                depthwise_any(r, slot, first, count, to);
        }
    }
}

// The even and odd ones of 2 * kPack values.
template <typename A, typename T>
SPOS_SIMD_INLINE void split_pack(const T* x, T* even, A* odd) {
    if constexpr (sizeof(T) == sizeof(A)) {
        const auto low = load_pack(x), high = load_pack(x + kPack);
        store_pack(even, even_lanes(low, high));
        store_pack(odd, odd_lanes(low, high));
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

SPOS_SIMD_WIDE void split_stream(PixelRows<const float> x, int64_t pixels, int64_t half, ToStream even,
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
            put(to, p, c / kPack, c + kPack <= channels ? load_pack(from) : load_partial(from, channels - c));
        }
}

// Clones cannot be templates: one named function for each pair of types.
#define SPOS_PRODUCT(A, To)                                                          \
    SPOS_SIMD_CLONES void product_narrow(const PointwisePanel<A>& p, const To& to) { \
        narrow_tiles(p, to);                                                         \
    }                                                                                \
    SPOS_SIMD_WIDE void product_wide(const PointwisePanel<A>& p, const To& to) {     \
        wide_tiles(p, to);                                                           \
    }
SPOS_PRODUCT(float, ToWindow<float>)
SPOS_PRODUCT(float, ToImage<float>)
SPOS_PRODUCT(float, ToImage<Half>)
SPOS_PRODUCT(float, ToImage<BFloat16>)
SPOS_PRODUCT(double, ToWindow<double>)
SPOS_PRODUCT(double, ToImage<double>)
#undef SPOS_PRODUCT
SPOS_SIMD_WIDE void product_wide(const PointwisePanel<float>& p, const ToStream& to) {
    wide_tiles(p, to);
}

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
        depthwise<false>(r);                                                                                          \
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
    depthwise<true>(r);
}

}  // namespace

template <typename A>
void pointwise_relu(const PointwisePanel<A>& panel, const ToWindow<A>& to) {
    machine_is_wide() ? product_wide(panel, to) : product_narrow(panel, to);
}

template <typename A, typename T>
void pointwise_relu(const PointwisePanel<A>& panel, const ToImage<T>& to) {
    if constexpr (std::is_same_v<T, float>)
        if (to.stream && machine_is_wide()) return product_wide(panel, ToStream{to.start, to.pitch});
    machine_is_wide() ? product_wide(panel, to) : product_narrow(panel, to);
}

void finish_streams() {
    if (machine_is_wide()) finish_wide();
}

template <typename A>
void depthwise_rows(const DepthwiseRows<A>& rows) {
    if constexpr (std::is_same_v<A, float>)
        if (machine_is_wide()) return depthwise_wide(rows);
    depthwise_narrow(rows);
}

template <typename A, typename T>
void split_channels(PixelRows<const T> x, int64_t pixels, int64_t half, const ToImage<T>& even, PixelRows<A> odd) {
    if constexpr (std::is_same_v<T, float>)
        if (even.stream && machine_is_wide())
            return split_stream(x, pixels, half, ToStream{even.start, even.pitch}, odd);
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
    template void pointwise_relu(const PointwisePanel<A>&, const ToImage<T>&);                           \
    template void split_channels(PixelRows<const T>, int64_t, int64_t, const ToImage<T>&, PixelRows<A>); \
    template void widen_channels(PixelRows<const T>, int64_t, int64_t, PixelRows<A>);
SPOS_INSTANTIATE(float, float)
SPOS_INSTANTIATE(double, double)
SPOS_INSTANTIATE(Half, float)
SPOS_INSTANTIATE(BFloat16, float)
#undef SPOS_INSTANTIATE
#define SPOS_INSTANTIATE(A)                                                     \
    template void pointwise_relu(const PointwisePanel<A>&, const ToWindow<A>&); \
    template void depthwise_rows(const DepthwiseRows<A>&);                      \
    template void fill_window(PixelRows<const A>, int64_t, int64_t, const ToWindow<A>&);
SPOS_INSTANTIATE(float)
SPOS_INSTANTIATE(double)
#undef SPOS_INSTANTIATE

}  // namespace spos::cpu
