// Vector code for several instruction sets from one source, by the vector extension that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/dtype.h"

// SPOS_FIXED_TARGET leaves all to the compiler's own target: tests run the code of lesser machines with it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(SPOS_FIXED_TARGET)
#define SPOS_SIMD_CHOICE
#include <immintrin.h>
#endif

// The loader picks the best clone for the machine that runs it: GCC on x86-64 with glibc, whose ifunc clones need.
// Elsewhere the compiler's own target is used.
#ifdef SPOS_SIMD_CHOICE
#define SPOS_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPOS_SIMD_CLONES
#endif

// Code that is only worth having with the 32 vector registers of AVX-512; callers ask machine_is_wide() first.
#ifdef SPOS_SIMD_CHOICE
#define SPOS_SIMD_WIDE __attribute__((target("arch=x86-64-v4")))
#else
#define SPOS_SIMD_WIDE
#endif

// What a clone calls must be inlined into it, or it would run the default instruction set.
#define SPOS_SIMD_INLINE inline __attribute__((always_inline))

namespace spos::cpu {

inline bool machine_is_wide() {
#ifdef SPOS_SIMD_CHOICE
    static const bool wide = __builtin_cpu_supports("x86-64-v4");
    return wide;
#elif defined(__AVX512F__)
    return true;
#else
    return false;
#endif
}

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

SPOS_SIMD_INLINE void store_pack(float* to, const FloatPack& pack) {
    std::memcpy(to, &pack, sizeof pack);
}

SPOS_SIMD_INLINE void store_pack(double* to, const DoublePack& pack) {
    std::memcpy(to, &pack, sizeof pack);
}

// Past the caches, to an address that is a multiple of the pack's size: for what fits in no cache, and so would only be
// read before it is written, and push out what is needed. Only for code under SPOS_SIMD_WIDE.
#ifdef SPOS_SIMD_CHOICE
SPOS_SIMD_WIDE inline __attribute__((always_inline)) void stream_pack(float* to, const FloatPack& pack) {
    _mm512_stream_ps(to, reinterpret_cast<__m512>(pack));
}
SPOS_SIMD_WIDE inline __attribute__((always_inline)) void end_of_stream() {
    _mm_sfence();
}
#else
SPOS_SIMD_INLINE void stream_pack(float* to, const FloatPack& pack) {
    store_pack(to, pack);
}
SPOS_SIMD_INLINE void end_of_stream() {}
#endif

// Whether rows are whole packs in places that stream_pack() takes.
template <typename T>
bool streamable(const T* to, int64_t pitch, int64_t channels) {
    constexpr uintptr_t kSize = kPack * sizeof(T);
    return reinterpret_cast<uintptr_t>(to) % kSize == 0 && pitch % kPack == 0 && channels % kPack == 0;
}

// To the nearest, ties to even; a NaN stays one.
SPOS_SIMD_INLINE void store_pack(BFloat16* to, const FloatPack& pack) {
    const auto bits = reinterpret_cast<detail::WordPack>(pack);
    const auto is_nan = reinterpret_cast<detail::WordPack>((bits & 0x7fffffffu) > 0x7f800000u);
    const detail::WordPack rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
    const auto result = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), detail::ShortPack);
    std::memcpy(to, &result, sizeof result);
}

SPOS_SIMD_INLINE void store_pack(Half* to, const FloatPack& pack) {
    const auto bits = reinterpret_cast<detail::WordPack>(pack);
    const detail::WordPack magnitude = bits & 0x7fffffffu;
    const detail::WordPack normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    // 0.5 has the exponent at which the last bit of a float is that of a subnormal half: the addition rounds.
    const FloatPack shifted = reinterpret_cast<FloatPack>(magnitude) + 0.5f;
    const detail::WordPack subnormal = reinterpret_cast<detail::WordPack>(shifted) - 0x3f000000u;
    const auto is_small = reinterpret_cast<detail::WordPack>(magnitude < 0x38800000u);
    const auto is_large = reinterpret_cast<detail::WordPack>(magnitude >= 0x47800000u);
    const auto is_nan = reinterpret_cast<detail::WordPack>(magnitude > 0x7f800000u);
    const detail::WordPack special = 0x7c00u | (is_nan & 0x200u);
    const detail::WordPack half =
        (special & is_large) | (subnormal & is_small) | (normal & ~(is_large | is_small)) | (bits >> 16 & 0x8000u);
    const auto result = __builtin_convertvector(half, detail::ShortPack);
    std::memcpy(to, &result, sizeof result);
}

// The first `n` < kPack values; nothing behind them is written.
template <typename T, typename Pack>
SPOS_SIMD_INLINE void store_partial(T* to, const Pack& pack, int64_t n) {
    T padded[kPack];
    store_pack(padded, pack);
    std::memcpy(to, padded, n * sizeof(T));
}

// The first `n` < kPack values, zeros behind them; nothing beyond is read.
template <typename T>
SPOS_SIMD_INLINE auto load_partial(const T* from, int64_t n) {
    T padded[kPack] = {};
    std::memcpy(padded, from, n * sizeof(T));
    return load_pack(padded);
}

// Every other lane of two packs that lie one behind the other.
template <typename Pack>
SPOS_SIMD_INLINE Pack even_lanes(const Pack& low, const Pack& high) {
    return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
template <typename Pack>
SPOS_SIMD_INLINE Pack odd_lanes(const Pack& low, const Pack& high) {
    return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// Two packs' lanes in turn: the first halves of both, and the second halves.
template <typename Pack>
SPOS_SIMD_INLINE Pack low_lanes_in_turn(const Pack& even, const Pack& odd) {
    return __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
template <typename Pack>
SPOS_SIMD_INLINE Pack high_lanes_in_turn(const Pack& even, const Pack& odd) {
    return __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Asks for `rows` rows of `bytes` bytes, `pitch` bytes apart, before they are needed: into the second-level cache,
// where they do not push out what is being worked on. kWrite: they are about to be written.
template <bool kWrite>
inline void prefetch_rows(const void* from, int64_t pitch, int64_t rows, int64_t bytes) {
    constexpr int64_t kLine = 64;
    const char* row = static_cast<const char*>(from);
    for (int64_t r = 0; r < rows; ++r, row += pitch)
        for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(row + at, kWrite, 2);
}

template <typename A, typename Pack>
SPOS_SIMD_INLINE A sum_of(const Pack& pack, int64_t lanes = kPack) {
    A sum = 0;
    for (int64_t j = 0; j < lanes; ++j) sum += pack[j];
    return sum;
}

}  // namespace spos::cpu
