// Two stages. Blocks first turn chunks of x into partial moments: a thread holds a small tile in registers, takes its
// mean, then the second moment about that mean, and merges tile after tile. One small kernel then merges the partial
// results in double. No atomics, and a grid that depends on the shape alone: the same input gives the same bits.
#include <algorithm>

#include "kernels/cuda/bn_moments.h"
#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/vector.cuh"

namespace spos::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 4;           // loads that a thread has in flight, and the depth of its register tile
constexpr int64_t kBlocks = 1024;  // about what fills the largest GPUs; fixed, so that every GPU gives the same bits
constexpr int kBlocksPerProcessor = 3;  // a promise to the compiler: at most 85 registers
constexpr int kParts = 3;               // what a chunk leaves a channel: pivot, mean and second moment
constexpr int kMergeChannels = 32;
constexpr int kMergeLanes = 8;

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// How stage one cuts its work. A unit is a pixel (channels last) or a sample (NCHW).
struct Plan {
    dim3 block;
    int64_t channel_blocks;
    int64_t units, units_per_chunk, chunks;
    int64_t values_per_unit;
};

Plan make_plan(const MomentsShape& s, int vector) {
    Plan plan;
    int64_t least;  // units that give each thread one full tile
    if (s.channels_last) {
        unsigned across = 1;
        while (across < 32 && across * vector < s.channels) across *= 2;
        plan.block = dim3(across, kThreads / across);
        plan.channel_blocks = divide_up(s.channels, across * vector);
        plan.units = s.count();
        plan.values_per_unit = 1;
        least = plan.block.y * kTile;
    } else {
        plan.block = dim3(kThreads);
        plan.channel_blocks = s.channels;
        plan.units = s.samples;
        plan.values_per_unit = s.pixels;
        least = divide_up(kThreads * vector * kTile, s.pixels);
    }
    const int64_t wanted = std::max<int64_t>(1, kBlocks / (plan.channel_blocks * s.groups));
    plan.units_per_chunk = std::max(least, divide_up(plan.units, wanted));
    plan.chunks = divide_up(plan.units, plan.units_per_chunk);
    return plan;
}

// Channels last. threadIdx.x counts vectors of V channels, threadIdx.y pixels; grid: channels, chunks, groups.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) moments_of_columns(
    const T* x, int64_t pitch, int64_t pixels, int64_t pixels_per_chunk, int channels, Accumulator<T>* partial) {
    using A = Accumulator<T>;
    __shared__ A shared_count[kThreads], shared_pivot[kThreads * V], shared_mean[kThreads * V], shared_m2[kThreads * V];
    const int rows = blockDim.y, row = threadIdx.y;
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    const int64_t begin = blockIdx.y * pixels_per_chunk;
    const int64_t end = begin + pixels_per_chunk < pixels ? begin + pixels_per_chunk : pixels;
    const T* start = x + blockIdx.z * pixels * pitch + channel;

    A count = 0, pivot[V] = {}, mean[V] = {}, m2[V] = {};
    if (channel < channels) {
        for (int64_t first = begin + row; first < end; first += static_cast<int64_t>(rows) * kTile) {
            Vector<T, V> tile[kTile];
            int n = 0;
#pragma unroll
            for (int k = 0; k < kTile; ++k) {
                const int64_t pixel = first + k * rows;
                if (pixel < end) tile[k] = *reinterpret_cast<const Vector<T, V>*>(start + pixel * pitch), n = k + 1;
            }
            const A total = count + n, weight = n / total, inverse = A(1) / n;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (count == 0) pivot[v] = widen(tile[0].lane[v]);
                A sum = 0, square = 0;
#pragma unroll
                for (int k = 0; k < kTile; ++k) sum += k < n ? widen(tile[k].lane[v]) - pivot[v] : A(0);
                const A centre = sum * inverse;
#pragma unroll
                for (int k = 0; k < kTile; ++k) {
                    const A d = k < n ? widen(tile[k].lane[v]) - pivot[v] - centre : A(0);
                    square += d * d;
                }
                const A delta = centre - mean[v];
                mean[v] += delta * weight;
                m2[v] += square + delta * delta * count * weight;
            }
            count = total;
        }
    }

    const int slot = threadIdx.y * blockDim.x + threadIdx.x;
    shared_count[slot] = count;
    for (int v = 0; v < V; ++v) {
        shared_pivot[slot * V + v] = pivot[v];
        shared_mean[slot * V + v] = mean[v];
        shared_m2[slot * V + v] = m2[v];
    }
    __syncthreads();
    for (int step = rows / 2; step > 0; step /= 2) {
        if (row < step) {
            const int other = slot + step * blockDim.x;
            Moments<A> merged{};
            for (int v = 0; v < V; ++v) {
                const int a = slot * V + v, b = other * V + v;
                merged = merge(Moments<A>{shared_count[slot], shared_pivot[a], shared_mean[a], shared_m2[a]},
                               Moments<A>{shared_count[other], shared_pivot[b], shared_mean[b], shared_m2[b]});
                shared_pivot[a] = merged.pivot;
                shared_mean[a] = merged.mean;
                shared_m2[a] = merged.m2;
            }
            shared_count[slot] = merged.count;
        }
        __syncthreads();
    }
    if (row == 0) {
        A* out = partial + kParts * (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * channels + channel;
        for (int v = 0; v < V && channel + v < channels; ++v) {
            out[v] = shared_pivot[slot * V + v];
            out[channels + v] = shared_mean[slot * V + v];
            out[2 * channels + v] = shared_m2[slot * V + v];
        }
    }
}

// NCHW. One block, one channel; its threads go over the vectors of all samples in the chunk. grid: channels, chunks,
// groups.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) moments_of_rows(const T* x, int64_t pitch, int64_t samples,
                                                            int64_t samples_per_chunk, int pixels, int channels,
                                                            Accumulator<T>* partial) {
    using A = Accumulator<T>;
    __shared__ Moments<A> of_warp[kThreads / 32];
    const int channel = blockIdx.x;
    const int64_t begin = blockIdx.y * samples_per_chunk;
    const int64_t height = samples - begin < samples_per_chunk ? samples - begin : samples_per_chunk;
    const T* start = x + (blockIdx.z * samples + begin) * pitch + static_cast<int64_t>(channel) * pixels;
    const int64_t row = pixels / V, vectors = height * row;

    Moments<A> own{};
    for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kTile) {
        Vector<T, V> tile[kTile];
        int n = 0;
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t vector = first + k * kThreads;
            if (vector < vectors) {
                const int64_t sample = vector / row;
                const T* source = start + sample * pitch + (vector - sample * row) * V;
                tile[k] = *reinterpret_cast<const Vector<T, V>*>(source), n = k + 1;
            }
        }
        const A pivot = own.count == 0 ? widen(tile[0].lane[0]) : own.pivot;
        A sum = 0, square = 0;
#pragma unroll
        for (int k = 0; k < kTile; ++k)
#pragma unroll
            for (int v = 0; v < V; ++v) sum += k < n ? widen(tile[k].lane[v]) - pivot : A(0);
        const A centre = sum / (n * V);
#pragma unroll
        for (int k = 0; k < kTile; ++k)
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const A d = k < n ? widen(tile[k].lane[v]) - pivot - centre : A(0);
                square += d * d;
            }
        own = merge(own, Moments<A>{A(n * V), pivot, centre, square});
    }

    own = merge_warp(own);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kThreads / 32; ++warp) own = merge(own, of_warp[warp]);
        A* out = partial + kParts * (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * channels + channel;
        out[0] = own.pivot;
        out[channels] = own.mean;
        out[2 * channels] = own.m2;
    }
}

// Stage two. partial: [groups, chunks, kParts, channels]; every chunk but the last holds `per_chunk` of `count` values.
// threadIdx.x counts channels, threadIdx.y shares the chunks; grid: channels, groups.
template <typename A>
__global__ void __launch_bounds__(kMergeChannels* kMergeLanes) merge_chunks(const A* partial, int64_t chunks,
                                                                            int64_t per_chunk, int64_t count,
                                                                            int channels, A* mean, A* m2) {
    __shared__ Moments<double> shared[kMergeLanes][kMergeChannels];
    const int channel = blockIdx.x * kMergeChannels + threadIdx.x, lane = threadIdx.y;
    Moments<double> own{};
    if (channel < channels) {
        const A* in = partial + kParts * blockIdx.y * chunks * channels + channel;
        for (int64_t k = lane; k < chunks; k += kMergeLanes) {
            const int64_t rest = count - k * per_chunk;
            const double n = static_cast<double>(rest < per_chunk ? rest : per_chunk);
            const A* part = in + kParts * k * channels;
            own = merge(own, Moments<double>{n, part[0], part[channels], part[2 * channels]});
        }
    }
    shared[lane][threadIdx.x] = own;
    __syncthreads();
    if (lane == 0 && channel < channels) {
        for (int other = 1; other < kMergeLanes; ++other) own = merge(own, shared[other][threadIdx.x]);
        mean[blockIdx.y * static_cast<int64_t>(channels) + channel] = static_cast<A>(own.pivot + own.mean);
        m2[blockIdx.y * static_cast<int64_t>(channels) + channel] = static_cast<A>(own.m2);
    }
}

template <typename T>
constexpr int widest() {
    return kLoadBytes / sizeof(T);
}

template <typename T>
bool can_widen(const void* x, const MomentsShape& s) {
    return s.channels_last ? can_load<T, widest<T>()>(x, s.pitch, s.channels)
                           : can_load<T, widest<T>()>(x, s.pitch, s.pixels);
}

template <typename T, int V>
const char* run(const T* x, const MomentsShape& s, Accumulator<T>* partial, Accumulator<T>* mean, Accumulator<T>* m2,
                void* stream) {
    const Plan plan = make_plan(s, V);
    if (plan.chunks > 65535 || s.groups > 65535 || s.channels >= (int64_t{1} << 31) || s.pixels >= (int64_t{1} << 31))
        return "x is too large for one launch: groups must be below 65536, channels and pixels below 2^31";
    const dim3 grid(plan.channel_blocks, plan.chunks, s.groups);
    const int channels = static_cast<int>(s.channels);
    if (s.channels_last) {
        SPOS_LAUNCH((moments_of_columns<T, V>), grid, plan.block, 0, stream, x, s.pitch, plan.units,
                    plan.units_per_chunk, channels, partial);
    } else {
        SPOS_LAUNCH((moments_of_rows<T, V>), grid, plan.block, 0, stream, x, s.pitch, plan.units, plan.units_per_chunk,
                    static_cast<int>(s.pixels), channels, partial);
    }
    if (const char* error = launch_error()) return error;
    const dim3 merge_grid(divide_up(s.channels, kMergeChannels), s.groups), merge_block(kMergeChannels, kMergeLanes);
    SPOS_LAUNCH((merge_chunks<Accumulator<T>>), merge_grid, merge_block, 0, stream, partial, plan.chunks,
                plan.units_per_chunk * plan.values_per_unit, s.count(), channels, mean, m2);
    return launch_error();
}

template <typename T>
const char* run(const void* x, const MomentsShape& s, void* workspace, void* mean, void* m2, void* stream) {
    using A = Accumulator<T>;
    const auto run_with = can_widen<T>(x, s) ? run<T, widest<T>()> : run<T, 1>;
    return run_with(static_cast<const T*>(x), s, static_cast<A*>(workspace), static_cast<A*>(mean), static_cast<A*>(m2),
                    stream);
}

}  // namespace

int64_t bn_moments_workspace_bytes(DType dtype, const MomentsShape& shape) {
    // Enough for either width of load: the narrow one can ask for more chunks.
    const int64_t item = dtype == DType::float64 ? sizeof(double) : sizeof(float);
    const int widest = kLoadBytes / static_cast<int>(item_size(dtype));
    const int64_t chunks = std::max(make_plan(shape, 1).chunks, make_plan(shape, widest).chunks);
    return kParts * shape.groups * chunks * shape.channels * item;
}

const char* bn_moments(DType dtype, const void* x, const MomentsShape& shape, void* workspace, void* mean, void* m2,
                       void* stream) {
    switch (dtype) {
        case DType::float32:
            return run<float>(x, shape, workspace, mean, m2, stream);
        case DType::float64:
            return run<double>(x, shape, workspace, mean, m2, stream);
        case DType::float16:
            return run<__half>(x, shape, workspace, mean, m2, stream);
        case DType::bfloat16:
            return run<__nv_bfloat16>(x, shape, workspace, mean, m2, stream);
    }
    return "unknown dtype";
}

}  // namespace spos::cuda
