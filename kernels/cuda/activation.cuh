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

    // One channel's in all places.
    __device__ Activation(A scale_of_all, A shift_of_all, bool relu) {
        floor = relu ? A(0) : -static_cast<A>(INFINITY);
#pragma unroll
        for (int v = 0; v < V; ++v) scale[v] = scale_of_all, shift[v] = shift_of_all;
    }

    __device__ A operator()(A value, int v) const { return clip(scale[v] * value + shift[v], floor); }
};

// Vectors of V values, each turned into activate(value, lane), from one place to another, which may be the same: those
// from `begin` on that are `step` apart, `kTile` loads at a time. Pitches: elements from one vector to the next.
template <int kTile, int V, typename F, typename T>
__device__ inline void walk(const F& activate, const T* from, int64_t pitch, T* to, int64_t to_pitch, int begin,
                            int end, int step) {
    for (int first = begin; first < end; first += step * kTile) {
        Vector<T, V> tile[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t at = first + k * step;
            if (at < end) tile[k] = *reinterpret_cast<const Vector<T, V>*>(from + at * pitch);
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t at = first + k * step;
            if (at >= end) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) narrow(activate(widen(tile[k].lane[v]), v), tile[k].lane[v]);
            *reinterpret_cast<Vector<T, V>*>(to + at * to_pitch) = tile[k];
        }
    }
}

}  // namespace spos::cuda
