// Where channels are neighbours, a thread keeps the steps of its channels and walks down the items; where a channel's
// values are runs (a weight's, or one step for all), a block takes a chunk of one channel. The gradients of steps are
// sums: a thread's, then its block's, then, in double and in a fixed order, those of all blocks.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/fake_quant.h"
#include "kernels/cuda/quantizer.cuh"
#include "kernels/cuda/runs.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // fixed, so that every GPU gives the same bits
constexpr int kThreads = 256;
constexpr int kTile = 4;                // loads that a thread has in flight
constexpr int kBlocksPerProcessor = 3;  // a promise to the compiler: at most 80 registers

// The same for the backward pass, which reads two images and sums.
constexpr int kSumThreads = 128;
constexpr int kSumTile = 2;
constexpr int kSumBlocksPerProcessor = 4;  // at most 128 registers
constexpr int kSums = 2;                   // a channel: of step and offset

template <typename T>
struct ForwardArguments {
    const T* x;
    T* out;
    StepChoice quantizer;
    QuantShape shape;
    int64_t per_chunk;  // items, or vectors of a channel
};

// grid: channels, chunks of items.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) fake_quant_columns(const ForwardArguments<T> g) {
    const int channels = static_cast<int>(g.shape.channels), channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (channel >= channels) return;
    const int64_t begin = blockIdx.y * g.per_chunk, rest = g.shape.outer - begin;
    const Quantizer<V, Accumulator<T>> quantizer(g.quantizer, channel);
    const int64_t at = begin * channels + channel;
    walk<kTile, V>(quantizer, g.x + at, channels, g.out + at, channels, static_cast<int>(threadIdx.y),
                   static_cast<int>(rest < g.per_chunk ? rest : g.per_chunk), static_cast<int>(blockDim.y));
}

// grid: channels, chunks of a channel's vectors.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) fake_quant_runs(const ForwardArguments<T> g) {
    const auto quantizer = Quantizer<V, Accumulator<T>>::same(g.quantizer, blockIdx.x);
    const Runs runs(g.shape, V, blockIdx.x, blockIdx.y, g.per_chunk);
    for (int64_t first = runs.begin + threadIdx.y; first < runs.end; first += kThreads * kTile) {
        Vector<T, V> tile[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t vector = first + k * kThreads;
            if (vector < runs.end) tile[k] = *reinterpret_cast<const Vector<T, V>*>(g.x + runs.offset(vector));
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t vector = first + k * kThreads;
            if (vector >= runs.end) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) narrow(quantizer(widen(tile[k].lane[v]), v), tile[k].lane[v]);
            *reinterpret_cast<Vector<T, V>*>(g.out + runs.offset(vector)) = tile[k];
        }
    }
}

template <typename T>
struct BackwardArguments {
    const T *grad, *x;
    T* grad_x;
    StepChoice quantizer;
    QuantShape shape;
    int64_t per_chunk;
    Accumulator<T>* partial;  // [chunks, kSums, channels]
};

// Adds a tile's share to the sums of lanes `sum` (of step) and `sum + V` (of offset), and turns it into grad_x.
template <int V, typename A, typename T, int N>
__device__ inline void pass_gradient(const Quantizer<V, A>& quantizer, const Vector<T, V>& x, Vector<T, V>& grad,
                                     A (&own)[N]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const A position = quantizer.position(widen(x.lane[v]), v), g = widen(grad.lane[v]);
        const bool inside = quantizer.inside(position);
        const int lane = N == kSums ? 0 : v;  // one channel's sums, or each lane's
        own[lane] += g * quantizer.share(position);
        own[N / kSums + lane] += inside ? A(0) : g;
        narrow(inside ? g : A(0), grad.lane[v]);
    }
}

// grid: channels, chunks of items.
template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerProcessor) fake_quant_backward_columns(
    const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    __shared__ A shared[kSumThreads * kSums * V];
    const int channels = static_cast<int>(g.shape.channels), channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    const int64_t begin = blockIdx.y * g.per_chunk, rest = g.shape.outer - begin;
    const int64_t end = begin + (rest < g.per_chunk ? rest : g.per_chunk);

    A own[kSums * V] = {};
    if (channel < channels) {
        const Quantizer<V, A> quantizer(g.quantizer, channel);
        for (int64_t first = begin + threadIdx.y; first < end; first += blockDim.y * kSumTile) {
            Vector<T, V> grad[kSumTile], x[kSumTile];
#pragma unroll
            for (int k = 0; k < kSumTile; ++k) {
                const int64_t item = first + k * blockDim.y;
                if (item >= end) continue;
                grad[k] = *reinterpret_cast<const Vector<T, V>*>(g.grad + item * channels + channel);
                x[k] = *reinterpret_cast<const Vector<T, V>*>(g.x + item * channels + channel);
            }
#pragma unroll
            for (int k = 0; k < kSumTile; ++k) {
                const int64_t item = first + k * blockDim.y;
                if (item >= end) continue;
                pass_gradient(quantizer, x[k], grad[k], own);
                *reinterpret_cast<Vector<T, V>*>(g.grad_x + item * channels + channel) = grad[k];
            }
        }
    }
    add_rows<kSums * V>(own, shared);
    if (threadIdx.y == 0 && channel < channels) {
        A* to = g.partial + static_cast<int64_t>(blockIdx.y) * kSums * channels + channel;
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = own[v], to[channels + v] = own[V + v];
    }
}

// grid: channels, chunks of a channel's vectors.
template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerProcessor) fake_quant_backward_runs(
    const BackwardArguments<T> g) {
    using A = Accumulator<T>;
    __shared__ A shared[kSumThreads * kSums];
    const auto quantizer = Quantizer<V, A>::same(g.quantizer, blockIdx.x);
    const Runs runs(g.shape, V, blockIdx.x, blockIdx.y, g.per_chunk);
    A own[kSums] = {};
    for (int64_t first = runs.begin + threadIdx.y; first < runs.end; first += kSumThreads * kSumTile) {
        Vector<T, V> grad[kSumTile], x[kSumTile];
#pragma unroll
        for (int k = 0; k < kSumTile; ++k) {
            const int64_t vector = first + k * kSumThreads;
            if (vector >= runs.end) continue;
            grad[k] = *reinterpret_cast<const Vector<T, V>*>(g.grad + runs.offset(vector));
            x[k] = *reinterpret_cast<const Vector<T, V>*>(g.x + runs.offset(vector));
        }
#pragma unroll
        for (int k = 0; k < kSumTile; ++k) {
            const int64_t vector = first + k * kSumThreads;
            if (vector >= runs.end) continue;
            pass_gradient(quantizer, x[k], grad[k], own);
            *reinterpret_cast<Vector<T, V>*>(g.grad_x + runs.offset(vector)) = grad[k];
        }
    }
    add_rows<kSums>(own, shared);
    if (threadIdx.y == 0) {
        A* to = g.partial + static_cast<int64_t>(blockIdx.y) * kSums * g.shape.channels + blockIdx.x;
        to[0] = own[0], to[g.shape.channels] = own[1];
    }
}

bool in_columns(const QuantShape& shape) {
    return shape.inner == 1 && shape.channels > 1;
}

const char* refuse(const QuantShape& shape) {
    if (shape.channels >= (int64_t{1} << 30) || shape.outer >= (int64_t{1} << 30))
        return "x is too large for one launch: channels, and values in front of them, must be below 2^30";
    return nullptr;
}

// Loads of V values must not cross a channel's run, nor lose alignment.
template <typename T, int V, typename... Pointers>
bool can_widen(const QuantShape& shape, Pointers... pointers) {
    return (can_load<T, V>(pointers, in_columns(shape) ? shape.channels : shape.inner) && ...);
}

template <typename T, int V>
const char* run(const FakeQuant& call, void* out, void* stream) {
    ForwardArguments<T> g{static_cast<const T*>(call.x), static_cast<T*>(out), call.quantizer, call.shape, 0};
    if (in_columns(call.shape)) {
        const ColumnPlan plan = plan_columns(kThreads, call.shape.channels, V, call.shape.outer, kBlocks, kTile);
        g.per_chunk = plan.items_per_chunk;
        SPOS_LAUNCH((fake_quant_columns<T, V>), dim3(plan.channel_blocks, plan.chunks), plan.block, 0, stream, g);
    } else {
        const RunPlan plan = plan_runs(kThreads, call.shape, V, kBlocks, kTile);
        g.per_chunk = plan.per_chunk;
        SPOS_LAUNCH((fake_quant_runs<T, V>), dim3(call.shape.channels, plan.chunks), dim3(1, kThreads), 0, stream, g);
    }
    return launch_error();
}

int64_t backward_chunks(const QuantShape& shape, int vector) {
    return in_columns(shape) ? plan_columns(kSumThreads, shape.channels, vector, shape.outer, kBlocks, kSumTile).chunks
                             : plan_runs(kSumThreads, shape, vector, kBlocks, kSumTile).chunks;
}

template <typename T, int V>
const char* run_backward(const FakeQuant& call, const void* grad, void* workspace, void* grad_x, void* grad_step,
                         void* grad_offset, void* stream) {
    using A = Accumulator<T>;
    const QuantShape& shape = call.shape;
    BackwardArguments<T> g{
        static_cast<const T*>(grad), static_cast<const T*>(call.x), static_cast<T*>(grad_x), call.quantizer, shape, 0,
        static_cast<A*>(workspace)};
    const int64_t chunks = backward_chunks(shape, V);
    if (in_columns(shape)) {
        const ColumnPlan plan = plan_columns(kSumThreads, shape.channels, V, shape.outer, kBlocks, kSumTile);
        g.per_chunk = plan.items_per_chunk;
        SPOS_LAUNCH((fake_quant_backward_columns<T, V>), dim3(plan.channel_blocks, chunks), plan.block, 0, stream, g);
    } else {
        g.per_chunk = plan_runs(kSumThreads, shape, V, kBlocks, kSumTile).per_chunk;
        SPOS_LAUNCH((fake_quant_backward_runs<T, V>), dim3(shape.channels, chunks), dim3(1, kSumThreads), 0, stream, g);
    }
    if (const char* error = launch_error()) return error;
    const StepGradients<A> to{call.quantizer, static_cast<double>(shape.per_channel()), static_cast<A*>(grad_step),
                              static_cast<A*>(grad_offset)};
    const int channels = static_cast<int>(shape.channels);
    const int32_t* all = nullptr;
    SPOS_LAUNCH((finish_sums<A, StepGradients<A>>), dim3(divide_up(channels, kFinishChannels), kSums),
                dim3(kFinishChannels, kFinishLanes), 0, stream, g.partial, static_cast<int>(chunks), channels, channels,
                all, to);
    return launch_error();
}

}  // namespace

const char* fake_quant(const FakeQuant& call, void* out, void* stream) {
    if (const char* refused = refuse(call.shape)) return refused;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kLoadBytes / sizeof(T);
        return can_widen<T, V>(call.shape, call.x, out) ? run<T, V>(call, out, stream) : run<T, 1>(call, out, stream);
    });
}

int64_t fake_quant_backward_workspace_bytes(const FakeQuant& call) {
    // Enough for either width of load: the narrow one can ask for more chunks.
    const int64_t item = call.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    const int widest = kLoadBytes / static_cast<int>(item_size(call.dtype));
    const int64_t chunks = std::max(backward_chunks(call.shape, 1), backward_chunks(call.shape, widest));
    return chunks * kSums * call.shape.channels * item;
}

const char* fake_quant_backward(const FakeQuant& call, const void* grad, void* workspace, void* grad_x, void* grad_step,
                                void* grad_offset, void* stream) {
    if (const char* refused = refuse(call.shape)) return refused;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kLoadBytes / sizeof(T);
        return can_widen<T, V>(call.shape, call.x, grad, grad_x)
                   ? run_backward<T, V>(call, grad, workspace, grad_x, grad_step, grad_offset, stream)
                   : run_backward<T, 1>(call, grad, workspace, grad_x, grad_step, grad_offset, stream);
    });
}

}  // namespace spos::cuda
