// Element types on the device and loads of several elements at once.
#pragma once

#include <cstdint>

#include "csrc/dtype.h"
#include "kernels/cuda/launch.cuh"

namespace spos::cuda {

__device__ inline float widen(float value) {
    return value;
}
__device__ inline double widen(double value) {
    return value;
}
__device__ inline float widen(__half value) {
    return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

// Rounds to the nearest value that the element type of `to` can store.
__device__ inline void narrow(float value, float& to) {
    to = value;
}
__device__ inline void narrow(double value, double& to) {
    to = value;
}
__device__ inline void narrow(float value, __half& to) {
    to = __float2half_rn(value);
}
__device__ inline void narrow(float value, __nv_bfloat16& to) {
    to = __float2bfloat16_rn(value);
}

// float for the 16- and 32-bit types, double for double.
template <typename T>
using Accumulator = decltype(widen(T{}));

constexpr int kLoadBytes = 16;  // the widest load of one thread

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
    T lane[V];
};

// Whether every load of V elements is aligned that starts at x plus a multiple of each of the strides.
template <typename T, int V, typename... Strides>
bool can_load(const void* x, Strides... strides) {
    return reinterpret_cast<uintptr_t>(x) % (sizeof(T) * V) == 0 && ((strides % V == 0) && ...);
}

// Calls run(T{}) with the element type.
template <typename Run>
const char* with_type(DType dtype, Run run) {
    switch (dtype) {
        case DType::float32:
            return run(float{});
        case DType::float64:
            return run(double{});
        case DType::float16:
            return run(__half{});
        case DType::bfloat16:
            return run(__nv_bfloat16{});
    }
    return "unknown dtype";
}

}  // namespace spos::cuda
