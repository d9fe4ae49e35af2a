// Element types that kernels take, as a run-time value, and the 16-bit floats as plain storage.
// No torch and no CUDA in here: host code, launchers and tests share it.
#pragma once

#include <cstdint>
#include <cstring>

namespace spos {

enum class DType { float32, float64, float16, bfloat16 };

inline int64_t item_size(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(float value) {
    return value;
}
inline double widen(double value) {
    return value;
}
inline float widen(BFloat16 value) {
    return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

// Integer and float steps only, without a branch, so that compilers turn a loop of it into vector code for any target.
// Shifting the 15 lower bits into place leaves the exponent 112 too small; multiplying by 2^112 mends it and makes
// subnormals right as well. Infinity and NaN (exponent 31) need the full float exponent instead.
inline float widen(Half value) {
    const uint32_t magnitude = value.bits & 0x7fffu;
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const float scaled = bits_to_float(magnitude << 13) * 5.192296858534828e33f;  // 2^112
    uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
    return bits_to_float(bits | sign);
}

}  // namespace spos
