// Vector code for several instruction sets from one source, by the vector extension that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/dtype.h"

// The loader picks the best clone for the machine that runs it: GCC on x86-64 with glibc, whose ifunc clones need.
// Elsewhere the compiler's own target is used.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SPOS_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPOS_SIMD_CLONES
#endif

// What a clone calls must be inlined into it, or it would run the default instruction set.
#define SPOS_SIMD_INLINE inline __attribute__((always_inline))

namespace spos::cpu {

// A pack is always 16 lanes, whatever the registers are: results then do not depend on the machine's vector width.
constexpr int64_t kPack = 16;
typedef float FloatPack __attribute__((vector_size(kPack * sizeof(float))));
typedef double DoublePack __attribute__((vector_size(kPack * sizeof(double))));

SPOS_SIMD_INLINE FloatPack load_pack(const float* from) {
    FloatPack pack;
    std::memcpy(&pack, from, sizeof pack);
    return pack;
}

SPOS_SIMD_INLINE DoublePack load_pack(const double* from) {
    DoublePack pack;
    std::memcpy(&pack, from, sizeof pack);
    return pack;
}

namespace detail {
typedef uint16_t ShortPack __attribute__((vector_size(kPack * sizeof(uint16_t))));
typedef uint32_t WordPack __attribute__((vector_size(kPack * sizeof(uint32_t))));

SPOS_SIMD_INLINE WordPack load_bits(const void* from) {
    ShortPack bits;
    std::memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, WordPack);
}
}  // namespace detail

SPOS_SIMD_INLINE FloatPack load_pack(const BFloat16* from) {
    return reinterpret_cast<FloatPack>(detail::load_bits(from) << 16);
}

SPOS_SIMD_INLINE FloatPack load_pack(const Half* from) {  // as widen(Half)
    const detail::WordPack bits = detail::load_bits(from), magnitude = bits & 0x7fffu;
    const FloatPack scaled = reinterpret_cast<FloatPack>(magnitude << 13) * 5.192296858534828e33f;
    const auto special = reinterpret_cast<detail::WordPack>(magnitude >= 0x7c00u) & 0x7f800000u;
    return reinterpret_cast<FloatPack>(reinterpret_cast<detail::WordPack>(scaled) | special | (bits & 0x8000u) << 16);
}

// The first `n` < kPack values, zeros behind them; nothing beyond is read.
template <typename T>
SPOS_SIMD_INLINE auto load_partial(const T* from, int64_t n) {
    T padded[kPack] = {};
    std::memcpy(padded, from, n * sizeof(T));
    return load_pack(padded);
}

template <typename A, typename Pack>
SPOS_SIMD_INLINE A sum_of(const Pack& pack, int64_t lanes = kPack) {
    A sum = 0;
    for (int64_t j = 0; j < lanes; ++j) sum += pack[j];
    return sum;
}

}  // namespace spos::cpu
