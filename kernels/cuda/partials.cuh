// What blocks leave behind for a second, small kernel, and how that kernel puts it together: no atomics, always in the
// same order.
#pragma once

#include <algorithm>

#include "kernels/cuda/moments.cuh"
#include "kernels/cuda/vector.cuh"

namespace spos::cuda {

inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

constexpr int kFinishChannels = 32;  // of a block of the second stage
constexpr int kFinishLanes = 16;     // threads that share the partial results of one channel

// How blocks share a matrix of items (pixels, or runs of them) and channels. threadIdx.x counts vectors of channels,
// threadIdx.y items; grid: channel blocks, chunks of items.
struct ColumnPlan {
    dim3 block;
    int64_t channel_blocks, items, items_per_chunk, chunks;
};

// About `blocks` blocks, in which every thread has at least `least` items; it depends on the shape alone, so that every
// GPU gives the same bits. `threads`: a power of two.
inline ColumnPlan plan_columns(int threads, int64_t channels, int vector, int64_t items, int64_t blocks,
                               int64_t least) {
    // The block width of 32, 16 or 8 threads that leaves the fewest of them without a channel.
    const int64_t vectors = divide_up(channels, vector);
    unsigned across = 1;
    if (vectors < 8) {
        while (across < vectors) across *= 2;
    } else {
        across = 32;
        for (const unsigned narrower : {16u, 8u})
            if (divide_up(vectors, narrower) * narrower < divide_up(vectors, across) * across) across = narrower;
    }
    ColumnPlan plan;
    plan.block = dim3(across, threads / across);
    plan.channel_blocks = divide_up(vectors, across);
    plan.items = items;
    const int64_t wanted = std::max<int64_t>(1, blocks / plan.channel_blocks);
    const int64_t rounds = divide_up(divide_up(items, wanted), plan.block.y);
    plan.items_per_chunk = plan.block.y * std::max(least, rounds);
    plan.chunks = divide_up(items, plan.items_per_chunk);
    return plan;
}

// How many of `channels` channels are there: all, or what the device says.
__device__ inline int present_channels(const int32_t* width, int channels) {
    if (width == nullptr) return channels;
    return *width < channels ? *width : channels;
}

// --- In the first stage. threadIdx.x counts vectors of V channels, threadIdx.y shares the pixels. ---

// Merges the moments of all threads with the same threadIdx.x into the one with threadIdx.y == 0. All threads of the
// block call it; blockDim.y is a power of two; `shared` has room for V of every thread.
template <int V, typename A>
__device__ void merge_rows(Moments<A> (&own)[V], Moments<A>* shared) {
    const int slot = (threadIdx.y * blockDim.x + threadIdx.x) * V;
#pragma unroll
    for (int v = 0; v < V; ++v) shared[slot + v] = own[v];
    __syncthreads();
    for (unsigned step = blockDim.y / 2; step > 0; step /= 2) {
        if (threadIdx.y < step) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                own[v] = merge(own[v], shared[slot + step * blockDim.x * V + v]);
                shared[slot + v] = own[v];
            }
        }
        __syncthreads();
    }
}

// The same for plain sums.
template <int V, typename A>
__device__ void add_rows(A (&own)[V], A* shared) {
    const int slot = (threadIdx.y * blockDim.x + threadIdx.x) * V;
#pragma unroll
    for (int v = 0; v < V; ++v) shared[slot + v] = own[v];
    __syncthreads();
    for (unsigned step = blockDim.y / 2; step > 0; step /= 2) {
        if (threadIdx.y < step) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                own[v] += shared[slot + step * blockDim.x * V + v];
                shared[slot + v] = own[v];
            }
        }
        __syncthreads();
    }
}

// --- The second stage: blocks of kFinishChannels x kFinishLanes threads ---

// Adds the lanes' values and gives the sum to all of them.
__device__ inline double add_lanes(double own, double (&shared)[kFinishLanes][kFinishChannels]) {
    __syncthreads();  // the last sum has been read
    shared[threadIdx.y][threadIdx.x] = own;
    __syncthreads();
    double sum = 0;
    for (int lane = 0; lane < kFinishLanes; ++lane) sum += shared[lane][threadIdx.x];
    return sum;
}

// partial: [groups, chunks, channels]; mean, m2: [groups, channels]. Chan's rule for many parts at once: the mean of
// all first, then every part's second moment about it. Absent channels get zeros, whatever their partial results are.
// grid: channels, groups.
template <typename A>
__global__ void __launch_bounds__(kFinishChannels* kFinishLanes) finish_moments(const Moments<A>* partial, int chunks,
                                                                                int channels, const int32_t* width,
                                                                                A* mean, A* m2) {
    __shared__ double shared[kFinishLanes][kFinishChannels];
    const int channel = blockIdx.x * kFinishChannels + threadIdx.x;
    const bool present = channel < present_channels(width, channels);
    partial += static_cast<int64_t>(blockIdx.y) * chunks * channels;
    mean += blockIdx.y * channels, m2 += blockIdx.y * channels;
    double count = 0, sum = 0, square = 0;
    if (present) {
        for (int chunk = threadIdx.y; chunk < chunks; chunk += kFinishLanes) {
            const Moments<A> part = partial[static_cast<int64_t>(chunk) * channels + channel];
            count += part.count;
            sum += part.count * (static_cast<double>(part.pivot) + part.mean);
        }
    }
    count = add_lanes(count, shared);
    sum = add_lanes(sum, shared);
    const double centre = present ? sum / count : 0;
    if (present) {
        for (int chunk = threadIdx.y; chunk < chunks; chunk += kFinishLanes) {
            const Moments<A> part = partial[static_cast<int64_t>(chunk) * channels + channel];
            const double distance = static_cast<double>(part.pivot) + part.mean - centre;
            square += part.m2 + part.count * distance * distance;
        }
    }
    square = add_lanes(square, shared);
    if (threadIdx.y == 0 && channel < channels) {
        mean[channel] = static_cast<A>(centre);
        m2[channel] = static_cast<A>(square);
    }
}

// Where finish_sums writes part 0 and part 1: two vectors.
template <typename A>
struct TwoVectors {
    A *first, *second;
    __device__ void set(int part, int channel, double value) const {
        (part == 0 ? first : second)[channel] = static_cast<A>(value);
    }
};

// Where finish_sums writes part after part of each channel: the taps of a depthwise weight.
template <typename T>
struct Taps {
    T* weight;
    int taps;
    __device__ void set(int tap, int channel, double value) const {
        narrow(static_cast<Accumulator<T>>(value), weight[static_cast<int64_t>(channel) * taps + tap]);
    }
};

// partial: [chunks, parts, channels]. Sums over the chunks; zeros for the channels from the present ones up to
// `stored`. grid: stored channels, parts.
template <typename A, typename Target>
__global__ void __launch_bounds__(kFinishChannels* kFinishLanes) finish_sums(const A* partial, int chunks, int channels,
                                                                             int stored, const int32_t* width,
                                                                             Target to) {
    __shared__ double shared[kFinishLanes][kFinishChannels];
    const int channel = blockIdx.x * kFinishChannels + threadIdx.x, parts = gridDim.y, part = blockIdx.y;
    double sum = 0;
    if (channel < present_channels(width, channels)) {
        for (int chunk = threadIdx.y; chunk < chunks; chunk += kFinishLanes)
            sum += partial[(static_cast<int64_t>(chunk) * parts + part) * channels + channel];
    }
    sum = add_lanes(sum, shared);
    if (threadIdx.y == 0 && channel < stored) to.set(part, channel, sum);
}

}  // namespace spos::cuda
