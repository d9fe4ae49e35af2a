// The 1x1 convolutions of fused inference: products with a shift before and a ReLU behind, a tile of sums in registers.
#include <algorithm>
#include <type_traits>

#include "csrc/cpu/unit_infer_kernels.h"
#include "csrc/cpu/unit_infer_vectors.h"

namespace spos::cpu {
namespace {

// An image that takes whole packs past the caches; only for code under SPOS_SIMD_WIDE.
struct ToStream {
    float* start;
    int64_t pitch;
};

// Where a pack of a pixel goes.
template <typename A>
SPOS_SIMD_INLINE A* place(const ToWindow<A>& to, int64_t pixel, int64_t pack) {
    return to.start + to.places[pixel] + pack * to.plane;
}
template <typename T>
SPOS_SIMD_INLINE T* place(const ToImage<T>& to, int64_t pixel, int64_t pack) {
    return to.start + pixel * to.pitch + pack * kPack;
}
SPOS_SIMD_INLINE float* place(const ToStream& to, int64_t pixel, int64_t pack) {
    return to.start + pixel * to.pitch + pack * kPack;
}

// How many of the `packs` packs' values from pack `first` on are stored.
template <typename T>
SPOS_SIMD_INLINE int64_t values_of(const ToImage<T>& to, int64_t first, int64_t packs) {
    return std::min(packs * kPack, to.channels - first * kPack);
}
template <typename To>
SPOS_SIMD_INLINE int64_t values_of(const To&, int64_t, int64_t packs) {
    return packs * kPack;
}

// A pack in the vectors that it is made of.
template <typename To, typename V>
SPOS_SIMD_INLINE void put(const To& to, int64_t pixel, int64_t pack, const V* parts) {
    using A = std::remove_const_t<std::remove_reference_t<decltype(parts[0][0])>>;
    auto* at = place(to, pixel, pack);
    constexpr int kLanes = sizeof(V) / sizeof(A);
    if constexpr (std::is_same_v<decltype(at), A*>) {
#pragma GCC unroll 4
        for (int h = 0; h < kPack / kLanes; ++h) std::memcpy(at + h * kLanes, parts + h, sizeof(V));
    } else if constexpr (kLanes == kPack) {
        store_pack(at, parts[0]);
    } else {
        A all[kPack];
        for (int h = 0; h < kPack / kLanes; ++h) std::memcpy(all + h * kLanes, parts + h, sizeof(V));
        store_pack(at, load_pack(all));
    }
}
// In assembly, because a template for all targets may not call an intrinsic of one of them, even where it is only
// inlined into code for that one.
SPOS_SIMD_INLINE void put(const ToStream& to, int64_t pixel, int64_t pack, const FloatPack* value) {
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<FloatPack*>(place(to, pixel, pack))) : "v"(*value));
#else
    store_pack(place(to, pixel, pack), *value);
#endif
}

// Asks for the lines of an image that a tile will write: it would wait for each of them. What goes past the caches, or
// into a window that lies in them, needs none.
template <typename T>
SPOS_SIMD_INLINE void expect(const ToImage<T>& to, int64_t pixel, int64_t pack) {
    __builtin_prefetch(place(to, pixel, pack), 1);
}
template <typename To>
SPOS_SIMD_INLINE void expect(const To&, int64_t, int64_t) {}

constexpr int64_t kLine = 64;

// R pixels by `kPacks` packs in registers, from pack `first` on. Pixels are reached from every third one's pointer: one
// pointer a pixel would not fit in the general registers, and base + pitch and base + 2 pitch cost nothing.
template <typename V, int R, int kPacks, typename A, typename To>
SPOS_SIMD_INLINE void tile(const PointwisePanel<A>& p, int64_t pixel, int64_t first, const To& to) {
    constexpr int kLanes = sizeof(V) / sizeof(A), kParts = kPack / kLanes, N = kPacks * kParts, kGroups = (R + 2) / 3;
    const A* base[kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) base[g] = p.a.start + (pixel + 3 * g) * p.a.pitch;
    V sum[R][N];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = load_vector<V>(p.shift + first * kPack + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kPacks; ++j) expect(to, pixel + i, first + j);

    const A* b = p.b + first * kPack;
    const char* next = p.ahead->next;
    for (int64_t left = p.depth; left > 0; left -= kStepsAShare) {
        const char* end = std::min(p.ahead->end, next + p.ahead->share);
        for (; next < end; next += kLine) __builtin_prefetch(next, 0, 2);
        for (int64_t k = std::min(left, kStepsAShare); k > 0; --k) {
            V row[N];
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) row[j] = load_vector<V>(b + j * kLanes);
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

    const int64_t values = values_of(to, first, kPacks);
    if (values == kPacks * kPack) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kPacks; ++j) {
                V parts[kParts];
#pragma GCC unroll 4
                for (int h = 0; h < kParts; ++h) parts[h] = relu(sum[i][j * kParts + h]);
                put(to, pixel + i, first + j, parts);
            }
    } else {
        A all[R][kPacks * kPack];  // a copy in memory: the sums themselves stay in registers
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) {
                const V value = relu(sum[i][j]);
                std::memcpy(all[i] + j * kLanes, &value, sizeof value);
            }
        for (int i = 0; i < R; ++i)
            for (int64_t c = 0; c < values; c += kPack)
                store_partial(place(to, pixel + i, first) + c, load_pack(all[i] + c), std::min(kPack, values - c));
    }
}

template <typename V, int R, int kPacks, typename A, typename To>
SPOS_SIMD_INLINE void tiles(const PointwisePanel<A>& p, int64_t pixel, int64_t first, const To& to) {
    for (; pixel + R <= p.pixels; pixel += R) tile<V, R, kPacks>(p, pixel, first, to);
    if constexpr (R > 1) tiles<V, R == 14 ? 7 : R / 2, kPacks>(p, pixel, first, to);
}

// With the 32 registers of AVX-512, 28 of them sums (24 of three packs); with 16, 12.
template <typename A, typename To>
SPOS_SIMD_INLINE void wide_tiles(const PointwisePanel<A>& p, const To& to) {
    if constexpr (std::is_same_v<A, float>) switch (p.packs) {
            case 3:
                return tiles<WideVector<A>, 8, 3>(p, 0, 0, to);
            case 2:
                return tiles<WideVector<A>, 14, 2>(p, 0, 0, to);
        }
    for (int64_t pack = 0; pack < p.packs; ++pack) tiles<WideVector<A>, 14, 1>(p, 0, pack, to);
}
template <typename A, typename To>
SPOS_SIMD_INLINE void narrow_tiles(const PointwisePanel<A>& p, const To& to) {
    for (int64_t pack = 0; pack < p.packs; ++pack)
        tiles<NarrowVector<A>, sizeof(A) == sizeof(float) ? 6 : 3, 1>(p, 0, pack, to);
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

template void pointwise_relu(const PointwisePanel<float>&, const ToWindow<float>&);
template void pointwise_relu(const PointwisePanel<double>&, const ToWindow<double>&);
template void pointwise_relu(const PointwisePanel<float>&, const ToImage<float>&);
template void pointwise_relu(const PointwisePanel<float>&, const ToImage<Half>&);
template void pointwise_relu(const PointwisePanel<float>&, const ToImage<BFloat16>&);
template void pointwise_relu(const PointwisePanel<double>&, const ToImage<double>&);

}  // namespace spos::cpu
