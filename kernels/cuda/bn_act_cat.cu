// Columns of channels: a thread keeps the scale and shift of its channels in registers and walks down the pixels.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/bn_act_cat.h"
#include "kernels/cuda/partials.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // fixed, so that every GPU gives the same bits

constexpr int kThreads = 256;
constexpr int kTile = 4;                // loads that a thread has in flight
constexpr int kBlocksPerProcessor = 3;  // a promise to the compiler: at most 80 registers

// The same for the sums, which read two images.
constexpr int kSumThreads = 128;
constexpr int kSumTile = 2;
constexpr int kSumBlocksPerProcessor = 5;  // at most 96 registers

template <typename T>
struct CatArguments {
    const T *z, *other;
    int64_t z_pitch, other_pitch;
    const void *scale, *shift, *other_scale, *other_shift;
    bool relu;
    int front, channels, pixels, pixels_per_chunk;
    T* out;
};

// All vectors of V channels lie in one of the two images. grid: channels of out, chunks of pixels.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) normalise_and_join(const CatArguments<T> g) {
    using A = Accumulator<T>;
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V, all = g.front + g.channels;
    if (channel >= all) return;
    const int rows = blockDim.y, begin = blockIdx.y * g.pixels_per_chunk;
    const int end = begin + g.pixels_per_chunk < g.pixels ? begin + g.pixels_per_chunk : g.pixels;
    T* out = g.out + channel;

    if (channel < g.front && g.other_scale == nullptr) {
        const T* from = g.other + 2 * channel;
        for (int first = begin + threadIdx.y; first < end; first += rows * kTile) {
            Vector<T, V> low[kTile], high[kTile];  // twice V channels, every second of which passes
#pragma unroll
            for (int k = 0; k < kTile; ++k) {
                const int64_t pixel = first + k * rows;
                if (pixel >= end) continue;
                low[k] = *reinterpret_cast<const Vector<T, V>*>(from + pixel * g.other_pitch);
                if constexpr (V > 1) high[k] = *reinterpret_cast<const Vector<T, V>*>(from + pixel * g.other_pitch + V);
            }
#pragma unroll
            for (int k = 0; k < kTile; ++k) {
                const int64_t pixel = first + k * rows;
                if (pixel >= end) continue;
                Vector<T, V> passing;
#pragma unroll
                for (int v = 0; v < V; ++v) passing.lane[v] = 2 * v < V ? low[k].lane[2 * v] : high[k].lane[2 * v - V];
                *reinterpret_cast<Vector<T, V>*>(out + pixel * all) = passing;
            }
        }
        return;
    }

    const bool ahead = channel < g.front;
    const T* from = ahead ? g.other + channel : g.z + channel - g.front;
    const int64_t pitch = ahead ? g.other_pitch : g.z_pitch;
    const Activation<V, A> activate(ahead ? g.other_scale : g.scale, ahead ? g.other_shift : g.shift, g.relu,
                                    ahead ? channel : channel - g.front, ahead ? g.front : g.channels);
    walk<kTile, V>(activate, from, pitch, out, all, begin + static_cast<int>(threadIdx.y), end, rows);
}

template <typename T>
struct SumArguments {
    const T *grad, *z;
    int64_t grad_pitch, z_pitch;
    const Accumulator<T>*scale, *shift, *mean;
    bool relu;
    int channels, pixels, pixels_per_chunk;
    Accumulator<T>* partial;  // [chunks, 2, channels]
};

// grid: channels, chunks of pixels.
template <typename T, int V>
__global__ void __launch_bounds__(kSumThreads, kSumBlocksPerProcessor) sum_of_columns(const SumArguments<T> g) {
    using A = Accumulator<T>;
    __shared__ A shared[kSumThreads * 2 * V];
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    const int rows = blockDim.y, begin = blockIdx.y * g.pixels_per_chunk;
    const int end = begin + g.pixels_per_chunk < g.pixels ? begin + g.pixels_per_chunk : g.pixels;

    A own[2 * V] = {};
    if (channel < g.channels) {
        A scale[V], shift[V], mean[V];
#pragma unroll
        for (int v = 0; v < V; ++v)
            scale[v] = g.scale[channel + v], shift[v] = g.shift[channel + v], mean[v] = g.mean[channel + v];
        for (int first = begin + threadIdx.y; first < end; first += rows * kSumTile) {
            Vector<T, V> grad[kSumTile], z[kSumTile];
#pragma unroll
            for (int k = 0; k < kSumTile; ++k) {
                const int64_t pixel = first + k * rows;
                if (pixel >= end) continue;
                grad[k] = *reinterpret_cast<const Vector<T, V>*>(g.grad + pixel * g.grad_pitch + channel);
                z[k] = *reinterpret_cast<const Vector<T, V>*>(g.z + pixel * g.z_pitch + channel);
            }
#pragma unroll
            for (int k = 0; k < kSumTile; ++k) {
                if (first + k * rows >= end) continue;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const A value = widen(z[k].lane[v]);
                    const A passed = !g.relu || scale[v] * value + shift[v] > 0 ? widen(grad[k].lane[v]) : A(0);
                    own[v] += passed;
                    own[V + v] += passed * (value - mean[v]);
                }
            }
        }
    }
    add_rows<2 * V>(own, shared);
    if (threadIdx.y == 0 && channel < g.channels) {
        A* to = g.partial + static_cast<int64_t>(blockIdx.y) * 2 * g.channels + channel;
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = own[v], to[g.channels + v] = own[V + v];
    }
}

template <typename T>
constexpr int widest() {
    return kLoadBytes / sizeof(T);
}

const char* refuse(int64_t pixels, int64_t channels) {
    const int64_t most = int64_t{1} << 30;
    if (pixels >= most || channels >= most) return "z is too large for one launch: pixels must be below 2^30";
    return nullptr;
}

template <typename T, int V>
const char* join(const BnActCat& layer, void* out, void* stream) {
    const int64_t all = layer.front() + layer.channels;
    const ColumnPlan plan = plan_columns(kThreads, all, V, layer.pixels, kBlocks, kTile);
    CatArguments<T> g;
    g.z = static_cast<const T*>(layer.z), g.other = static_cast<const T*>(layer.other);
    g.z_pitch = layer.z_pitch, g.other_pitch = layer.other_pitch;
    g.scale = layer.scale, g.shift = layer.shift;
    g.other_scale = layer.other_scale, g.other_shift = layer.other_shift;
    g.relu = layer.relu;
    g.front = layer.front(), g.channels = layer.channels;
    g.pixels = layer.pixels, g.pixels_per_chunk = plan.items_per_chunk;
    g.out = static_cast<T*>(out);
    SPOS_LAUNCH((normalise_and_join<T, V>), dim3(plan.channel_blocks, plan.chunks), plan.block, 0, stream, g);
    return launch_error();
}

template <typename T>
bool can_widen(const BnActCat& layer, const void* out) {
    constexpr int V = widest<T>();
    const int64_t front = layer.front();
    if (!can_load<T, V>(layer.z, layer.z_pitch, layer.channels, front) || !can_load<T, V>(out)) return false;
    if (layer.other == nullptr) return true;
    // Passing channels are read together with their odd neighbours, which must be there.
    return can_load<T, V>(layer.other, layer.other_pitch) &&
           (layer.other_scale != nullptr || layer.other_channels % 2 == 0);
}

ColumnPlan sums_plan(const BnActSums& layer, int vector) {
    return plan_columns(kSumThreads, layer.channels, vector, layer.pixels, kBlocks, kSumTile);
}

template <typename T, int V>
const char* sums(const BnActSums& layer, void* workspace, void* sum, void* product, void* stream) {
    using A = Accumulator<T>;
    const ColumnPlan plan = sums_plan(layer, V);
    SumArguments<T> g;
    g.grad = static_cast<const T*>(layer.grad), g.z = static_cast<const T*>(layer.z);
    g.grad_pitch = layer.grad_pitch, g.z_pitch = layer.z_pitch;
    g.scale = static_cast<const A*>(layer.scale), g.shift = static_cast<const A*>(layer.shift);
    g.mean = static_cast<const A*>(layer.mean);
    g.relu = layer.relu;
    g.channels = layer.channels, g.pixels = layer.pixels, g.pixels_per_chunk = plan.items_per_chunk;
    g.partial = static_cast<A*>(workspace);
    SPOS_LAUNCH((sum_of_columns<T, V>), dim3(plan.channel_blocks, plan.chunks), plan.block, 0, stream, g);
    if (const char* error = launch_error()) return error;
    const TwoVectors<A> to{static_cast<A*>(sum), static_cast<A*>(product)};
    const int32_t* all = nullptr;
    SPOS_LAUNCH((finish_sums<A, TwoVectors<A>>), dim3(divide_up(g.channels, kFinishChannels), 2),
                dim3(kFinishChannels, kFinishLanes), 0, stream, g.partial, static_cast<int>(plan.chunks), g.channels,
                g.channels, all, to);
    return launch_error();
}

}  // namespace

const char* bn_act_cat(const BnActCat& layer, void* out, void* stream) {
    if (const char* refused = refuse(layer.pixels, layer.front() + layer.channels)) return refused;
    return with_type(layer.dtype, [&](auto type) {
        using T = decltype(type);
        return can_widen<T>(layer, out) ? join<T, widest<T>()>(layer, out, stream) : join<T, 1>(layer, out, stream);
    });
}

int64_t bn_act_sums_workspace_bytes(const BnActSums& layer) {
    // Enough for either width of load: the narrow one can ask for more chunks.
    const int64_t item = layer.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    const int widest = kLoadBytes / static_cast<int>(item_size(layer.dtype));
    return 2 * std::max(sums_plan(layer, 1).chunks, sums_plan(layer, widest).chunks) * layer.channels * item;
}

const char* bn_act_sums(const BnActSums& layer, void* workspace, void* sum, void* product, void* stream) {
    if (const char* refused = refuse(layer.pixels, layer.channels)) return refused;
    return with_type(layer.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = widest<T>();
        const bool wide =
            can_load<T, V>(layer.z, layer.z_pitch, layer.channels) && can_load<T, V>(layer.grad, layer.grad_pitch);
        return wide ? sums<T, V>(layer, workspace, sum, product, stream)
                    : sums<T, 1>(layer, workspace, sum, product, stream);
    });
}

}  // namespace spos::cuda
