// From values to codes and what passes back, as vector code: what the quantization kernels have in common. The formulas
// stand in spos_fast/ops/quantizers.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/cpu/simd.h"

namespace spos::cpu {

// What a bit-width and a mode say.
struct Quantizer {
    double low, high;  // codes
    bool single;       // one signed bit: the code is the sign, +1 for zero
    bool residual;     // whether code - v is in the gradient of the step; if not, low must be 0
};

// Calls run(single, residual), both as compile-time booleans. A single signed bit is never without residual.
template <typename Run>
SPOS_SIMD_INLINE void with_quantizer(const Quantizer& quantizer, Run run) {
    if (quantizer.single) return run(std::true_type{}, std::true_type{});
    if (quantizer.residual) return run(std::false_type{}, std::true_type{});
    run(std::false_type{}, std::false_type{});
}

// Adding and taking away 1.5 * 2^p, p the mantissa's bits, rounds what is small to the nearest integer, ties to even;
// in between, the lowest bits are those of the integer.
constexpr float rounder(float) {
    return 12582912.0f;
}
constexpr double rounder(double) {
    return 6755399441055744.0;
}

// Codes of values in steps; a NaN stays one.
template <bool kSingle, typename Pack, typename A>
SPOS_SIMD_INLINE Pack code_of(const Pack& v, A low, A high) {
    const Pack least = Pack{} + low, most = Pack{} + high;
    if constexpr (kSingle) {
        const Pack sign = v < 0 ? least : v;
        return v >= 0 ? most : sign;
    } else {
        const Pack raised = v < least ? least : v, clipped = raised > most ? most : raised;
        return (clipped + rounder(A())) - rounder(A());
    }
}

typedef uint8_t BytePack __attribute__((vector_size(kPack)));
typedef uint64_t LongPack __attribute__((vector_size(kPack * sizeof(uint64_t))));

// Whole numbers from -128 to 255 as bytes: their lowest bits stand at the end of the rounded sum.
SPOS_SIMD_INLINE BytePack bytes_of(const FloatPack& code) {
    return __builtin_convertvector(reinterpret_cast<detail::WordPack>(code + rounder(0.0f)), BytePack);
}
SPOS_SIMD_INLINE BytePack bytes_of(const DoublePack& code) {
    return __builtin_convertvector(reinterpret_cast<LongPack>(code + rounder(0.0)), BytePack);
}

// What a gradient turns into, and what of it goes to the step.
template <typename Pack>
struct Passed {
    Pack inside, step;
};
template <bool kSingle, bool kResidual, typename Pack, typename A>
SPOS_SIMD_INLINE Passed<Pack> pass_back(const Pack& grad, const Pack& v, A low, A high) {
    // A NaN is inside: neither at or below the least, nor at or above the most.
    const Pack zero{}, not_below = v <= low ? zero : grad, inside = v >= high ? zero : not_below;
    if constexpr (!kResidual) return {inside, v >= high ? grad * high : zero};
    const Pack base = v <= low ? zero : v, taken = v >= high ? zero : base;
    return {inside, grad * (code_of<kSingle>(v, low, high) - taken)};
}

// A pack of `lanes` values; all where kWhole.
template <bool kWhole, typename T>
SPOS_SIMD_INLINE auto load_lanes(const T* from, int64_t lanes) {
    if constexpr (kWhole)
        return load_pack(from);
    else
        return load_partial(from, lanes);
}
template <bool kWhole, typename T, typename Pack>
SPOS_SIMD_INLINE void store_lanes(T* to, const Pack& pack, int64_t lanes) {
    if constexpr (kWhole)
        store_pack(to, pack);
    else
        store_partial(to, pack, lanes);
}

template <typename Pack>
SPOS_SIMD_INLINE DoublePack in_double(const Pack& pack) {
    return __builtin_convertvector(pack, DoublePack);
}

}  // namespace spos::cpu
