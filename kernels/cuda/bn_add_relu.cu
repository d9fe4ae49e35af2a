// A thread keeps the scales and shifts of its channels in registers and walks down the pixels of a group. The backward
// pass sums two or three gradients a channel: a thread's, then its block's, then, in double and in a fixed order, all
// blocks' of the group.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/bn_add_relu.h"
#include "kernels/cuda/partials.cuh"

namespace spos::cuda {
namespace {

// Of each group, however many there are: a group has the bits of a call of its own, on every GPU.
constexpr int64_t kBlocks = 1024;
constexpr int kThreads = 256;
constexpr int kTile = 2;                // loads of each image that a thread has in flight
constexpr int kBlocksPerProcessor = 3;  // a promise to the compiler: at most 80 registers

// The same for the backward pass, where a thread reads three or four images at once.
constexpr int kSumThreads = 128;
constexpr int kLeastPixels = 4;            // of a thread, so that sums are few
constexpr int kSumBlocksPerProcessor = 5;  // at most 96 registers

template <typename T>
struct Images {
    using A = Accumulator<T>;
    const T *x, *residual;
    const A *scale, *residual_scale;
    int channels, pixels, per_chunk;

    // First element of this block's group.
    __device__ int64_t first() const { return static_cast<int64_t>(blockIdx.z) * pixels * channels; }
    __device__ int begin() const { return blockIdx.y * per_chunk; }
    __device__ int end() const { return begin() + per_chunk < pixels ? begin() + per_chunk : pixels; }
    // Its row of [groups, channels], if there are any.
    __device__ const A* row(const A* values) const {
        return values == nullptr ? nullptr : values + static_cast<int64_t>(blockIdx.z) * channels;
    }
};

// grid: channels, chunks of pixels, groups.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) add_relu_columns(const Images<T> g,
                                                                                  const Accumulator<T>* shift,
                                                                                  const Accumulator<T>* residual_shift,
                                                                                  T* out) {
    using A = Accumulator<T>;
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V, rows = blockDim.y, end = g.end();
    if (channel >= g.channels) return;
    const Activation<V, A> normalized(g.row(g.scale), g.row(shift), false, channel, g.channels);
    const Activation<V, A> shortcut(g.row(g.residual_scale), g.row(residual_shift), false, channel, g.channels);
    const int64_t origin = g.first() + channel;
    for (int first = g.begin() + static_cast<int>(threadIdx.y); first < end; first += rows * kTile) {
        Vector<T, V> x[kTile], residual[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            if (first + k * rows >= end) continue;
            const int64_t at = origin + static_cast<int64_t>(first + k * rows) * g.channels;
            x[k] = *reinterpret_cast<const Vector<T, V>*>(g.x + at);
            residual[k] = *reinterpret_cast<const Vector<T, V>*>(g.residual + at);
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            if (first + k * rows >= end) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A sum = normalized(widen(x[k].lane[v]), v) + shortcut(widen(residual[k].lane[v]), v);
                narrow(clip(sum, A(0)), x[k].lane[v]);
            }
            const int64_t at = origin + static_cast<int64_t>(first + k * rows) * g.channels;
            *reinterpret_cast<Vector<T, V>*>(out + at) = x[k];
        }
    }
}

template <typename T>
struct Gradients {
    const T *grad, *out;
    T *x, *residual;
    Accumulator<T>* partial;  // [chunks, kSums, groups * channels]
};

// A channel: of scale and shift, and of the shortcut's scale if it has one.
template <bool kProjected>
constexpr int kSums = kProjected ? 3 : 2;

// kProjected: the shortcut has a scale. grid: channels, chunks of pixels, groups.
template <typename T, int V, bool kProjected>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerProcessor) add_relu_backward_columns(const Images<T> g,
                                                                                                 const Gradients<T> d) {
    using A = Accumulator<T>;
    constexpr int kParts = kSums<kProjected>;
    __shared__ A shared[kSumThreads * kParts * V];
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V, rows = blockDim.y, end = g.end();
    A own[kParts * V] = {};
    if (channel < g.channels) {
        A scale[V], residual_scale[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
            scale[v] = g.row(g.scale)[channel + v];
            if constexpr (kProjected) residual_scale[v] = g.row(g.residual_scale)[channel + v];
        }
        const int64_t origin = g.first() + channel;
        for (int pixel = g.begin() + static_cast<int>(threadIdx.y); pixel < end; pixel += rows) {
            const int64_t at = origin + static_cast<int64_t>(pixel) * g.channels;
            Vector<T, V> grad = *reinterpret_cast<const Vector<T, V>*>(d.grad + at), residual;
            const Vector<T, V> out = *reinterpret_cast<const Vector<T, V>*>(d.out + at);
            Vector<T, V> x = *reinterpret_cast<const Vector<T, V>*>(g.x + at);
            if constexpr (kProjected) residual = *reinterpret_cast<const Vector<T, V>*>(g.residual + at);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                // Where out is NaN the gradient passes.
                const A passed = widen(out.lane[v]) <= 0 ? A(0) : widen(grad.lane[v]);
                own[v] += passed * widen(x.lane[v]);
                own[V + v] += passed;
                narrow(scale[v] * passed, x.lane[v]);
                if constexpr (kProjected) {
                    own[2 * V + v] += passed * widen(residual.lane[v]);
                    narrow(residual_scale[v] * passed, grad.lane[v]);
                } else {
                    narrow(passed, grad.lane[v]);
                }
            }
            *reinterpret_cast<Vector<T, V>*>(d.x + at) = x;
            *reinterpret_cast<Vector<T, V>*>(d.residual + at) = grad;
        }
    }
    add_rows<kParts * V>(own, shared);
    if (threadIdx.y == 0 && channel < g.channels) {
        const int64_t all = static_cast<int64_t>(gridDim.z) * g.channels;
        A* to = d.partial + blockIdx.y * kParts * all + static_cast<int64_t>(blockIdx.z) * g.channels + channel;
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int part = 0; part < kParts; ++part) to[part * all + v] = own[part * V + v];
    }
}

// Where finish_sums writes the sums, [groups * channels] each.
template <typename A>
struct AddReluSums {
    A *scale, *shift, *residual_scale;
    __device__ void set(int part, int channel, double sum) const {
        (part == 0 ? scale : part == 1 ? shift : residual_scale)[channel] = static_cast<A>(sum);
    }
};

const char* refuse(const BnAddRelu& call) {
    const int64_t most = int64_t{1} << 30;
    if (call.groups > 65535 || call.pixels >= most || call.groups * call.channels >= most)
        return "x is too large for one launch: groups must be below 65536, the pixels of a group below 2^30";
    return nullptr;
}

template <typename T>
Images<T> images(const BnAddRelu& call, const ColumnPlan& plan) {
    using A = Accumulator<T>;
    return {static_cast<const T*>(call.x),         static_cast<const T*>(call.residual),
            static_cast<const A*>(call.scale),     static_cast<const A*>(call.residual_scale),
            static_cast<int>(call.channels),       static_cast<int>(call.pixels),
            static_cast<int>(plan.items_per_chunk)};
}

template <typename T>
constexpr int widest() {
    return kLoadBytes / sizeof(T);
}

template <typename T, typename... Pointers>
bool can_widen(const BnAddRelu& call, Pointers... pointers) {
    return (can_load<T, widest<T>()>(pointers, call.channels) && ...);
}

template <typename T, int V>
const char* run(const BnAddRelu& call, const void* shift, const void* residual_shift, void* out, void* stream) {
    using A = Accumulator<T>;
    const ColumnPlan plan = plan_columns(kThreads, call.channels, V, call.pixels, kBlocks, kTile);
    SPOS_LAUNCH((add_relu_columns<T, V>), dim3(plan.channel_blocks, plan.chunks, call.groups), plan.block, 0, stream,
                images<T>(call, plan), static_cast<const A*>(shift), static_cast<const A*>(residual_shift),
                static_cast<T*>(out));
    return launch_error();
}

ColumnPlan backward_plan(const BnAddRelu& call, int vector) {
    return plan_columns(kSumThreads, call.channels, vector, call.pixels, kBlocks, kLeastPixels);
}

template <typename T, int V, bool kProjected>
const char* run_backward(const BnAddRelu& call, const void* grad, const void* out, void* workspace,
                         const BnAddReluGradients& to, void* stream) {
    using A = Accumulator<T>;
    const ColumnPlan plan = backward_plan(call, V);
    A* partial = static_cast<A*>(workspace);
    const Gradients<T> d{static_cast<const T*>(grad), static_cast<const T*>(out), static_cast<T*>(to.x),
                         static_cast<T*>(to.residual), partial};
    SPOS_LAUNCH((add_relu_backward_columns<T, V, kProjected>), dim3(plan.channel_blocks, plan.chunks, call.groups),
                plan.block, 0, stream, images<T>(call, plan), d);
    if (const char* error = launch_error()) return error;
    const AddReluSums<A> sums{static_cast<A*>(to.scale), static_cast<A*>(to.shift), static_cast<A*>(to.residual_scale)};
    // All groups' channels stand side by side, and every group has as many chunks.
    const int all = static_cast<int>(call.groups * call.channels);
    const int32_t* width = nullptr;
    SPOS_LAUNCH((finish_sums<A, AddReluSums<A>>), dim3(divide_up(all, kFinishChannels), kSums<kProjected>),
                dim3(kFinishChannels, kFinishLanes), 0, stream, partial, static_cast<int>(plan.chunks), all, all, width,
                sums);
    return launch_error();
}

}  // namespace

const char* bn_add_relu(const BnAddRelu& call, const void* shift, const void* residual_shift, void* out, void* stream) {
    if (const char* refused = refuse(call)) return refused;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        const auto run_with = can_widen<T>(call, call.x, call.residual, out) ? run<T, widest<T>()> : run<T, 1>;
        return run_with(call, shift, residual_shift, out, stream);
    });
}

int64_t bn_add_relu_backward_workspace_bytes(const BnAddRelu& call) {
    // Enough for either width of load: the narrow one can ask for more chunks.
    const int64_t item = call.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    const int widest = kLoadBytes / static_cast<int>(item_size(call.dtype));
    const int64_t chunks = std::max(backward_plan(call, 1).chunks, backward_plan(call, widest).chunks);
    const int64_t sums = call.residual_scale != nullptr ? kSums<true> : kSums<false>;
    return chunks * sums * call.groups * call.channels * item;
}

const char* bn_add_relu_backward(const BnAddRelu& call, const void* grad, const void* out, void* workspace,
                                 const BnAddReluGradients& to, void* stream) {
    if (const char* refused = refuse(call)) return refused;
    return with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = widest<T>();
        const bool projected = call.residual_scale != nullptr;
        const bool wide = can_widen<T>(call, call.x, grad, out, to.x, to.residual) &&
                          (!projected || can_widen<T>(call, call.residual));
        const auto run_with = projected ? (wide ? run_backward<T, V, true> : run_backward<T, 1, true>)
                                        : (wide ? run_backward<T, V, false> : run_backward<T, 1, false>);
        return run_with(call, grad, out, workspace, to, stream);
    });
}

}  // namespace spos::cuda
