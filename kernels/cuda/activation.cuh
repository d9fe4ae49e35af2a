// Batch norm and ReLU of what a kernel has loaded.
#pragma once

#include <cmath>

#include "kernels/cuda/vector.cuh"

namespace spos::cuda {

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

    __device__ A operator()(A value, int v) const {
        const A normal = scale[v] * value + shift[v];
        return normal < floor ? floor : normal;
    }
};

}  // namespace spos::cuda
