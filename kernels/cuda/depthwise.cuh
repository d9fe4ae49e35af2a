// What the depthwise kernels share: how work is cut, and how their input is normalised on load.
//
// A work item is a run of P pixels along a row, or in each of R rows, for V channels: what one thread holds in
// registers. Neighbouring threads take neighbouring channels, and rows of threads take image rows one below the other,
// so that the input rows which they share come from the nearest cache.
#pragma once

#include <type_traits>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/depthwise.h"
#include "kernels/cuda/partials.cuh"

namespace spos::cuda {

constexpr int kDepthwiseThreads = 128;

// K is the kernel and S the stride where they are known to the compiler: 3, 5, 7 and 1, 2. K = S = 0 serves all others,
// odd numbers of channels and double: plain loops, one pixel and one channel a thread.
template <int K>
constexpr int kVector = K == 0 ? 1 : 2;

// Of an image of `height` x `width` whose rows are cut into runs of `pixels`.
struct DepthwisePlan : ColumnPlan {
    int64_t runs;  // of a row
};

inline DepthwisePlan plan_depthwise(const Depthwise& layer, int64_t height, int64_t width, int vector, int pixels,
                                    int64_t blocks, int64_t least) {
    const int64_t runs = divide_up(width, pixels);
    return {plan_columns(kDepthwiseThreads, layer.channels, vector, layer.samples * height * runs, blocks, least),
            runs};
}

// `pitch`: the largest of all images.
inline const char* refuse_depthwise(const Depthwise& layer, int64_t pitch) {
    const int64_t most = int64_t{1} << 30;
    if (layer.kernel % 2 != 1 || layer.stride < 1) return "the kernel must be odd and the stride at least 1";
    if (layer.kernel > 255) return "the kernel must be at most 255";
    if (layer.groups < 1 || layer.groups > 65535) return "there must be from 1 to 65535 groups";
    if (layer.groups * layer.samples * layer.height * layer.width >= most ||
        layer.channels >= most / (layer.kernel * layer.kernel))
        return "x is too large for one launch: its pixels, and its channels times the taps, must be below 2^30";
    if (layer.width * pitch >= most) return "an image is too large for one launch: a row must be below 2^30 elements";
    return nullptr;
}

// Calls run(T{}, kernel constant, stride constant) with the types of the layer; `pairs`: whether all loads of two
// channels would be aligned and inside.
template <typename Run>
const char* select_depthwise(const Depthwise& layer, bool pairs, Run run) {
    const auto with = [&](auto type) -> const char* {
        const auto of = [&](auto kernel) -> const char* {
            if (layer.stride == 1) return run(type, kernel, std::integral_constant<int, 1>{});
            return run(type, kernel, std::integral_constant<int, 2>{});
        };
        if constexpr (!std::is_same_v<decltype(type), double>) {
            if (pairs && layer.stride <= 2) {
                if (layer.kernel == 3) return of(std::integral_constant<int, 3>{});
                if (layer.kernel == 5) return of(std::integral_constant<int, 5>{});
                if (layer.kernel == 7) return of(std::integral_constant<int, 7>{});
            }
        }
        return run(type, std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
    };
    switch (layer.dtype) {
        case DType::float32:
            return with(float{});
        case DType::float64:
            return with(double{});
        case DType::float16:
            return with(__half{});
        case DType::bfloat16:
            return with(__nv_bfloat16{});
    }
    return "unknown dtype";
}

// Whether pairs of channels can be read from an image of `dtype` at `data`.
inline bool has_pairs(DType dtype, const void* data, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(data) % (2 * item_size(dtype)) == 0 && pitch % 2 == 0;
}

// Bit i: whether column left + i lies in an image of that width.
template <int I>
__device__ unsigned columns_inside(int left, int width) {
    unsigned inside = 0;
#pragma unroll
    for (int i = 0; i < I; ++i) inside |= (left + i >= 0 && left + i < width ? 1u : 0u) << i;
    return inside;
}

// Loads I pixels of V channels, `pitch` elements apart, as the convolution sees them: zero where they lie outside.
template <int I, int V, typename T>
__device__ void load_run(const T* row, int pitch, unsigned inside, const Activation<V, Accumulator<T>>& activate,
                         Accumulator<T> (&in)[I][V]) {
    Vector<T, V> loaded[I];
    const char* at = reinterpret_cast<const char*>(row);
    const int64_t step = pitch * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int i = 0; i < I; ++i, at += step)
        if (inside >> i & 1) loaded[i] = *reinterpret_cast<const Vector<T, V>*>(at);
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v)
            in[i][v] = inside >> i & 1 ? activate(widen(loaded[i].lane[v]), v) : Accumulator<T>(0);
}

// Copies the block's taps to shared memory as [tap][channel of the block]. Zero beyond the channels.
template <int V, int K, typename T>
__device__ void share_weights(const T* weight, int first_channel, int channels, Accumulator<T>* shared) {
    const int across = blockDim.x * V;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < across * K * K; i += kDepthwiseThreads) {
        const int channel = i / (K * K), tap = i % (K * K);
        const bool inside = first_channel + channel < channels;
        shared[tap * across + channel] =
            inside ? widen(weight[static_cast<int64_t>(first_channel) * K * K + i]) : Accumulator<T>(0);
    }
    __syncthreads();
}

}  // namespace spos::cuda
