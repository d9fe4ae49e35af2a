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

// For a value that is used several times. GCC would load it again for each of them.
template <typename V>
SPOS_SIMD_INLINE void keep_in_register(V& vector) {
#ifdef SPOS_SIMD_CHOICE
    if constexpr (sizeof(V) == 64) asm("" : "+v"(vector));
#else
    (void)vector;
#endif
}

// max(0, value); a NaN stays one. GCC makes a comparison and a masked move of what is written out below.
template <typename V>
SPOS_SIMD_INLINE V relu(const V& value) {
    const V zero = {};
#ifdef SPOS_SIMD_CHOICE
    if constexpr (sizeof(V) == 64) {
        V result;
        if constexpr (sizeof(value[0]) == 4)
            asm("vmaxps %1, %2, %0" : "=v"(result) : "v"(value), "v"(zero));
        else
            asm("vmaxpd %1, %2, %0" : "=v"(result) : "v"(value), "v"(zero));
        return result;
    }
#endif
    return value < zero ? zero : value;
}

}  // namespace spos::cpu
