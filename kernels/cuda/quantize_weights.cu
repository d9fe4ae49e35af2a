// Passes over the weights, each behind a small launch that puts together, in a fixed order, what the blocks of the pass
// before found: first the greatest magnitude and the mean one; backwards then the sum that the maximum's gradient is
// made of; at last the result. A block takes a chunk of one channel, or of all weights.
#include "kernels/cuda/quantize_weights.h"
#include "kernels/cuda/quantizer.cuh"
#include "kernels/cuda/runs.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kBlocks = 512;  // fixed, so that every GPU gives the same bits
constexpr int kThreads = 256;
constexpr int kTile = 2;                // loads that a thread has in flight
constexpr int kBlocksPerProcessor = 3;  // a promise to the compiler: at most 80 registers
constexpr int kFound = 2;               // numbers that a pass finds

__device__ inline float hyperbolic(float value) {
    return tanhf(value);
}
__device__ inline double hyperbolic(double value) {
    return tanh(value);
}

template <typename A>
__device__ inline A magnitude(A value) {
    return value < 0 ? -value : value;
}

// The greater of the two, and NaN if one is.
template <typename A>
__device__ inline A greater(A a, A b) {
    return b > a || b != b ? b : a;
}

template <typename A>
__device__ inline A smallest_normal();
template <>
__device__ inline float smallest_normal<float>() {
    return 1.17549435e-38f;
}
template <>
__device__ inline double smallest_normal<double>() {
    return 2.2250738585072014e-308;
}

// What shares a maximum: `groups` channels, or one.
template <typename T>
struct WeightArguments {
    const T* weight;
    QuantShape shape;
    int64_t per_chunk;
    BitChoice bits;
    // [2, groups]: greatest and mean magnitude.
    const Accumulator<T>* found;
    int groups;
};

template <typename A>
struct DoReFa {
    A n, greatest, m, mean;
    bool single, halved;  // one bit; eight, whose codes int8 holds only half of
    bool constant;        // whether the maximum is no function of the weights

    __device__ DoReFa(const BitChoice& choice, const A* found, int groups, int group) {
        const int bits = choice.bits[chosen(choice)];
        n = static_cast<A>((1 << bits) - 1);
        single = bits == 1, halved = bits == 8;
        greatest = found[group], mean = found[groups + group];
        m = hyperbolic(greatest);
        constant = m < smallest_normal<A>();
        if (constant) m = 1;
    }

    __device__ A code(A weight) const {
        if (single) return weight >= 0 ? A(1) : weight < 0 ? A(-1) : weight;
        return 2 * round_to_even(n * (hyperbolic(weight) / (2 * m) + A(0.5))) - n;
    }
    __device__ A scale() const { return single ? mean : 1 / n; }
};

// Calls take(value) for each of a block's weights.
template <typename T, int V, typename Take>
__device__ inline void for_each_weight(const WeightArguments<T>& g, Take take) {
    const Runs runs(g.shape, V, blockIdx.x, blockIdx.y, g.per_chunk);
    for (int64_t first = runs.begin + threadIdx.y; first < runs.end; first += kThreads * kTile) {
        Vector<T, V> tile[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t vector = first + k * kThreads;
            if (vector < runs.end) tile[k] = *reinterpret_cast<const Vector<T, V>*>(g.weight + runs.offset(vector));
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
            const int64_t vector = first + k * kThreads;
            if (vector < runs.end) take(tile[k], runs.offset(vector));
        }
    }
}

// partial: [chunks, 2, groups], of each chunk greatest magnitude and sum of them. grid: groups, chunks.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) measure_weights(const WeightArguments<T> g,
                                                                                 Accumulator<T>* partial) {
    using A = Accumulator<T>;
    __shared__ A shared[kThreads];
    A greatest = 0, sum[1] = {};
    for_each_weight<T, V>(g, [&](const Vector<T, V>& weight, int64_t) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A size = magnitude(widen(weight.lane[v]));
            greatest = greater(greatest, size);
            sum[0] += size;
        }
    });
    add_rows<1>(sum, shared);
    shared[threadIdx.y] = greatest;
    __syncthreads();
    for (unsigned step = kThreads / 2; step > 0; step /= 2) {
        if (threadIdx.y < step) shared[threadIdx.y] = greater(shared[threadIdx.y], shared[threadIdx.y + step]);
        __syncthreads();
    }
    if (threadIdx.y == 0) {
        A* to = partial + static_cast<int64_t>(blockIdx.y) * kFound * g.groups + blockIdx.x;
        to[0] = shared[0], to[g.groups] = sum[0];
    }
}

// found: [2, groups]. Blocks of kFinishChannels x kFinishLanes threads.
template <typename A>
__global__ void __launch_bounds__(kFinishChannels* kFinishLanes) finish_magnitudes(const A* partial, int chunks,
                                                                                   int groups, double values,
                                                                                   A* found) {
    __shared__ double shared[kFinishLanes][kFinishChannels];
    __shared__ A greatest[kFinishLanes][kFinishChannels];
    const int group = blockIdx.x * kFinishChannels + threadIdx.x;
    A most = 0;
    double sum = 0;
    if (group < groups) {
        for (int chunk = threadIdx.y; chunk < chunks; chunk += kFinishLanes) {
            const A* part = partial + static_cast<int64_t>(chunk) * kFound * groups + group;
            most = greater(most, part[0]);
            sum += part[groups];
        }
    }
    greatest[threadIdx.y][threadIdx.x] = most;
    sum = add_lanes(sum, shared);
    if (threadIdx.y == 0 && group < groups) {
        for (int lane = 1; lane < kFinishLanes; ++lane) most = greater(most, greatest[lane][threadIdx.x]);
        found[group] = most, found[groups + group] = static_cast<A>(sum / values);
    }
}

// grid: groups, chunks.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) quantize_dorefa(const WeightArguments<T> g, T* out) {
    using A = Accumulator<T>;
    const DoReFa<A> quantizer(g.bits, g.found, g.groups, blockIdx.x);
    const A scale = quantizer.scale();
    for_each_weight<T, V>(g, [&](Vector<T, V>& weight, int64_t at) {
#pragma unroll
        for (int v = 0; v < V; ++v) narrow(quantizer.code(widen(weight.lane[v])) * scale, weight.lane[v]);
        *reinterpret_cast<Vector<T, V>*>(out + at) = weight;
    });
}

// partial: [chunks, 2, groups]: the sum of gradient times tanh, and how many weights are as great as the greatest.
// grid: groups, chunks.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) sum_for_maximum(const WeightArguments<T> g,
                                                                                 const T* grad,
                                                                                 Accumulator<T>* partial) {
    using A = Accumulator<T>;
    __shared__ A shared[kThreads * kFound];
    const A greatest = g.found[blockIdx.x];
    A own[kFound] = {};
    for_each_weight<T, V>(g, [&](const Vector<T, V>& weight, int64_t at) {
        const Vector<T, V> given = *reinterpret_cast<const Vector<T, V>*>(grad + at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A value = widen(weight.lane[v]);
            own[0] += widen(given.lane[v]) * hyperbolic(value);
            own[1] += magnitude(value) == greatest ? A(1) : A(0);
        }
    });
    add_rows<kFound>(own, shared);
    if (threadIdx.y == 0) {
        A* to = partial + static_cast<int64_t>(blockIdx.y) * kFound * g.groups + blockIdx.x;
        to[0] = own[0], to[g.groups] = own[1];
    }
}

// maximum: [2, groups], what sum_for_maximum found; null: no gradient passes through it. grid: groups, chunks.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) pass_dorefa_gradient(const WeightArguments<T> g,
                                                                                      const T* grad,
                                                                                      const Accumulator<T>* maximum,
                                                                                      T* grad_weight) {
    using A = Accumulator<T>;
    const DoReFa<A> quantizer(g.bits, g.found, g.groups, blockIdx.x);
    const bool through_maximum = maximum != nullptr && !quantizer.constant;
    const A share = through_maximum ? maximum[blockIdx.x] / maximum[g.groups + blockIdx.x] : A(0);
    for_each_weight<T, V>(g, [&](const Vector<T, V>& weight, int64_t at) {
        Vector<T, V> given = *reinterpret_cast<const Vector<T, V>*>(grad + at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A value = widen(weight.lane[v]), passed = widen(given.lane[v]);
            const A t = hyperbolic(value), slope = (1 - t * t) / quantizer.m;
            A found = passed * slope;
            if (through_maximum && magnitude(value) == quantizer.greatest)
                found -= (t > 0 ? A(1) : t < 0 ? A(-1) : t) * slope / quantizer.m * share;
            narrow(quantizer.single ? passed : found, given.lane[v]);
        }
        *reinterpret_cast<Vector<T, V>*>(grad_weight + at) = given;
    });
}

// scale: [channels]. found: null for LSQ.
template <typename A>
__global__ void store_scales(const BitChoice bits, const A* found, int groups, const StepChoice lsq, int channels,
                             A* scale) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    if (found != nullptr) {
        const DoReFa<A> quantizer(bits, found, groups, groups == 1 ? 0 : channel);
        scale[channel] = quantizer.halved ? 2 * quantizer.scale() : quantizer.scale();
    } else {
        scale[channel] = Quantizer<1, A>::same(lsq, lsq.channels == 1 ? 0 : channel).size[0];
    }
}

// Runs behind store_scales. grid: channels, chunks.
template <typename T, int V, typename Code>
__device__ inline void store_codes(const WeightArguments<T>& g, int8_t* codes, Accumulator<T>* scale, Code code) {
    using A = Accumulator<T>;
    bool missing = false;
    for_each_weight<T, V>(g, [&](const Vector<T, V>& weight, int64_t at) {
        Vector<int8_t, V> made;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const A found = code(widen(weight.lane[v]));
            missing |= found != found;
            made.lane[v] = static_cast<int8_t>(!(found == found) ? 0 : found < -128 ? -128 : found > 127 ? 127 : found);
        }
        *reinterpret_cast<Vector<int8_t, V>*>(codes + at) = made;
    });
    // All who write it write the same.
    if (missing) scale[blockIdx.x] = static_cast<A>(NAN);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) store_dorefa_codes(const WeightArguments<T> g,
                                                                                    int8_t* codes,
                                                                                    Accumulator<T>* scale) {
    const DoReFa<Accumulator<T>> quantizer(g.bits, g.found, g.groups, g.groups == 1 ? 0 : blockIdx.x);
    using A = Accumulator<T>;
    store_codes<T, V>(g, codes, scale, [&](A weight) {
        const A code = quantizer.code(weight);
        return quantizer.halved ? (code - 1) / 2 : code;
    });
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) store_lsq_codes(const WeightArguments<T> g,
                                                                                 const StepChoice lsq, int8_t* codes,
                                                                                 Accumulator<T>* scale) {
    const auto quantizer = Quantizer<1, Accumulator<T>>::same(lsq, lsq.channels == 1 ? 0 : blockIdx.x);
    store_codes<T, V>(g, codes, scale,
                      [&](Accumulator<T> weight) { return quantizer.code(quantizer.position(weight, 0)); });
}

// As one run, unless every channel has something of its own.
QuantShape grouped(const Weights& weights) {
    return weights.per_channel ? weights.shape : QuantShape{1, 1, weights.shape.count()};
}

RunPlan plan(const QuantShape& shape, int vector) {
    return plan_runs(kThreads, shape, vector, kBlocks, kTile);
}

template <typename T, typename... Pointers>
bool can_widen(const QuantShape& shape, Pointers... pointers) {
    constexpr int V = kLoadBytes / sizeof(T);
    return (can_load<T, V>(pointers, shape.inner) && ...);
}

template <typename T>
WeightArguments<T> arguments(const Weights& weights, const BitChoice& bits, const QuantShape& shape, int vector,
                             const void* workspace) {
    return {static_cast<const T*>(weights.weight),
            shape,
            plan(shape, vector).per_chunk,
            bits,
            static_cast<const Accumulator<T>*>(workspace),
            static_cast<int>(grouped(weights).channels)};
}

// The workspace: found [2, groups], maximum [2, groups], partial [chunks, 2, groups].
template <typename A>
struct Workspace {
    A *found, *maximum, *partial;

    Workspace(void* memory, int64_t groups)
        : found(static_cast<A*>(memory)), maximum(found + kFound * groups), partial(maximum + kFound * groups) {}
};

// Fills found.
template <typename T, int V>
const char* measure(const Weights& weights, const Workspace<Accumulator<T>>& to, void* stream) {
    using A = Accumulator<T>;
    const QuantShape shape = grouped(weights);
    const int64_t chunks = plan(shape, V).chunks;
    const int groups = static_cast<int>(shape.channels);
    SPOS_LAUNCH((measure_weights<T, V>), dim3(groups, chunks), dim3(1, kThreads), 0, stream,
                arguments<T>(weights, {}, shape, V, to.found), to.partial);
    if (const char* error = launch_error()) return error;
    SPOS_LAUNCH((finish_magnitudes<A>), dim3(divide_up(groups, kFinishChannels)), dim3(kFinishChannels, kFinishLanes),
                0, stream, to.partial, static_cast<int>(chunks), groups, static_cast<double>(shape.per_channel()),
                to.found);
    return launch_error();
}

template <typename T, int V>
const char* run(const Weights& weights, const BitChoice& bits, void* workspace, void* out, void* stream) {
    const QuantShape shape = grouped(weights);
    if (const char* error = measure<T, V>(weights, Workspace<Accumulator<T>>(workspace, shape.channels), stream))
        return error;
    SPOS_LAUNCH((quantize_dorefa<T, V>), dim3(shape.channels, plan(shape, V).chunks), dim3(1, kThreads), 0, stream,
                arguments<T>(weights, bits, shape, V, workspace), static_cast<T*>(out));
    return launch_error();
}

template <typename T, int V>
const char* run_backward(const Weights& weights, const BitChoice& bits, bool detach_max, const void* grad,
                         void* workspace, void* grad_weight, void* stream) {
    using A = Accumulator<T>;
    const QuantShape shape = grouped(weights);
    const Workspace<A> memory(workspace, shape.channels);
    if (const char* error = measure<T, V>(weights, memory, stream)) return error;
    const WeightArguments<T> g = arguments<T>(weights, bits, shape, V, workspace);
    const T* given = static_cast<const T*>(grad);
    const int64_t chunks = plan(shape, V).chunks;
    const dim3 grid(g.groups, chunks), block(1, kThreads);
    if (!detach_max) {
        SPOS_LAUNCH((sum_for_maximum<T, V>), grid, block, 0, stream, g, given, memory.partial);
        if (const char* error = launch_error()) return error;
        const TwoVectors<A> to{memory.maximum, memory.maximum + g.groups};
        const int32_t* all = nullptr;
        SPOS_LAUNCH((finish_sums<A, TwoVectors<A>>), dim3(divide_up(g.groups, kFinishChannels), kFound),
                    dim3(kFinishChannels, kFinishLanes), 0, stream, memory.partial, static_cast<int>(chunks), g.groups,
                    g.groups, all, to);
        if (const char* error = launch_error()) return error;
    }
    const A* maximum = detach_max ? nullptr : memory.maximum;
    SPOS_LAUNCH((pass_dorefa_gradient<T, V>), grid, block, 0, stream, g, given, maximum, static_cast<T*>(grad_weight));
    return launch_error();
}

template <typename T, int V>
const char* run_codes(const Weights& weights, const StepChoice& lsq, void* workspace, int8_t* codes, void* scale,
                      void* stream) {
    using A = Accumulator<T>;
    const bool dorefa = lsq.step == nullptr;
    // A channel's scale tells of the NaN in it, whoever shares its maximum or step.
    const QuantShape shape = weights.shape;
    const WeightArguments<T> g = arguments<T>(weights, lsq.bits, shape, V, workspace);
    const int channels = static_cast<int>(shape.channels);
    if (dorefa)
        if (const char* error = measure<T, V>(weights, Workspace<A>(workspace, g.groups), stream)) return error;
    A* scales = static_cast<A*>(scale);
    const A* found = dorefa ? g.found : nullptr;
    SPOS_LAUNCH((store_scales<A>), dim3(divide_up(channels, kThreads)), dim3(kThreads), 0, stream, lsq.bits, found,
                g.groups, lsq, channels, scales);
    if (const char* error = launch_error()) return error;
    const dim3 grid(channels, plan(shape, V).chunks), block(1, kThreads);
    if (dorefa)
        SPOS_LAUNCH((store_dorefa_codes<T, V>), grid, block, 0, stream, g, codes, scales);
    else
        SPOS_LAUNCH((store_lsq_codes<T, V>), grid, block, 0, stream, g, lsq, codes, scales);
    return launch_error();
}

const char* refuse(const Weights& weights) {
    if (weights.shape.channels >= (int64_t{1} << 30))
        return "weight is too large for one launch: channels must be below 2^30";
    return nullptr;
}

}  // namespace

int64_t weights_workspace_bytes(const Weights& weights) {
    // Enough for either width of load: the narrow one can ask for more chunks.
    const int64_t item = weights.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    const int widest = kLoadBytes / static_cast<int>(item_size(weights.dtype));
    const QuantShape shape = grouped(weights);
    const int64_t chunks = std::max(plan(shape, 1).chunks, plan(shape, widest).chunks);
    return (2 + chunks) * kFound * shape.channels * item;
}

const char* dorefa_weights(const Weights& weights, const BitChoice& bits, void* workspace, void* out, void* stream) {
    if (const char* refused = refuse(weights)) return refused;
    return with_type(weights.dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = can_widen<T>(grouped(weights), weights.weight, out);
        const auto run_with = wide ? run<T, kLoadBytes / sizeof(T)> : run<T, 1>;
        return run_with(weights, bits, workspace, out, stream);
    });
}

const char* dorefa_weights_backward(const Weights& weights, const BitChoice& bits, bool detach_max, const void* grad,
                                    void* workspace, void* grad_weight, void* stream) {
    if (const char* refused = refuse(weights)) return refused;
    return with_type(weights.dtype, [&](auto type) {
        using T = decltype(type);
        const bool wide = can_widen<T>(grouped(weights), weights.weight, grad, grad_weight);
        const auto run_with = wide ? run_backward<T, kLoadBytes / sizeof(T)> : run_backward<T, 1>;
        return run_with(weights, bits, detach_max, grad, workspace, grad_weight, stream);
    });
}

const char* weight_codes(const Weights& weights, const StepChoice& lsq, void* workspace, int8_t* codes, void* scale,
                         void* stream) {
    if (const char* refused = refuse(weights)) return refused;
    return with_type(weights.dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int V = kLoadBytes / sizeof(T);
        const bool wide = can_widen<T>(weights.shape, weights.weight) && can_load<int8_t, V>(codes);
        const auto run_with = wide ? run_codes<T, V> : run_codes<T, 1>;
        return run_with(weights, lsq, workspace, codes, scale, stream);
    });
}

}  // namespace spos::cuda
