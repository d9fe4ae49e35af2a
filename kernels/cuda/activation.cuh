// Batch norm and ReLU of what a kernel has loaded.
#pragma once

#include <cmath>

#include "kernels/cuda/vector.cuh"

namespace spos::cuda {

// The larger of the two, and NaN where the value is one.
__device__ inline float clip(float value, float floor) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(value), "f"(floor));
    return value;
#else
    return value < floor ? floor : value;
#endif
}
__device__ inline double clip(double value, double floor) {
    return value < floor ? floor : value;
}

// For V channels from `channel` on. scales, shifts: [channels] or null, which stands for ones and zeros. A NaN stays
// one.
template <int V, typename A>
struct Activation {
    A scale[V], shift[V], floor;

    __device__ Activation(const void* scales, const void* shifts, bool relu, int channel, int channels) {
        floor = relu ? A(0) : -static_cast<A>(INFINITY);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const bool inside = channel + v < channels;
            scale[v] = scales != nullptr && inside ? static_cast<const A*>(scales)[channel + v] : A(1);
            shift[v] = shifts != nullptr && inside ? static_cast<const A*>(shifts)[channel + v] : A(0);
        }
    }

    __device__ A operator()(A value, int v) const { return clip(scale[v] * value + shift[v], floor); }
};

}  // namespace spos::cuda
