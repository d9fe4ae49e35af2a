// A thread keeps the scale and shift of its channels in registers and walks down the pixels. The backward pass sums two
// gradients a channel and one for all: a thread's, then its block's, then, in double and in a fixed order, all blocks'.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/quantize_codes.h"
#include "kernels/cuda/quantizer.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // fixed, so that every GPU gives the same bits
constexpr int kThreads = 256;
constexpr int kTile = 4;                // loads that a thread has in flight
constexpr int kBlocksPerProcessor = 2;  // at three, 80 registers, bfloat16 spills from sm_100 on

// The same for the backward pass, which reads two images and sums.
constexpr int kSumThreads = 128;
constexpr int kSumTile = 2;
constexpr int kSumBlocksPerProcessor = 4;  // at most 128 registers
constexpr int kSums = 3;                   // a channel: of scale, shift and step

template <typename T>
struct CodesArguments {
    const T *x, *grad;
    int64_t x_pitch, grad_pitch;
    const void *scale, *shift;
    StepChoice quantizer;
    int channels, pixels, per_chunk;
};

template <typename A>
__global__ void store_step(const StepChoice choice, A* step_used) {
    *step_used = Quantizer<1, A>::same(choice, 0).size[0];
}

// Runs behind store_step. grid: channels, chunks of pixels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) quantize_columns(const CodesArguments<T> g,
                                                                                  uint8_t* codes,
                                                                                  Accumulator<T>* step_used) {
    using A = Accumulator<T>;
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (channel >= g.channels) return;
    const int begin = blockIdx.y * g.per_chunk, rows = blockDim.y;
    const int end = begin + g.per_chunk < g.pixels ? begin + g.per_chunk : g.pixels;
    const Activation<V, A> activate(g.scale, g.shift, false, channel, g.channels);
    const auto quantizer = Quantizer<1, A>::same(g.quantizer, 0);
    bool missing = false;
    for (int first = begin + threadIdx.y; first < end; first += rows * kTile) {
        Vector<T, V> tile[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t pixel = first + k * rows;
            if (pixel < end) tile[k] = *reinterpret_cast<const Vector<T, V>*>(g.x + pixel * g.x_pitch + channel);
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t pixel = first + k * rows;
            if (pixel >= end) continue;
            Vector<uint8_t, V> made;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A code = quantizer.code(quantizer.position(activate(widen(tile[k].lane[v]), v), 0));
                missing |= code != code;
                made.lane[v] = code == code ? static_cast<uint8_t>(code) : uint8_t{0};
            }
            *reinterpret_cast<Vector<uint8_t, V>*>(codes + pixel * g.channels + channel) = made;
        }
    }
    // All who write it write the same.
    if (missing) *step_used = static_cast<A>(NAN);
}

// partial: [chunks, kSums, channels]; a thread's gradient of the step stands with its first channel. grid: channels,
// chunks of pixels.
template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerProcessor) quantize_backward_columns(
    const CodesArguments<T> g, T* grad_x, Accumulator<T>* partial) {
    using A = Accumulator<T>;
    __shared__ A shared[kSumThreads * kSums * V];
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V, rows = blockDim.y;
    const int begin = blockIdx.y * g.per_chunk;
    const int end = begin + g.per_chunk < g.pixels ? begin + g.per_chunk : g.pixels;
    A own[kSums * V] = {};
    if (channel < g.channels) {
        const Activation<V, A> activate(g.scale, g.shift, false, channel, g.channels);
        const auto quantizer = Quantizer<1, A>::same(g.quantizer, 0);
        for (int first = begin + threadIdx.y; first < end; first += rows * kSumTile) {
            Vector<T, V> grad[kSumTile], x[kSumTile];
#pragma unroll
            for (int k = 0; k < kSumTile; ++k) {
                const int64_t pixel = first + k * rows;
                if (pixel >= end) continue;
                grad[k] = *reinterpret_cast<const Vector<T, V>*>(g.grad + pixel * g.grad_pitch + channel);
                x[k] = *reinterpret_cast<const Vector<T, V>*>(g.x + pixel * g.x_pitch + channel);
            }
#pragma unroll
            for (int k = 0; k < kSumTile; ++k) {
                const int64_t pixel = first + k * rows;
                if (pixel >= end) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const A value = widen(x[k].lane[v]), given = widen(grad[k].lane[v]);
                    const A position = quantizer.position(activate(value, v), 0);
                    const A passed = quantizer.inside(position) ? given : A(0);
                    own[v] += passed * value;
                    own[V + v] += passed;
                    own[2 * V] += given * quantizer.share(position);
                    narrow(passed * activate.scale[v], grad[k].lane[v]);
                }
                *reinterpret_cast<Vector<T, V>*>(grad_x + pixel * g.channels + channel) = grad[k];
            }
        }
    }
    add_rows<kSums * V>(own, shared);
    if (threadIdx.y == 0 && channel < g.channels) {
        A* to = partial + static_cast<int64_t>(blockIdx.y) * kSums * g.channels + channel;
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int part = 0; part < kSums; ++part) to[part * g.channels + v] = own[part * V + v];
    }
}

// Where finish_sums writes the three sums of a channel.
template <typename A>
struct CodesSums {
    A *scale, *shift;
    double* step;
    bool affine;

    __device__ void set(int part, int channel, double sum) const {
        if (part == 2)
            step[channel] = sum;
        else
            (part == 0 ? scale : shift)[channel] = affine ? static_cast<A>(sum) : A(0);
    }
};

// The channels' shares of the step's gradient as one. A single block.
template <typename A>
__global__ void __launch_bounds__(kThreads) finish_step(const double* shares, int channels, StepGradients<A> to) {
    __shared__ double shared[kThreads];
    double own[1] = {};
    for (int channel = threadIdx.y; channel < channels; channel += kThreads) own[0] += shares[channel];
    add_rows<1>(own, shared);
    if (threadIdx.y == 0) to.set(0, 0, own[0]);
}

const char* refuse(const QuantizeCodes& call) {
    const int64_t most = int64_t{1} << 30;
    if (call.pixels >= most || call.channels >= most) return "x is too large for one launch: pixels must be below 2^30";
    return nullptr;
}

template <typename T>
CodesArguments<T> arguments(const QuantizeCodes& call, const ColumnPlan& plan) {
    CodesArguments<T> g{};
    g.x = static_cast<const T*>(call.x), g.x_pitch = call.x_pitch;
    g.scale = call.scale, g.shift = call.shift, g.quantizer = call.quantizer;
    g.channels = static_cast<int>(call.channels), g.pixels = static_cast<int>(call.pixels);
    g.per_chunk = static_cast<int>(plan.items_per_chunk);
    return g;
}

template <typename T, int V>
const char* run(const QuantizeCodes& call, uint8_t* codes, void* step_used, void* stream) {
    using A = Accumulator<T>;
    A* step = static_cast<A*>(step_used);
    SPOS_LAUNCH((store_step<A>), dim3(1), dim3(1), 0, stream, call.quantizer, step);
    if (const char* error = launch_error()) return error;
    const ColumnPlan plan = plan_columns(kThreads, call.channels, V, call.pixels, kBlocks, kTile);
    SPOS_LAUNCH((quantize_columns<T, V>), dim3(plan.channel_blocks, plan.chunks), plan.block, 0, stream,
                arguments<T>(call, plan), codes, step);
    return launch_error();
}

ColumnPlan backward_plan(const QuantizeCodes& call, int vector) {
    return plan_columns(kSumThreads, call.channels, vector, call.pixels, kBlocks, kSumTile);
}

template <typename T, int V>
const char* run_backward(const QuantizeCodes& call, const void* grad, int64_t grad_pitch, void* workspace, void* grad_x,
                         void* grad_step, void* grad_scale, void* grad_shift, void* stream) {
    using A = Accumulator<T>;
    const ColumnPlan plan = backward_plan(call, V);
    CodesArguments<T> g = arguments<T>(call, plan);
    g.grad = static_cast<const T*>(grad), g.grad_pitch = grad_pitch;
    double* shares = static_cast<double*>(workspace);
    A* partial = reinterpret_cast<A*>(shares + call.channels);
    SPOS_LAUNCH((quantize_backward_columns<T, V>), dim3(plan.channel_blocks, plan.chunks), plan.block, 0, stream, g,
                static_cast<T*>(grad_x), partial);
    if (const char* error = launch_error()) return error;
    const CodesSums<A> sums{static_cast<A*>(grad_scale), static_cast<A*>(grad_shift), shares, call.scale != nullptr};
    const int32_t* all = nullptr;
    SPOS_LAUNCH((finish_sums<A, CodesSums<A>>), dim3(divide_up(g.channels, kFinishChannels), kSums),
                dim3(kFinishChannels, kFinishLanes), 0, stream, partial, static_cast<int>(plan.chunks), g.channels,
                g.channels, all, sums);
    if (const char* error = launch_error()) return error;
    const StepGradients<A> step{call.quantizer, static_cast<double>(call.pixels) * static_cast<double>(call.channels),
                                static_cast<A*>(grad_step), nullptr};
    SPOS_LAUNCH((finish_step<A>), dim3(1), dim3(1, kThreads), 0, stream, shares, g.channels, step);
    return launch_error();
}

}  // namespace

const char* quantize_codes(const QuantizeCodes& call, uint8_t* codes, void* step_used, void* stream) {
    if (const char* refused = refuse(call)) return refused;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kLoadBytes / sizeof(T);
        const bool wide = can_load<T, V>(call.x, call.x_pitch, call.channels) && can_load<uint8_t, V>(codes);
        return wide ? run<T, V>(call, codes, step_used, stream) : run<T, 1>(call, codes, step_used, stream);
    });
}

int64_t quantize_codes_backward_workspace_bytes(const QuantizeCodes& call) {
    // Enough for either width of load: the narrow one can ask for more chunks.
    const int64_t item = call.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    const int widest = kLoadBytes / static_cast<int>(item_size(call.dtype));
    const int64_t chunks = std::max(backward_plan(call, 1).chunks, backward_plan(call, widest).chunks);
    return call.channels * (static_cast<int64_t>(sizeof(double)) + chunks * kSums * item);
}

const char* quantize_codes_backward(const QuantizeCodes& call, const void* grad, int64_t grad_pitch, void* workspace,
                                    void* grad_x, void* grad_step, void* grad_scale, void* grad_shift, void* stream) {
    if (const char* refused = refuse(call)) return refused;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kLoadBytes / sizeof(T);
        const bool wide = can_load<T, V>(call.x, call.x_pitch, call.channels) && can_load<T, V>(grad, grad_pitch) &&
                          can_load<T, V>(grad_x);
        const auto run_with = wide ? run_backward<T, V> : run_backward<T, 1>;
        return run_with(call, grad, grad_pitch, workspace, grad_x, grad_step, grad_scale, grad_shift, stream);
    });
}

}  // namespace spos::cuda
