// Two stages. Blocks convolve runs of output pixels and keep the moments of what they store; a small kernel merges the
// moments of all blocks in double.
#include "kernels/cuda/depthwise.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kForwardBlocks = 1024;

// Output pixels of one thread.
template <int K, int S>
constexpr int kOutputs = K == 0   ? 1
                         : S == 1 ? 7
                                  : 4;

template <typename T>
struct ForwardArguments {
    const T *x, *weight;
    const void *scale, *shift;
    const int32_t* present;
    int pitch, height, width, out_height, out_width, channels, kernel, stride, runs, items, items_per_chunk;
    bool relu;
    T* z;
    Moments<Accumulator<T>>* partial;
};

// grid: channels, chunks of items.
template <typename T, int K, int S>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks<K>) convolve(const ForwardArguments<T> g) {
    using A = Accumulator<T>;
    constexpr int V = kVector<K>, P = kOutputs<K, S>;
    __shared__ A weights[K == 0 ? 1 : K * K * 32 * V];
    __shared__ Moments<A> shared[kDepthwiseThreads * V];
    const int kernel = K == 0 ? g.kernel : K, stride = S == 0 ? g.stride : S, pad = kernel / 2;
    const int first_channel = blockIdx.x * blockDim.x * V, channel = first_channel + threadIdx.x * V;
    const int present = present_channels(g.present, g.channels);
    if (first_channel >= present) return;
    if constexpr (K != 0) share_weights<V, K>(g.weight, first_channel, g.channels, weights);

    Moments<A> own[V] = {};
    if (channel < present) {
        const Activation<V, A> activate(g.scale, g.shift, g.relu, channel, g.channels);
        const int begin = blockIdx.y * g.items_per_chunk;
        const int end = begin + g.items_per_chunk < g.items ? begin + g.items_per_chunk : g.items;
        for (int item = begin + threadIdx.y; item < end; item += blockDim.y) {
            const int oy = item % g.out_height, run = item / g.out_height % g.runs, n = item / g.out_height / g.runs;
            const int ox = run * P, left = ox * stride - pad;
            const T* image = g.x + static_cast<int64_t>(n) * g.height * g.width * g.pitch + channel;
            A sum[P][V] = {};
#pragma unroll(K == 3 ? 3 : 1)
            for (int ky = 0; ky < kernel; ++ky) {
                const int iy = oy * stride - pad + ky;
                if (iy < 0 || iy >= g.height) continue;
                const T* row = image + static_cast<int64_t>(iy) * g.width * g.pitch;
                if constexpr (K != 0) {
                    constexpr int I = (P - 1) * S + K;
                    Vector<T, V> loaded[I];
#pragma unroll
                    for (int i = 0; i < I; ++i) {
                        const int ix = left + i;
                        if (ix >= 0 && ix < g.width)
                            loaded[i] = *reinterpret_cast<const Vector<T, V>*>(row + ix * g.pitch);
                    }
                    A in[I][V];
#pragma unroll
                    for (int i = 0; i < I; ++i) {
                        const bool inside = left + i >= 0 && left + i < g.width;
#pragma unroll
                        for (int v = 0; v < V; ++v) in[i][v] = inside ? activate(widen(loaded[i].lane[v]), v) : A(0);
                    }
#pragma unroll
                    for (int kx = 0; kx < K; ++kx) {
                        const A* tap = weights + ((ky * K + kx) * blockDim.x + threadIdx.x) * V;
#pragma unroll
                        for (int v = 0; v < V; ++v) {
                            const A weight = tap[v];
#pragma unroll
                            for (int p = 0; p < P; ++p) sum[p][v] += weight * in[p * S + kx][v];
                        }
                    }
                } else {
                    const T* taps = g.weight + (static_cast<int64_t>(channel) * kernel + ky) * kernel;
                    for (int kx = 0; kx < kernel; ++kx) {
                        const int ix = left + kx;
                        if (ix >= 0 && ix < g.width)
                            sum[0][0] += widen(taps[kx]) * activate(widen(row[ix * g.pitch]), 0);
                    }
                }
            }

            T* to = g.z + ((static_cast<int64_t>(n) * g.out_height + oy) * g.out_width + ox) * g.channels + channel;
#pragma unroll
            for (int p = 0; p < P; ++p) {
                if (ox + p >= g.out_width) continue;
                Vector<T, V> stored;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    narrow(sum[p][v], stored.lane[v]);
                    sum[p][v] = widen(stored.lane[v]);
                }
                *reinterpret_cast<Vector<T, V>*>(to + static_cast<int64_t>(p) * g.channels) = stored;
            }
            // The moments of what was stored: first the run's own, about its own mean.
            const int count = g.out_width - ox < P ? g.out_width - ox : P;
            const A inverse = A(1) / count;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A pivot = own[v].count == 0 ? sum[0][v] : own[v].pivot;
                A total = 0, square = 0;
#pragma unroll
                for (int p = 0; p < P; ++p) total += p < count ? sum[p][v] - pivot : A(0);
                const A mean = total * inverse;
#pragma unroll
                for (int p = 0; p < P; ++p) {
                    const A distance = p < count ? sum[p][v] - pivot - mean : A(0);
                    square += distance * distance;
                }
                own[v] = merge(own[v], Moments<A>{A(count), pivot, mean, square});
            }
        }
    }
    merge_rows<V>(own, shared);
    if (threadIdx.y == 0) {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (channel + v < g.channels)
                g.partial[static_cast<int64_t>(blockIdx.y) * g.channels + channel + v] = own[v];
    }
}

bool forward_has_pairs(const Depthwise& layer, const void* z) {
    return layer.channels % 2 == 0 && has_pairs(layer.dtype, layer.x, layer.x_pitch) &&
           has_pairs(layer.dtype, z, layer.channels);
}

DepthwisePlan forward_plan(const Depthwise& layer, int vector, int pixels) {
    return plan_depthwise(layer, layer.out_height(), layer.out_width(), vector, pixels, kForwardBlocks, 1);
}

template <typename T, int K, int S>
const char* run(const Depthwise& layer, void* z, void* workspace, void* mean, void* m2, void* stream) {
    using A = Accumulator<T>;
    const DepthwisePlan plan = forward_plan(layer, kVector<K>, kOutputs<K, S>);
    ForwardArguments<T> g;
    g.x = static_cast<const T*>(layer.x), g.weight = static_cast<const T*>(layer.weight);
    g.scale = layer.scale, g.shift = layer.shift, g.present = layer.present;
    g.pitch = layer.x_pitch;
    g.height = layer.height, g.width = layer.width;
    g.out_height = layer.out_height(), g.out_width = layer.out_width();
    g.channels = layer.channels, g.kernel = layer.kernel, g.stride = layer.stride;
    g.runs = plan.runs, g.items = plan.items, g.items_per_chunk = plan.items_per_chunk;
    g.relu = layer.relu;
    g.z = static_cast<T*>(z);
    g.partial = static_cast<Moments<A>*>(workspace);
    SPOS_LAUNCH((convolve<T, K, S>), dim3(plan.channel_blocks, plan.chunks), plan.block, 0, stream, g);
    if (const char* error = launch_error()) return error;
    SPOS_LAUNCH((finish_moments<A>), dim3(divide_up(layer.channels, kFinishChannels)),
                dim3(kFinishChannels, kFinishLanes), 0, stream, g.partial, static_cast<int>(plan.chunks), g.channels,
                g.present, static_cast<A*>(mean), static_cast<A*>(m2));
    return launch_error();
}

}  // namespace

int64_t depthwise_workspace_bytes(const Depthwise& layer) {
    // Runs of one pixel and single channels ask for the most chunks, or all plans for the same number of blocks.
    const int64_t moments = layer.dtype == DType::float64 ? sizeof(Moments<double>) : sizeof(Moments<float>);
    int64_t chunks = 0;
    for (const int vector : {1, 2})
        for (const int pixels : {1, 4, 7}) chunks = std::max(chunks, forward_plan(layer, vector, pixels).chunks);
    return chunks * layer.channels * moments;
}

const char* depthwise(const Depthwise& layer, void* z, void* workspace, void* mean, void* m2, void* stream) {
    if (const char* refused = refuse_depthwise(layer, layer.x_pitch)) return refused;
    return select_depthwise(layer, forward_has_pairs(layer, z), [&](auto type, auto kernel, auto stride) {
        return run<decltype(type), decltype(kernel)::value, decltype(stride)::value>(layer, z, workspace, mean, m2,
                                                                                     stream);
    });
}

}  // namespace spos::cuda
