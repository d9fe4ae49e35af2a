// Two kernels that both make the gradient of z on load, and their second stages. One walks over the input's pixels and
// gathers the gradient of the input, with the sums that the batch norm before it needs; one walks over the output's and
// keeps the sums of all taps in registers. Sums leave each block as partial results, which a small kernel adds in
// double, in a fixed order.
#include "kernels/cuda/depthwise.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kDataBlocks = 1024;
// Every block leaves all taps of its channels behind: fewer blocks, each thread with several runs.
constexpr int64_t kWeightBlocks = 512;
constexpr int64_t kWeightRuns = 4;

// Pixels of one thread: of the input, a multiple of the stride, for the data; of the output for the weight, as many as
// fit beside the sums of all taps.
template <int K, int S>
constexpr int kDataPixels = K == 0 ? 1 : (S == 1 ? 7 : 8);
template <int K, int S>
constexpr int kWeightPixels = K == 0 ? 1 : (S == 1 ? (K == 7 ? 5 : 7) : (K == 7 ? 3 : 4));

// At most 128 registers a thread, and 168 for the 98 sums of K = 7.
template <int K>
constexpr int kWeightBlocksPerProcessor = K == 7 ? 3 : 4;

template <typename T>
struct BackwardArguments {
    const T *grad, *z, *x, *weight;
    int grad_pitch, z_pitch, x_pitch;
    const Accumulator<T>*norm, *centre;
    const void *scale, *shift;
    const int32_t* present;
    int height, width, out_height, out_width, channels, kernel, stride;
    bool relu, in_relu;
    int runs, items, items_per_chunk;
    T* grad_x;
    Accumulator<T>* partial;
};

// The gradient of z for V channels, made from what is loaded; see DepthwiseGradient.
template <int V, typename A>
struct Incoming {
    A scale[V], shift[V], mean[V], offset[V], slope[V];
    bool relu;

    __device__ Incoming(const A* norm, bool relu, int channel, int channels) : relu(relu) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A* column = norm + channel + v;
            scale[v] = column[0], shift[v] = column[channels], mean[v] = column[2 * channels];
            offset[v] = column[3 * channels], slope[v] = column[4 * channels];
        }
    }

    __device__ A operator()(A grad, A z, int v) const {
        const A passed = !relu || scale[v] * z + shift[v] > 0 ? grad : A(0);
        return scale[v] * (passed - offset[v] - slope[v] * (z - mean[v]));
    }
};

// grid: channels, chunks of items. partial: [chunks, 2, channels], if there is a centre.
template <typename T, int K, int S>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks<K>) data_gradient(const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    constexpr int V = kVector<K>, P = kDataPixels<K, S>;
    __shared__ A weights[K == 0 ? 1 : K * K * 32 * V];
    __shared__ A shared[kDepthwiseThreads * 2 * V];
    const int kernel = K == 0 ? g.kernel : K, stride = S == 0 ? g.stride : S, pad = kernel / 2;
    const int first_channel = blockIdx.x * blockDim.x * V, channel = first_channel + threadIdx.x * V;
    const int present = present_channels(g.present, g.channels);
    const int begin = blockIdx.y * g.items_per_chunk;
    const int end = begin + g.items_per_chunk < g.items ? begin + g.items_per_chunk : g.items;
    if constexpr (K != 0) share_weights<V, K>(g.weight, first_channel, g.channels, weights);

    A own[2 * V] = {};
    if (channel < g.channels) {
        const Incoming<V, A> incoming(g.norm, g.relu, channel, g.channels);
        const Activation<V, A> activate(g.scale, g.shift, g.in_relu, channel, g.channels);
        for (int item = begin + threadIdx.y; item < end; item += blockDim.y) {
            const int iy = item % g.height, run = item / g.height % g.runs, n = item / g.height / g.runs;
            const int ix = run * P;
            const int64_t image = static_cast<int64_t>(n) * g.out_height * g.out_width;
            A sum[P][V] = {};
            // Output row oy saw input row iy under kernel row ky = iy + pad - oy * stride.
#pragma unroll 1
            for (int ky = (iy + pad) % stride; ky < kernel && channel < present; ky += stride) {
                const int oy = (iy + pad - ky) / stride;
                if (iy + pad < ky || oy >= g.out_height) continue;
                const int64_t row = image + static_cast<int64_t>(oy) * g.out_width;
                const T* grad = g.grad + row * g.grad_pitch + channel;
                const T* z = g.z + row * g.z_pitch + channel;
                if constexpr (K != 0) {
                    constexpr int kPad = K / 2, kBefore = kPad / S, I = (P - 1 + kPad) / S + kBefore + 1;
                    const int left = ix / S - kBefore;
                    A in[I][V];
#pragma unroll
                    for (int i = 0; i < I; ++i) {
                        const int ox = left + i;
                        Vector<T, V> gradient, output;
                        const bool inside = ox >= 0 && ox < g.out_width;
                        if (inside) {
                            gradient = *reinterpret_cast<const Vector<T, V>*>(grad + ox * g.grad_pitch);
                            output = *reinterpret_cast<const Vector<T, V>*>(z + ox * g.z_pitch);
                        }
#pragma unroll
                        for (int v = 0; v < V; ++v)
                            in[i][v] = inside ? incoming(widen(gradient.lane[v]), widen(output.lane[v]), v) : A(0);
                    }
#pragma unroll
                    for (int kx = 0; kx < K; ++kx) {
                        const A* tap = weights + ((ky * K + kx) * blockDim.x + threadIdx.x) * V;
#pragma unroll
                        for (int v = 0; v < V; ++v) {
                            const A weight = tap[v];
#pragma unroll
                            for (int p = 0; p < P; ++p)
                                if ((p + kPad - kx) % S == 0)
                                    sum[p][v] += weight * in[(p + kPad - kx) / S + kBefore][v];
                        }
                    }
                } else {
                    const T* taps = g.weight + (static_cast<int64_t>(channel) * kernel + ky) * kernel;
                    for (int kx = 0; kx < kernel; ++kx) {
                        const int ox = (ix + pad - kx) / stride;
                        if (ix + pad < kx || ox * stride != ix + pad - kx || ox >= g.out_width) continue;
                        sum[0][0] +=
                            widen(taps[kx]) * incoming(widen(grad[ox * g.grad_pitch]), widen(z[ox * g.z_pitch]), 0);
                    }
                }
            }

            const int64_t pixel = (static_cast<int64_t>(n) * g.height + iy) * g.width + ix;
#pragma unroll
            for (int p = 0; p < P; ++p) {
                if (ix + p >= g.width) continue;
                Vector<T, V> in, stored;
                if (channel < present)
                    in = *reinterpret_cast<const Vector<T, V>*>(g.x + (pixel + p) * g.x_pitch + channel);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    A result = 0;
                    if (channel + v < present) {
                        const A value = widen(in.lane[v]);
                        result = !g.in_relu || activate(value, v) > 0 ? sum[p][v] : A(0);
                        if (g.centre != nullptr) {
                            own[v] += result;
                            own[V + v] += result * (value - g.centre[channel + v]);
                        }
                    }
                    narrow(result, stored.lane[v]);
                }
                *reinterpret_cast<Vector<T, V>*>(g.grad_x + (pixel + p) * g.channels + channel) = stored;
            }
        }
    }
    if (g.centre == nullptr) return;
    add_rows<2 * V>(own, shared);
    if (threadIdx.y == 0 && channel < g.channels) {
        A* to = g.partial + static_cast<int64_t>(blockIdx.y) * 2 * g.channels + channel;
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = own[v], to[g.channels + v] = own[V + v];
    }
}

// grid: channels, chunks of items. partial: [chunks, taps, channels].
template <typename T, int K, int S>
__global__ void __launch_bounds__(kDepthwiseThreads, kWeightBlocksPerProcessor<K>) weight_gradient(
    const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    constexpr int V = kVector<K>, P = kWeightPixels<K, S>, I = (P - 1) * S + K, pad = K / 2;
    __shared__ A shared[K * K * 32 * V];
    const int first_channel = blockIdx.x * blockDim.x * V, channel = first_channel + threadIdx.x * V;
    const int present = present_channels(g.present, g.channels);
    if (first_channel >= present) return;

    A own[K][K][V] = {};
    if (channel < present) {
        const Incoming<V, A> incoming(g.norm, g.relu, channel, g.channels);
        const Activation<V, A> activate(g.scale, g.shift, g.in_relu, channel, g.channels);
        const int begin = blockIdx.y * g.items_per_chunk;
        const int end = begin + g.items_per_chunk < g.items ? begin + g.items_per_chunk : g.items;
        for (int item = begin + threadIdx.y; item < end; item += blockDim.y) {
            const int oy = item % g.out_height, run = item / g.out_height % g.runs, n = item / g.out_height / g.runs;
            const int ox = run * P, left = ox * S - pad;
            const int64_t pixel = (static_cast<int64_t>(n) * g.out_height + oy) * g.out_width + ox;
            A dz[P][V];
#pragma unroll
            for (int p = 0; p < P; ++p) {
                Vector<T, V> gradient, output;
                const bool inside = ox + p < g.out_width;
                if (inside) {
                    gradient = *reinterpret_cast<const Vector<T, V>*>(g.grad + (pixel + p) * g.grad_pitch + channel);
                    output = *reinterpret_cast<const Vector<T, V>*>(g.z + (pixel + p) * g.z_pitch + channel);
                }
#pragma unroll
                for (int v = 0; v < V; ++v)
                    dz[p][v] = inside ? incoming(widen(gradient.lane[v]), widen(output.lane[v]), v) : A(0);
            }
            const T* image = g.x + static_cast<int64_t>(n) * g.height * g.width * g.x_pitch + channel;
#pragma unroll
            for (int ky = 0; ky < K; ++ky) {
                const int iy = oy * S - pad + ky;
                if (iy < 0 || iy >= g.height) continue;
                const T* row = image + static_cast<int64_t>(iy) * g.width * g.x_pitch;
#pragma unroll
                for (int i = 0; i < I; ++i) {
                    const int ix = left + i;
                    Vector<T, V> loaded;
                    const bool inside = ix >= 0 && ix < g.width;
                    if (inside) loaded = *reinterpret_cast<const Vector<T, V>*>(row + ix * g.x_pitch);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        const A value = inside ? activate(widen(loaded.lane[v]), v) : A(0);
#pragma unroll
                        for (int p = 0; p < P; ++p)
                            if (i >= p * S && i - p * S < K) own[ky][i - p * S][v] += value * dz[p][v];
                    }
                }
            }
        }
    }

    // The rows of threads add theirs one after another.
    const int across = blockDim.x * V;
    for (int turn = 0; turn < static_cast<int>(blockDim.y); ++turn) {
        if (static_cast<int>(threadIdx.y) == turn) {
#pragma unroll
            for (int tap = 0; tap < K * K; ++tap)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    A& sum = shared[tap * across + threadIdx.x * V + v];
                    sum = turn == 0 ? own[tap / K][tap % K][v] : sum + own[tap / K][tap % K][v];
                }
        }
        __syncthreads();
    }
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < across * K * K; i += kDepthwiseThreads) {
        const int tap = i / across, c = first_channel + i % across;
        if (c < g.channels) g.partial[(static_cast<int64_t>(blockIdx.y) * K * K + tap) * g.channels + c] = shared[i];
    }
}

// The same for kernels and strides known at run time, one tap a block. grid: channels, chunks of items, taps.
template <typename T>
__global__ void __launch_bounds__(kDepthwiseThreads) weight_gradient_of_tap(const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    __shared__ A shared[kDepthwiseThreads];
    const int first_channel = blockIdx.x * blockDim.x, channel = first_channel + threadIdx.x;
    const int present = present_channels(g.present, g.channels);
    if (first_channel >= present) return;

    A own[1] = {};
    if (channel < present) {
        const Incoming<1, A> incoming(g.norm, g.relu, channel, g.channels);
        const Activation<1, A> activate(g.scale, g.shift, g.in_relu, channel, g.channels);
        const int ky = blockIdx.z / g.kernel, kx = blockIdx.z % g.kernel, pad = g.kernel / 2;
        const int begin = blockIdx.y * g.items_per_chunk;
        const int end = begin + g.items_per_chunk < g.items ? begin + g.items_per_chunk : g.items;
        for (int item = begin + threadIdx.y; item < end; item += blockDim.y) {
            const int oy = item % g.out_height, ox = item / g.out_height % g.runs, n = item / g.out_height / g.runs;
            const int iy = oy * g.stride - pad + ky, ix = ox * g.stride - pad + kx;
            if (iy < 0 || iy >= g.height || ix < 0 || ix >= g.width) continue;
            const int64_t out = (static_cast<int64_t>(n) * g.out_height + oy) * g.out_width + ox;
            const int64_t in = (static_cast<int64_t>(n) * g.height + iy) * g.width + ix;
            own[0] += incoming(widen(g.grad[out * g.grad_pitch + channel]), widen(g.z[out * g.z_pitch + channel]), 0) *
                      activate(widen(g.x[in * g.x_pitch + channel]), 0);
        }
    }
    add_rows<1>(own, shared);
    if (threadIdx.y == 0 && channel < g.channels)
        g.partial[(static_cast<int64_t>(blockIdx.y) * gridDim.z + blockIdx.z) * g.channels + channel] = own[0];
}

bool backward_has_pairs(const Depthwise& layer, const DepthwiseGradient& gradient) {
    return has_pairs(layer.dtype, layer.x, layer.x_pitch) &&
           has_pairs(layer.dtype, gradient.grad, gradient.grad_pitch) &&
           has_pairs(layer.dtype, gradient.z, gradient.z_pitch) &&
           has_pairs(layer.dtype, gradient.grad_x, layer.channels);
}

DepthwisePlan data_plan(const Depthwise& layer, int vector, int pixels) {
    return plan_depthwise(layer, layer.height, layer.width, vector, pixels, kDataBlocks, 1);
}

DepthwisePlan weight_plan(const Depthwise& layer, int vector, int pixels) {
    return plan_depthwise(layer, layer.out_height(), layer.out_width(), vector, pixels, kWeightBlocks, kWeightRuns);
}

template <typename T, int K, int S>
const char* run(const Depthwise& layer, const DepthwiseGradient& gradient, void* workspace, void* stream) {
    using A = Accumulator<T>;
    const DepthwisePlan data = data_plan(layer, kVector<K>, kDataPixels<K, S>);
    const DepthwisePlan weight = weight_plan(layer, kVector<K>, kWeightPixels<K, S>);
    BackwardArguments<T> g;
    g.grad = static_cast<const T*>(gradient.grad), g.z = static_cast<const T*>(gradient.z);
    g.x = static_cast<const T*>(layer.x), g.weight = static_cast<const T*>(layer.weight);
    g.grad_pitch = gradient.grad_pitch, g.z_pitch = gradient.z_pitch, g.x_pitch = layer.x_pitch;
    g.norm = static_cast<const A*>(gradient.norm), g.centre = static_cast<const A*>(gradient.centre);
    g.scale = layer.scale, g.shift = layer.shift, g.present = layer.present;
    g.height = layer.height, g.width = layer.width;
    g.out_height = layer.out_height(), g.out_width = layer.out_width();
    g.channels = layer.channels, g.kernel = layer.kernel, g.stride = layer.stride;
    g.relu = gradient.relu, g.in_relu = layer.relu;
    g.grad_x = static_cast<T*>(gradient.grad_x);
    const dim3 finish(kFinishChannels, kFinishLanes);

    g.runs = data.runs, g.items = data.items, g.items_per_chunk = data.items_per_chunk;
    g.partial = static_cast<A*>(workspace);
    SPOS_LAUNCH((data_gradient<T, K, S>), dim3(data.channel_blocks, data.chunks), data.block, 0, stream, g);
    if (const char* error = launch_error()) return error;
    if (gradient.centre != nullptr) {
        const TwoVectors<A> to{static_cast<A*>(gradient.sum), static_cast<A*>(gradient.product)};
        SPOS_LAUNCH((finish_sums<A, TwoVectors<A>>), dim3(divide_up(g.channels, kFinishChannels), 2), finish, 0, stream,
                    g.partial, static_cast<int>(data.chunks), g.channels, g.channels, g.present, to);
        if (const char* error = launch_error()) return error;
    }

    const int taps = g.kernel * g.kernel, stored = static_cast<int>(gradient.stored);
    g.runs = weight.runs, g.items = weight.items, g.items_per_chunk = weight.items_per_chunk;
    g.partial += 2 * data.chunks * layer.channels;
    if constexpr (K != 0) {
        SPOS_LAUNCH((weight_gradient<T, K, S>), dim3(weight.channel_blocks, weight.chunks), weight.block, 0, stream, g);
    } else {
        SPOS_LAUNCH((weight_gradient_of_tap<T>), dim3(weight.channel_blocks, weight.chunks, taps), weight.block, 0,
                    stream, g);
    }
    if (const char* error = launch_error()) return error;
    const Taps<T> to{static_cast<T*>(gradient.grad_weight), taps};
    SPOS_LAUNCH((finish_sums<A, Taps<T>>), dim3(divide_up(stored, kFinishChannels), taps), finish, 0, stream, g.partial,
                static_cast<int>(weight.chunks), g.channels, stored, g.present, to);
    return launch_error();
}

}  // namespace

int64_t depthwise_backward_workspace_bytes(const Depthwise& layer) {
    const int64_t item = layer.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    int64_t data = 0, weight = 0;  // chunks, whichever kernels will run
    for (const int vector : {1, 2})
        for (const int pixels : {1, 3, 4, 5, 7, 8}) {
            data = std::max(data, data_plan(layer, vector, pixels).chunks);
            weight = std::max(weight, weight_plan(layer, vector, pixels).chunks);
        }
    return (2 * data + layer.kernel * layer.kernel * weight) * layer.channels * item;
}

const char* depthwise_backward(const Depthwise& layer, const DepthwiseGradient& gradient, void* workspace,
                               void* stream) {
    const int64_t pitch = std::max({layer.x_pitch, gradient.grad_pitch, gradient.z_pitch});
    if (const char* refused = refuse_depthwise(layer, pitch)) return refused;
    return select_depthwise(layer, backward_has_pairs(layer, gradient), [&](auto type, auto kernel, auto stride) {
        return run<decltype(type), decltype(kernel)::value, decltype(stride)::value>(layer, gradient, workspace,
                                                                                     stream);
    });
}

}  // namespace spos::cuda
