#include "csrc/cpu/matrix.h"

#include "csrc/cpu/deviations.h"

namespace spos::cpu {
namespace {

// R rows by N packs. Rows are reached from every third row's pointer: one pointer a row would not fit in the general
// registers, and base + step and base + 2 step cost nothing.
template <int R, int N, typename A>
SPOS_SIMD_INLINE void tile(const Product<A>& p, const A* a, const A* start, A* c, const char* ahead, bool fresh) {
    using Pack = decltype(load_pack(a));
    constexpr int kGroups = (R + 2) / 3;
    const A* base[kGroups];
    for (int g = 0; g < kGroups; ++g) base[g] = a + 3 * g * p.row_step;
    Pack sum[R][N];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = load_pack(start + i * p.start_pitch + j * kPack);

    const A* b = p.b;
    for (int64_t k = 0; k < p.depth; ++k, ahead += p.ahead_step) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + 64, 0, 2);
        Pack row[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) row[j] = load_pack(b + j * kPack);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const A value = base[i / 3][(i % 3) * p.row_step];
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] += value * row[j];
        }
        b += p.b_pitch;
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) base[g] += p.depth_step;
    }
    if (p.deviations)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) add_deviations(&sum[0][j], R, N, p.deviations + j * kDeviations, fresh);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) std::memcpy(c + i * p.c_pitch + j * kPack, &sum[i][j], sizeof(Pack));
}

template <int R, int N, typename A>
SPOS_SIMD_INLINE int64_t tiles(const Product<A>& p, int64_t i) {
    const char* ahead = p.ahead ? p.ahead : reinterpret_cast<const char*>(p.b);
    for (; i + R <= p.rows; i += R, ahead += p.depth * p.ahead_step)
        tile<R, N>(p, p.a + i * p.row_step, p.start + i * p.start_pitch, p.c + i * p.c_pitch, ahead, p.fresh && i == 0);
    return i;
}

template <int R, int N, typename A>
SPOS_SIMD_INLINE void all_tiles(const Product<A>& p) {
    int64_t i = tiles<R, N>(p, 0);
    if constexpr (R > 4) i = tiles<4, N>(p, i);
    tiles<1, N>(p, i);
}

// With the 32 registers of AVX-512, 28 of them sums (24 of three packs); with fewer or narrower ones, 12.
SPOS_SIMD_WIDE void multiply_wide_3(const Product<float>& p) {
    all_tiles<8, 3>(p);
}
SPOS_SIMD_WIDE void multiply_wide_2(const Product<float>& p) {
    all_tiles<14, 2>(p);
}
SPOS_SIMD_WIDE void multiply_wide_1(const Product<float>& p) {
    all_tiles<14, 1>(p);
}
SPOS_SIMD_CLONES void multiply_narrow(const Product<float>& p) {
    all_tiles<6, 1>(p);
}
SPOS_SIMD_CLONES void multiply_double(const Product<double>& p) {
    all_tiles<4, 1>(p);
}

}  // namespace

int64_t panel_packs() {
    return machine_is_wide() ? 2 : 1;
}

void multiply(const Product<float>& product) {
    if (!machine_is_wide()) return multiply_narrow(product);
    if (product.packs == 3) return multiply_wide_3(product);
    if (product.packs == 2) return multiply_wide_2(product);
    multiply_wide_1(product);
}

void multiply(const Product<double>& product) {
    for (int64_t j = 0; j < product.packs; ++j) {
        Product<double> column = product;
        column.b += j * kPack, column.start += j * kPack, column.c += j * kPack;
        if (column.deviations) column.deviations += j * kDeviations;
        multiply_double(column);
    }
}

}  // namespace spos::cpu
