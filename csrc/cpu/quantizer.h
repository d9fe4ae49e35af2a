// From values to codes and what passes back, as vector code: what the quantization kernels have in common. The formulas
// stand in spos_fast/ops/quantizers.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/cpu/simd.h"

namespace spos::cpu {

// What a bit-width and a mode say.
struct Quantizer {
    double low, high;  // codes
    bool single;       // one signed bit: the code is the sign, +1 for zero
    bool residual;     // whether code - v is in the gradient of the step
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

// Values from -128 to 255, rounded, as bytes: the lowest bits of the integer stand at the end of the sum.
SPOS_SIMD_INLINE BytePack bytes_of(const FloatPack& code) {
    // In two steps, which GCC makes vector code of.
    const auto words = reinterpret_cast<detail::WordPack>(code + rounder(0.0f));
    return __builtin_convertvector(__builtin_convertvector(words, detail::ShortPack), BytePack);
}
SPOS_SIMD_INLINE BytePack bytes_of(const DoublePack& code) {
    return __builtin_convertvector(reinterpret_cast<LongPack>(code + rounder(0.0)), BytePack);
}

// The least and the greatest v inside. 0 to the least normal number is outside too: subnormal numbers are slow.
template <typename A>
struct Inside {
    A least, most;
    explicit Inside(const Quantizer& quantizer)
        : least(quantizer.low == 0 ? std::numeric_limits<A>::min() : std::nextafter(A(quantizer.low), A(0))),
          most(std::nextafter(A(quantizer.high), A(0))) {}
};

// What of a gradient goes to the value, and what to the step.
template <typename Pack>
struct Passed {
    Pack inside, step;
};
// Every comparison is used once: GCC takes those that are used twice apart, lane by lane. Outside, NaN included, `held`
// differs from v; rounded it is the code all the same.
template <bool kSingle, bool kResidual, typename Pack, typename A>
SPOS_SIMD_INLINE Passed<Pack> pass_back(const Pack& grad, const Pack& v, const Inside<A>& bounds) {
    const Pack least = Pack{} + bounds.least, most = Pack{} + bounds.most, zero{};
    const Pack raised = v < least ? least : v, held = raised > most ? most : raised;
    const Pack code = kSingle ? code_of<true>(v, A(-1), A(1)) : (held + rounder(A())) - rounder(A());
    const Pack inside = held == v ? grad : zero;
    return {inside, kResidual ? grad * code - inside * held : (grad - inside) * code};
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
