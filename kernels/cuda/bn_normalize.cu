// Channels last, a thread keeps the scale and shift of its channels in registers and walks down the pixels of a group;
// NCHW, those of its plane, and walks along it. The walk is that of bn_act_cat.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/bn_normalize.h"
#include "kernels/cuda/partials.cuh"

namespace spos::cuda {
namespace {

constexpr int64_t kBlocks = 1024;

constexpr int kThreads = 256;
constexpr int kTile = 4;                // loads that a thread has in flight
constexpr int kBlocksPerProcessor = 3;  // a promise to the compiler: at most 80 registers

template <typename T>
struct NormalizeArguments {
    const T* x;
    int64_t pitch;
    const Accumulator<T>*scale, *shift;
    bool relu;
    int channels;
    int length, per_chunk;  // pixels of a group, or vectors of a plane; and how many of them a block takes
    int64_t planes;         // NCHW
    int64_t samples;        // of a group, NCHW
    T* out;
};

// grid: channels, chunks of pixels, groups.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) normalize_columns(const NormalizeArguments<T> g) {
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (channel >= g.channels) return;
    const int begin = blockIdx.y * g.per_chunk, end = begin + g.per_chunk < g.length ? begin + g.per_chunk : g.length;
    const int64_t statistics = static_cast<int64_t>(blockIdx.z) * g.channels;
    const int64_t first = static_cast<int64_t>(blockIdx.z) * g.length;
    const Activation<V, Accumulator<T>> activate(g.scale + statistics, g.shift + statistics, g.relu, channel,
                                                 g.channels);
    walk<kTile, V>(activate, g.x + first * g.pitch + channel, g.pitch, g.out + first * g.channels + channel, g.channels,
                   begin + static_cast<int>(threadIdx.y), end, static_cast<int>(blockDim.y));
}

// threadIdx.x counts vectors along a plane, threadIdx.y planes. grid: planes, chunks of a plane.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) normalize_planes(const NormalizeArguments<T> g) {
    const int64_t plane = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (plane >= g.planes) return;
    const int64_t sample = plane / g.channels, channel = plane - sample * g.channels;
    const int64_t at = sample / g.samples * g.channels + channel;
    const int begin = blockIdx.y * g.per_chunk, end = begin + g.per_chunk < g.length ? begin + g.per_chunk : g.length;
    const Activation<V, Accumulator<T>> activate(g.scale[at], g.shift[at], g.relu);
    const int64_t size = static_cast<int64_t>(g.length) * V;
    walk<kTile, V>(activate, g.x + sample * g.pitch + channel * size, V, g.out + plane * size, V,
                   begin + static_cast<int>(threadIdx.x), end, static_cast<int>(blockDim.x));
}

template <typename T, int V>
const char* run(const MomentsShape& s, NormalizeArguments<T> g, void* stream) {
    if (s.channels_last) {
        const ColumnPlan plan =
            plan_columns(kThreads, s.channels, V, s.count(), std::max<int64_t>(1, kBlocks / s.groups), kTile);
        g.length = s.count(), g.per_chunk = plan.items_per_chunk;
        SPOS_LAUNCH((normalize_columns<T, V>), dim3(plan.channel_blocks, plan.chunks, s.groups), plan.block, 0, stream,
                    g);
        return launch_error();
    }
    g.length = s.pixels / V;
    unsigned across = 1;
    while (across < kThreads && across < static_cast<unsigned>(g.length)) across *= 2;
    const dim3 block(across, kThreads / across);
    g.per_chunk = across * kTile;
    SPOS_LAUNCH((normalize_planes<T, V>), dim3(divide_up(g.planes, block.y), divide_up(g.length, g.per_chunk)), block,
                0, stream, g);
    return launch_error();
}

template <typename T>
constexpr int widest() {
    return kLoadBytes / sizeof(T);
}

template <typename T>
bool can_widen(const void* x, const MomentsShape& s, const void* out) {
    constexpr int V = widest<T>();
    return can_load<T, V>(x, s.pitch, s.channels_last ? s.channels : s.pixels) && can_load<T, V>(out);
}

template <typename T>
const char* run(const void* x, const MomentsShape& s, const void* scale, const void* shift, bool relu, void* out,
                void* stream) {
    using A = Accumulator<T>;
    NormalizeArguments<T> g;
    g.x = static_cast<const T*>(x), g.pitch = s.pitch;
    g.scale = static_cast<const A*>(scale), g.shift = static_cast<const A*>(shift), g.relu = relu;
    g.channels = s.channels, g.samples = s.samples, g.planes = s.groups * s.samples * s.channels;
    g.out = static_cast<T*>(out);
    return can_widen<T>(x, s, out) ? run<T, widest<T>()>(s, g, stream) : run<T, 1>(s, g, stream);
}

}  // namespace

const char* bn_normalize(DType dtype, const void* x, const MomentsShape& s, const void* scale, const void* shift,
                         bool relu, void* out, void* stream) {
    constexpr int64_t kMost = int64_t{1} << 24, kMostPixels = int64_t{1} << 30;
    if (s.groups > 65535 || s.channels >= kMostPixels || s.count() >= kMostPixels ||
        (!s.channels_last && s.pixels >= kMost))
        return "x is too large for one launch: groups must be below 65536, the pixels of a group below 2^30";
    switch (dtype) {
        case DType::float32:
            return run<float>(x, s, scale, shift, relu, out, stream);
        case DType::float64:
            return run<double>(x, s, scale, shift, relu, out, stream);
        case DType::float16:
            return run<__half>(x, s, scale, shift, relu, out, stream);
        case DType::bfloat16:
            return run<__nv_bfloat16>(x, s, scale, shift, relu, out, stream);
    }
    return "unknown dtype";
}

}  // namespace spos::cuda
