// Vectors for the sums of fused inference.
#pragma once

#include <type_traits>

#include "csrc/cpu/simd.h"

namespace spos::cpu {

// Vectors that fit one register of AVX2 or AVX-512: GCC keeps wider ones in memory, whatever it does with them.
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
template <typename A>
using WideVector = std::conditional_t<std::is_same_v<A, float>, FloatPack, Double8>;
template <typename A>
using NarrowVector = std::conditional_t<std::is_same_v<A, float>, Float8, Double4>;

template <typename V, typename A>
SPOS_SIMD_INLINE V load_vector(const A* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

}  // namespace spos::cpu
