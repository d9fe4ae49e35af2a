// Weights of 1x1 convolutions as products read them: turned, in panels, and with scales in them.
#include <algorithm>
#include <type_traits>

#include "csrc/cpu/moments.h"
#include "csrc/cpu/unit_infer_kernels.h"

namespace spos::cpu {
namespace {

template <typename Pack>
struct Square {
    Pack rows[kPack];
};

// Four rounds of taking rows j and j + 8 in turn transpose a square of 16.
SPOS_SIMD_INLINE void transpose_in_registers(Square<FloatPack>& square) {
    Square<FloatPack> turned;
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < kPack / 2; ++j) {
            turned.rows[2 * j] = low_lanes_in_turn(square.rows[j], square.rows[j + kPack / 2]);
            turned.rows[2 * j + 1] = high_lanes_in_turn(square.rows[j], square.rows[j + kPack / 2]);
        }
        square = turned;
    }
}

template <typename Pack>
SPOS_SIMD_INLINE void transpose_in_memory(Square<Pack>& square) {
    for (int64_t i = 0; i < kPack; ++i)
        for (int64_t j = 0; j < i; ++j) std::swap(square.rows[i][j], square.rows[j][i]);
}

template <bool kWide, typename A, typename T>
SPOS_SIMD_INLINE void pack_panel(const T* weights, int64_t pitch, const PackScale<A>& scale, int64_t index,
                                 const Panels<A>& packed) {
    using Pack = decltype(load_pack(scale.column));
    const int64_t first = index * panel_packs() * kPack;
    const int64_t width = packs_of_panel(index, divide_up(packed.columns, kPack)) * kPack;
    A* panel = packed.panel(index);
    for (int64_t at = 0; at < width; at += kPack, panel += kPack) {
        const int64_t column = first + at, columns = std::min(kPack, packed.columns - column);
        Pack factor = Pack{} + A(1);
        if (scale.column)
            factor = columns == kPack ? load_pack(scale.column + column) : load_partial(scale.column + column, columns);
        for (int64_t k = 0; k < packed.depth; k += kPack) {
            const int64_t depth = std::min(kPack, packed.depth - k);
            Pack before = Pack{} + A(1);
            if (scale.depth)
                before = depth == kPack ? load_pack(scale.depth + k) : load_partial(scale.depth + k, depth);
            Square<Pack> square = {};
            for (int64_t j = 0; j < columns; ++j) {
                const T* row = weights + (column + j) * pitch + k;
                square.rows[j] = (depth == kPack ? load_pack(row) : load_partial(row, depth)) * before;
            }
            if constexpr (kWide)
                transpose_in_registers(square);
            else
                transpose_in_memory(square);
            for (int64_t j = 0; j < depth; ++j) store_pack(panel + (k + j) * width, square.rows[j] * factor);
        }
    }
}

// Clones cannot be templates: one named function for each type.
#define SPOS_PACK(T, A)                                                                                     \
    SPOS_SIMD_CLONES void narrow(const T* weights, int64_t pitch, const PackScale<A>& scale, int64_t index, \
                                 const Panels<A>& to) {                                                     \
        pack_panel<false>(weights, pitch, scale, index, to);                                                \
    }
#define SPOS_PACK_WIDE(T, A)                                                                            \
    SPOS_SIMD_WIDE void wide(const T* weights, int64_t pitch, const PackScale<A>& scale, int64_t index, \
                             const Panels<A>& to) {                                                     \
        pack_panel<true>(weights, pitch, scale, index, to);                                             \
    }
SPOS_PACK(float, float)
SPOS_PACK(double, double)
SPOS_PACK(Half, float)
SPOS_PACK(BFloat16, float)
SPOS_PACK_WIDE(float, float)
SPOS_PACK_WIDE(Half, float)
SPOS_PACK_WIDE(BFloat16, float)
#undef SPOS_PACK
#undef SPOS_PACK_WIDE

}  // namespace

template <typename A, typename T>
void pack_pointwise(const T* weights, int64_t pitch, const PackScale<A>& scale, int64_t index, const Panels<A>& to) {
    if constexpr (std::is_same_v<A, float>)
        if (machine_is_wide()) return wide(weights, pitch, scale, index, to);
    narrow(weights, pitch, scale, index, to);
}

template void pack_pointwise(const float*, int64_t, const PackScale<float>&, int64_t, const Panels<float>&);
template void pack_pointwise(const double*, int64_t, const PackScale<double>&, int64_t, const Panels<double>&);
template void pack_pointwise(const Half*, int64_t, const PackScale<float>&, int64_t, const Panels<float>&);
template void pack_pointwise(const BFloat16*, int64_t, const PackScale<float>&, int64_t, const Panels<float>&);

}  // namespace spos::cpu
