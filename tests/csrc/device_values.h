// Arrays in every dtype for tests of CUDA sources: full of NaN until set, with a guard behind their end.
#pragma once

#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/cuda/vector.cuh"

namespace spos::test {

class Values {
  public:
    // `offset` elements behind an address that is a multiple of 16.
    Values(DType dtype, int64_t size, int64_t offset = 0)
        : dtype_(dtype), size_(size), bytes_((size + offset) * item_size(dtype) + 16 + kGuardBytes, 0xff) {
        begin_ = (16 - reinterpret_cast<uintptr_t>(bytes_.data()) % 16) % 16 + offset * item_size(dtype);
        std::fill_n(data() + size * item_size(dtype), kGuardBytes, kGuard);
    }
    Values(const Values& other) : Values(other.dtype_, other.size_) {
        std::memcpy(data(), other.data(), size_ * item_size(dtype_));
    }
    Values& operator=(const Values&) = delete;

    unsigned char* data() { return bytes_.data() + begin_; }
    const unsigned char* data() const { return bytes_.data() + begin_; }
    unsigned char* at(int64_t i) { return data() + i * item_size(dtype_); }
    int64_t size() const { return size_; }

    double operator[](int64_t i) const {
        switch (dtype_) {
            case DType::float64:
                return get<double>(i);
            case DType::float32:
                return get<float>(i);
            case DType::float16:
                return __half2float(get<__half>(i));
            default:
                return __bfloat162float(get<__nv_bfloat16>(i));
        }
    }

    void set(int64_t i, double value) {
        switch (dtype_) {
            case DType::float64:
                return put(i, value);
            case DType::float32:
                return put(i, static_cast<float>(value));
            case DType::float16:
                return put(i, __float2half_rn(static_cast<float>(value)));
            default:
                return put(i, __float2bfloat16_rn(static_cast<float>(value)));
        }
    }

    bool guarded() const {
        const unsigned char* end = data() + size_ * item_size(dtype_);
        return std::all_of(end, end + kGuardBytes, [](unsigned char b) { return b == kGuard; });
    }

    bool same_bits(const Values& other) const {
        return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * item_size(dtype_)) == 0;
    }

  private:
    static constexpr unsigned char kGuard = 0x5a;
    static constexpr int64_t kGuardBytes = 64;

    template <typename T>
    T get(int64_t i) const {
        T value;
        std::memcpy(&value, data() + i * sizeof(T), sizeof(T));
        return value;
    }
    template <typename T>
    void put(int64_t i, T value) {
        std::memcpy(data() + i * sizeof(T), &value, sizeof(T));
    }

    DType dtype_;
    int64_t size_;
    std::vector<unsigned char> bytes_;
    int64_t begin_;
};

inline DType statistics_of(DType dtype) {
    return dtype == DType::float64 ? DType::float64 : DType::float32;
}

// How far a stored value may lie from what is stored: half a unit in the last place of a value of that size.
inline double rounding(DType dtype, double value) {
    switch (dtype) {
        case DType::float64:
            return std::fabs(value) * std::ldexp(1.0, -53);
        case DType::float32:
            return std::fabs(value) * std::ldexp(1.0, -24);
        case DType::float16:
            return std::fabs(value) * std::ldexp(1.0, -11) + std::ldexp(1.0, -25);
        default:
            return std::fabs(value) * std::ldexp(1.0, -8);
    }
}

// The unit of rounding of what sums are made in.
inline double unit_of_sums(DType dtype) {
    return std::ldexp(1.0, dtype == DType::float64 ? -53 : -24);
}

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};

}  // namespace spos::test
