// Count, mean and centred second moment on the device, and how two of them merge.
#pragma once

#include "kernels/cuda/launch.cuh"

namespace spos::cuda {

// The mean is kept in two parts, pivot + mean, with the pivot near the values: the second part is then small, and a
// mean far from zero costs the second moment no digits.
template <typename A>
struct Moments {
    A count, pivot, mean, m2;
};

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. Either
// side may be empty.
template <typename A>
__device__ inline Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const A count = a.count + b.count;
    const A weight = b.count / count;
    const A delta = (b.pivot - a.pivot) + (b.mean - a.mean);
    return {count, a.pivot, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * a.count * weight};
}

// Merges the lanes of a warp into lane 0, always in the same order. Every lane of the warp must call it.
template <typename A>
__device__ inline Moments<A> merge_warp(Moments<A> own) {
    for (int step = 16; step > 0; step /= 2) {
        const Moments<A> other = {
            __shfl_down_sync(0xffffffffu, own.count, step), __shfl_down_sync(0xffffffffu, own.pivot, step),
            __shfl_down_sync(0xffffffffu, own.mean, step), __shfl_down_sync(0xffffffffu, own.m2, step)};
        own = merge(own, other);
    }
    return own;
}

}  // namespace spos::cuda
