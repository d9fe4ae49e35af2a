// tanh as vector code. float: within 1.4 units in the last place, measured on every eighth float; double: that of the C
// library.
#pragma once

#include <cmath>

#include "csrc/cpu/quantizer.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {

constexpr double kSmallTanh = 0.625;  // below, a polynomial does

// Of magnitudes below kSmallTanh; anything for others. The polynomials here are those of Cephes' tanhf and expf
// (S. Moshier), public domain.
SPOS_SIMD_INLINE FloatPack small_tanh(const FloatPack& x) {
    const FloatPack z = x * x;
    FloatPack p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return p * z * x + x;
}

SPOS_SIMD_INLINE DoublePack small_tanh(const DoublePack& x) {
    DoublePack result;
    for (int64_t lane = 0; lane < kPack; ++lane) result[lane] = std::tanh(x[lane]);
    return result;
}

// Of any values; the same bits as small_tanh() where that is right. A NaN stays one.
SPOS_SIMD_INLINE FloatPack any_tanh(const FloatPack& x) {
    const FloatPack magnitude = x < 0 ? -x : x, most = FloatPack{} + 9.25f;  // tanh is 1 from there on
    const FloatPack y = 2 * (magnitude > most ? most : magnitude);
    const FloatPack shifted = y * 1.44269504088896341f + rounder(0.0f), n = shifted - rounder(0.0f);
    const FloatPack r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    FloatPack p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const FloatPack part = p * r * r + r + 1;
    // 2^n goes to the exponent: n stands in the lowest bits of what was rounded.
    const auto exponent =
        reinterpret_cast<detail::WordPack>(part) + (reinterpret_cast<detail::WordPack>(shifted) << 23);
    const FloatPack large = 1 - 2 / (reinterpret_cast<FloatPack>(exponent) + 1);
    const FloatPack signed_large = x < 0 ? -large : large, small = small_tanh(x);
    return magnitude >= float(kSmallTanh) ? signed_large : small;
}

SPOS_SIMD_INLINE DoublePack any_tanh(const DoublePack& x) {
    return small_tanh(x);
}

}  // namespace spos::cpu
