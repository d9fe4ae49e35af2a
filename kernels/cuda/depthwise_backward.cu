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

// Pixels of one thread, as many as its registers hold. For the data, of the input: a run along a row, a multiple of the
// stride, and the same in the row below. For the weight, of the output: a run.
template <int K, int S>
constexpr int kDataPixels = K == 0 ? 1 : 4;
template <int K>
constexpr int kDataRows = K == 0 ? 1 : 2;
template <int K, int S>
constexpr int kWeightPixels = K == 0 ? 1 : (K == 7 && S == 2 ? 3 : 4);

// Rows of taps whose sums a thread keeps. The 49 taps of K = 7 go to two blocks.
template <int K>
constexpr int kTapRows = K == 7 ? 4 : K;

// A promise to the compiler, in blocks a processor: at most 168 registers a thread for K = 5 and 7, 128 for the others.
template <int K>
constexpr int kBackwardBlocksPerProcessor = K >= 5 ? 3 : 4;

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
        const bool passes = !relu | (scale[v] * z + shift[v] > 0);  // no short cut: a branch would cost more
        return scale[v] * ((passes ? grad : A(0)) - offset[v] - slope[v] * (z - mean[v]));
    }
};

// Loads I pixels of the gradient of z, zero where they lie outside.
template <int I, int V, typename T>
__device__ void load_incoming(const T* grad, const T* z, int grad_pitch, int z_pitch, unsigned inside,
                              const Incoming<V, Accumulator<T>>& incoming, Accumulator<T> (&in)[I][V]) {
    const char *grad_at = reinterpret_cast<const char*>(grad), *z_at = reinterpret_cast<const char*>(z);
    const int64_t grad_step = grad_pitch * static_cast<int64_t>(sizeof(T));
    const int64_t z_step = z_pitch * static_cast<int64_t>(sizeof(T));
    Vector<T, V> gradient[I], output[I];
#pragma unroll
    for (int i = 0; i < I; ++i, grad_at += grad_step, z_at += z_step) {
        if (inside >> i & 1) gradient[i] = *reinterpret_cast<const Vector<T, V>*>(grad_at);
        if (inside >> i & 1) output[i] = *reinterpret_cast<const Vector<T, V>*>(z_at);
    }
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Accumulator<T> value = incoming(widen(gradient[i].lane[v]), widen(output[i].lane[v]), v);
            in[i][v] = inside >> i & 1 ? value : Accumulator<T>(0);
        }
}

// grid: channels, chunks of items. partial: [chunks, 2, channels], if there is a centre.
template <typename T, int K, int S>
__global__ void __launch_bounds__(kDepthwiseThreads, kBackwardBlocksPerProcessor<K>) data_gradient(
    const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    constexpr int V = kVector<K>, P = kDataPixels<K, S>, R = kDataRows<K>;
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
        A centre[V];
#pragma unroll
        for (int v = 0; v < V; ++v) centre[v] = g.centre == nullptr ? A(0) : g.centre[channel + v];
        const Incoming<V, A> incoming(g.norm, g.relu, channel, g.channels);
        const Activation<V, A> activate(g.scale, g.shift, g.in_relu, channel, g.channels);
        const int bands = (g.height + R - 1) / R;
        for (int item = begin + threadIdx.y; item < end; item += blockDim.y) {
            const int iy = item % bands * R, run = item / bands % g.runs, n = item / bands / g.runs;
            const int ix = run * P;
            const int64_t image = static_cast<int64_t>(n) * g.out_height * g.out_width;
            // Output row oy saw input row iy + r under kernel row ky = iy + r + pad - oy * stride.
            const int after = iy + pad - kernel, last = (iy + R - 1 + pad) / stride;
            const int first_row = after < 0 ? 0 : after / stride + 1;
            const int end_row = channel >= present ? 0 : (last < g.out_height ? last + 1 : g.out_height);
            // The same for columns: what a run gathers from, and which of that is inside of the image, one bit each.
            constexpr int kPad = K / 2, kBefore = K == 0 ? 0 : kPad / (S + !S),
                          I = (P - 1 + kPad) / (S + !S) + kBefore + 1;
            const int left = K == 0 ? 0 : ix / stride - kBefore;
            const unsigned inside = columns_inside<I>(left, g.out_width);
            A sum[R][P][V] = {};
#pragma unroll 1
            for (int oy = first_row; oy < end_row; ++oy) {
                const int64_t row = image + static_cast<int64_t>(oy) * g.out_width + left;
                const T* grad = g.grad + row * g.grad_pitch + channel;
                const T* z = g.z + row * g.z_pitch + channel;
                if constexpr (K != 0) {
                    A in[I][V];
                    load_incoming<I, V>(grad, z, g.grad_pitch, g.z_pitch, inside, incoming, in);
#pragma unroll
                    for (int r = 0; r < R; ++r) {
                        const int ky = iy + r + pad - oy * S;
                        if (ky < 0 || ky >= K) continue;
#pragma unroll
                        for (int kx = 0; kx < K; ++kx) {
                            const A* tap = weights + ((ky * K + kx) * blockDim.x + threadIdx.x) * V;
#pragma unroll
                            for (int v = 0; v < V; ++v) {
                                const A weight = tap[v];
#pragma unroll
                                for (int p = 0; p < P; ++p)
                                    if ((p + kPad - kx) % S == 0)
                                        sum[r][p][v] += weight * in[(p + kPad - kx) / S + kBefore][v];
                            }
                        }
                    }
                } else {
                    const int ky = iy + pad - oy * stride;
                    const T* taps = g.weight + (static_cast<int64_t>(channel) * kernel + ky) * kernel;
                    for (int kx = 0; kx < kernel; ++kx) {
                        const int ox = (ix + pad - kx) / stride;
                        if (ix + pad < kx || ox * stride != ix + pad - kx || ox >= g.out_width) continue;
                        sum[0][0][0] +=
                            widen(taps[kx]) * incoming(widen(grad[ox * g.grad_pitch]), widen(z[ox * g.z_pitch]), 0);
                    }
                }
            }

            const int64_t pixel = (static_cast<int64_t>(n) * g.height + iy) * g.width + ix;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int columns = iy + r >= g.height ? 0 : (g.width - ix < P ? g.width - ix : P);
                const T* from = g.x + (pixel + r * g.width) * g.x_pitch + channel;
                Vector<T, V> in[P];
#pragma unroll
                for (int p = 0; p < P; ++p, from += g.x_pitch)
                    if (p < columns && channel < present) in[p] = *reinterpret_cast<const Vector<T, V>*>(from);
                T* to = g.grad_x + (pixel + r * g.width) * g.channels + channel;
#pragma unroll
                for (int p = 0; p < P; ++p, to += g.channels) {
                    Vector<T, V> stored;
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        const A value = widen(in[p].lane[v]);
                        const bool counts = p < columns && channel + v < present;
                        const bool passes = counts & (!g.in_relu | (activate(value, v) > 0));
                        const A result = passes ? sum[r][p][v] : A(0);
                        own[v] += result;
                        own[V + v] += counts ? result * (value - centre[v]) : A(0);
                        narrow(result, stored.lane[v]);
                    }
                    if (p < columns) *reinterpret_cast<Vector<T, V>*>(to) = stored;
                }
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

// grid: channels, chunks of items, groups of rows of taps. partial: [chunks, taps, channels].
template <typename T, int K, int S>
__global__ void __launch_bounds__(kDepthwiseThreads, kBackwardBlocksPerProcessor<K>) weight_gradient(
    const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    constexpr int V = kVector<K>, P = kWeightPixels<K, S>, I = (P - 1) * S + K, pad = K / 2, R = kTapRows<K>;
    __shared__ A shared[R * K * 32 * V];
    const int first_channel = blockIdx.x * blockDim.x * V, channel = first_channel + threadIdx.x * V;
    const int first_row = blockIdx.z * R;
    const int present = present_channels(g.present, g.channels);
    if (first_channel >= present) return;

    A own[R][K][V] = {};
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
            load_incoming<P, V>(g.grad + pixel * g.grad_pitch + channel, g.z + pixel * g.z_pitch + channel,
                                g.grad_pitch, g.z_pitch, columns_inside<P>(ox, g.out_width), incoming, dz);
            const unsigned inside = columns_inside<I>(left, g.width);
            const T* image = g.x + static_cast<int64_t>(n) * g.height * g.width * g.x_pitch + channel;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int iy = oy * S - pad + first_row + r;
                if (iy < 0 || iy >= g.height || first_row + r >= K) continue;
                A in[I][V];
                load_run<I, V>(image + (static_cast<int64_t>(iy) * g.width + left) * g.x_pitch, g.x_pitch, inside,
                               activate, in);
#pragma unroll
                for (int i = 0; i < I; ++i)
#pragma unroll
                    for (int v = 0; v < V; ++v)
#pragma unroll
                        for (int p = 0; p < P; ++p)
                            if (i >= p * S && i - p * S < K) own[r][i - p * S][v] += in[i][v] * dz[p][v];
            }
        }
    }

    // The rows of threads add theirs one after another.
    const int across = blockDim.x * V;
    for (int turn = 0; turn < static_cast<int>(blockDim.y); ++turn) {
        if (static_cast<int>(threadIdx.y) == turn) {
#pragma unroll
            for (int tap = 0; tap < R * K; ++tap)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    A& sum = shared[tap * across + threadIdx.x * V + v];
                    sum = turn == 0 ? own[tap / K][tap % K][v] : sum + own[tap / K][tap % K][v];
                }
        }
        __syncthreads();
    }
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < across * R * K; i += kDepthwiseThreads) {
        const int tap = first_row * K + i / across, c = first_channel + i % across;
        if (c < g.channels && tap < K * K)
            g.partial[(static_cast<int64_t>(blockIdx.y) * K * K + tap) * g.channels + c] = shared[i];
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

DepthwisePlan data_plan(const Depthwise& layer, int vector, int rows, int pixels) {
    return plan_depthwise(layer, divide_up(layer.height, rows), layer.width, vector, pixels, kDataBlocks, 1);
}

DepthwisePlan weight_plan(const Depthwise& layer, int vector, int pixels) {
    return plan_depthwise(layer, layer.out_height(), layer.out_width(), vector, pixels, kWeightBlocks, kWeightRuns);
}

template <typename T, int K, int S>
const char* run(const Depthwise& layer, const DepthwiseGradient& gradient, void* workspace, void* stream) {
    using A = Accumulator<T>;
    const DepthwisePlan data = data_plan(layer, kVector<K>, kDataRows<K>, kDataPixels<K, S>);
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
    if constexpr (K != 0) {
        const dim3 grid(weight.channel_blocks, weight.chunks, divide_up(K, kTapRows<K>));
        SPOS_LAUNCH((weight_gradient<T, K, S>), grid, weight.block, 0, stream, g);
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
    // Whichever kernels will run; they take turns, and so they share it.
    const int64_t data = std::max(data_plan(layer, 1, 1, 1).chunks, data_plan(layer, 2, 2, 4).chunks);
    int64_t weight = weight_plan(layer, 1, 1).chunks;
    for (const int pixels : {3, 4}) weight = std::max(weight, weight_plan(layer, 2, pixels).chunks);
    return std::max(2 * data, layer.kernel * layer.kernel * weight) * layer.channels * item;
}

const char* depthwise_backward(const Depthwise& layer, const DepthwiseGradient& gradient, void* workspace,
                               void* stream) {
    const int64_t pitch = std::max({layer.x_pitch, gradient.grad_pitch, gradient.z_pitch});
    if (const char* refused = refuse_depthwise(layer, pitch)) return refused;
    if (layer.groups != 1) return "gradients are computed group by group";
    return select_depthwise(layer, backward_has_pairs(layer, gradient), [&](auto type, auto kernel, auto stride) {
        return run<decltype(type), decltype(kernel)::value, decltype(stride)::value>(layer, gradient, workspace,
                                                                                     stream);
    });
}

}  // namespace spos::cuda
