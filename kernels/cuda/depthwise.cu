// Two stages. Blocks convolve runs of output pixels and keep the moments of what they store; a small kernel merges the
// moments of all blocks in double.
#include <tuple>

#include "kernels/cuda/depthwise.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kForwardBlocks = 1024;

// Output pixels of one thread: a run along a row, and the same in the rows below, for which it loads a row only once.
template <int K, int S>
constexpr int kOutputs = K == 0 ? 1 : (S == 1 ? 7 : 4);
template <int K>
constexpr int kOutputRows = K == 0 ? 1 : 2;

// A promise to the compiler, in blocks a processor: at most 168 registers a thread for K = 7, 128 for the others.
template <int K>
constexpr int kForwardBlocksPerProcessor = K == 7 ? 3 : 4;

template <typename T>
struct ForwardArguments {
    const T *x, *weight;
    const void *scale, *shift;
    const int32_t* present;
    int samples, pitch, height, width, out_height, out_width, channels, kernel, stride, runs, items, items_per_chunk;
    bool relu;
    T* z;
    Moments<Accumulator<T>>* partial;
};

// grid: channels, chunks of a group's items, groups.
template <typename T, int K, int S>
__global__ void __launch_bounds__(kDepthwiseThreads, kForwardBlocksPerProcessor<K>) convolve(
    const ForwardArguments<T> g) {
    using A = Accumulator<T>;
    constexpr int V = kVector<K>, P = kOutputs<K, S>, R = kOutputRows<K>;
    __shared__ A weights[K == 0 ? 1 : K * K * 32 * V];
    __shared__ Moments<A> shared[kDepthwiseThreads * V];
    const int kernel = K == 0 ? g.kernel : K, stride = S == 0 ? g.stride : S, pad = kernel / 2;
    const int first_channel = blockIdx.x * blockDim.x * V, channel = first_channel + threadIdx.x * V;
    const int present = present_channels(g.present, g.channels);
    if (first_channel >= present) return;
    if constexpr (K != 0) share_weights<V, K>(g.weight, first_channel, g.channels, weights);

    A seen = 0, pivot[V] = {}, mean[V] = {}, m2[V] = {};  // values so far, and their moments
    if (channel < present) {
        const int own = blockIdx.z * g.channels;
        const Activation<V, A> activate(g.scale, g.shift, g.relu, own + channel, own + g.channels);
        const int bands = (g.out_height + R - 1) / R;
        const int begin = blockIdx.y * g.items_per_chunk;
        const int end = begin + g.items_per_chunk < g.items ? begin + g.items_per_chunk : g.items;
        for (int item = begin + threadIdx.y; item < end; item += blockDim.y) {
            const int oy = item % bands * R, run = item / bands % g.runs;
            const int n = blockIdx.z * g.samples + item / bands / g.runs;
            const int ox = run * P, left = ox * stride - pad;
            // The columns that a run sees: those inside of the image, one bit each.
            constexpr int I = (P - 1) * S + K;
            const unsigned inside = columns_inside<I>(left, g.width);
            const T* image = g.x + static_cast<int64_t>(n) * g.height * g.width * g.pitch + channel;
            A sum[R][P][V] = {};
#pragma unroll(K == 3 ? (R - 1) * S + 3 : 1)
            for (int j = 0; j < (R - 1) * stride + kernel; ++j) {
                const int iy = oy * stride - pad + j;
                if (iy < 0 || iy >= g.height) continue;
                const T* row = image + (static_cast<int64_t>(iy) * g.width + left) * g.pitch;
                if constexpr (K != 0) {
                    A in[I][V];
                    load_run<I, V>(row, g.pitch, inside, activate, in);
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        const int ky = j - r * S;
                        if (ky < 0 || ky >= K) continue;
#pragma unroll
                        for (int kx = 0; kx < K; ++kx) {
                            const A* tap = weights + ((ky * K + kx) * blockDim.x + threadIdx.x) * V;
#pragma unroll
                            for (int v = 0; v < V; ++v) {
                                const A weight = tap[v];
#pragma unroll
                                for (int p = 0; p < P; ++p) sum[r][p][v] += weight * in[p * S + kx][v];
                            }
                        }
                    }
                } else {
                    const T* taps = g.weight + (static_cast<int64_t>(channel) * kernel + j) * kernel;
                    for (int kx = 0; kx < kernel; ++kx) {
                        if (left + kx >= 0 && left + kx < g.width)
                            sum[0][0][0] += widen(taps[kx]) * activate(widen(row[kx * g.pitch]), 0);
                    }
                }
            }

            const int columns = g.out_width - ox < P ? g.out_width - ox : P;
            const int rows = g.out_height - oy < R ? g.out_height - oy : R;
            T* to = g.z + ((static_cast<int64_t>(n) * g.out_height + oy) * g.out_width + ox) * g.channels + channel;
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int p = 0; p < P; ++p) {
                    if (p >= columns || r >= rows) continue;
                    Vector<T, V> stored;
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        narrow(sum[r][p][v], stored.lane[v]);
                        sum[r][p][v] = widen(stored.lane[v]);
                    }
                    *reinterpret_cast<Vector<T, V>*>(to + static_cast<int64_t>(r * g.out_width + p) * g.channels) =
                        stored;
                }
            }

            // The moments of what was stored: the item's own, about its own mean, then merged by Chan's rule.
            const int count = columns * rows;
            const A inverse = count == R * P ? A(1) / (R * P) : A(1) / count;
            const A all = seen + count, weight = count / all;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (seen == 0) pivot[v] = sum[0][0][v];
                A total = 0, square = 0;
#pragma unroll
                for (int i = 0; i < R * P; ++i)
                    total += i % P < columns && i / P < rows ? sum[i / P][i % P][v] - pivot[v] : A(0);
                const A centre = total * inverse;
#pragma unroll
                for (int i = 0; i < R * P; ++i) {
                    const A distance =
                        i % P < columns && i / P < rows ? sum[i / P][i % P][v] - pivot[v] - centre : A(0);
                    square += distance * distance;
                }
                const A delta = centre - mean[v];
                mean[v] += delta * weight;
                m2[v] += square + delta * delta * seen * weight;
            }
            seen = all;
        }
    }
    Moments<A> own[V];
#pragma unroll
    for (int v = 0; v < V; ++v) own[v] = {seen, pivot[v], mean[v], m2[v]};
    merge_rows<V>(own, shared);
    if (threadIdx.y == 0) {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (channel + v < g.channels)
                g.partial[(static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * g.channels + channel + v] =
                    own[v];
    }
}

bool forward_has_pairs(const Depthwise& layer, const void* z) {
    return has_pairs(layer.dtype, layer.x, layer.x_pitch) && has_pairs(layer.dtype, z, layer.channels);
}

DepthwisePlan forward_plan(const Depthwise& layer, int vector, int rows, int pixels) {
    return plan_depthwise(layer, divide_up(layer.out_height(), rows), layer.out_width(), vector, pixels, kForwardBlocks,
                          1);
}

template <typename T, int K, int S>
const char* run(const Depthwise& layer, void* z, void* workspace, void* mean, void* m2, void* stream) {
    using A = Accumulator<T>;
    const DepthwisePlan plan = forward_plan(layer, kVector<K>, kOutputRows<K>, kOutputs<K, S>);
    ForwardArguments<T> g;
    g.x = static_cast<const T*>(layer.x), g.weight = static_cast<const T*>(layer.weight);
    g.scale = layer.scale, g.shift = layer.shift, g.present = layer.present;
    g.samples = layer.samples, g.pitch = layer.x_pitch;
    g.height = layer.height, g.width = layer.width;
    g.out_height = layer.out_height(), g.out_width = layer.out_width();
    g.channels = layer.channels, g.kernel = layer.kernel, g.stride = layer.stride;
    g.runs = plan.runs, g.items = plan.items, g.items_per_chunk = plan.items_per_chunk;
    g.relu = layer.relu;
    g.z = static_cast<T*>(z);
    g.partial = static_cast<Moments<A>*>(workspace);
    SPOS_LAUNCH((convolve<T, K, S>), dim3(plan.channel_blocks, plan.chunks, layer.groups), plan.block, 0, stream, g);
    if (const char* error = launch_error()) return error;
    SPOS_LAUNCH((finish_moments<A>), dim3(divide_up(layer.channels, kFinishChannels), layer.groups),
                dim3(kFinishChannels, kFinishLanes), 0, stream, g.partial, static_cast<int>(plan.chunks), g.channels,
                g.present, static_cast<A*>(mean), static_cast<A*>(m2));
    return launch_error();
}

}  // namespace

int64_t depthwise_workspace_bytes(const Depthwise& layer) {
    // Whichever kernel will run.
    const int64_t moments = layer.dtype == DType::float64 ? sizeof(Moments<double>) : sizeof(Moments<float>);
    int64_t chunks = 0;
    for (const auto& [vector, rows, pixels] : {std::tuple{1, 1, 1}, {2, 2, 4}, {2, 2, 7}})
        chunks = std::max(chunks, forward_plan(layer, vector, rows, pixels).chunks);
    return layer.groups * chunks * layer.channels * moments;
}

const char* depthwise(const Depthwise& layer, void* z, void* workspace, void* mean, void* m2, void* stream) {
    if (const char* refused = refuse_depthwise(layer, layer.x_pitch)) return refused;
    return select_depthwise(layer, forward_has_pairs(layer, z), [&](auto type, auto kernel, auto stride) {
        return run<decltype(type), decltype(kernel)::value, decltype(stride)::value>(layer, z, workspace, mean, m2,
                                                                                     stream);
    });
}

}  // namespace spos::cuda
