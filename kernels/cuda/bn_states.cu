// All layers of a call travel as the arguments of one launch: nothing is copied to the device, so that the call can be
// captured in a CUDA graph. Only where the arguments have no room for more there is a further launch.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cuda/bn_states.h"
#include "kernels/cuda/launch.cuh"

namespace spos::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocksPerLayer = 64;  // at most; longer layers are walked in turns

// Room for arguments. From CUDA 12.1 on, GPUs since Volta take 32764 bytes if the driver is no older than that; every
// driver that runs CUDA 13 is.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
constexpr size_t kArgumentBytes = 32764;
#else
constexpr size_t kArgumentBytes = 4096;
#endif

template <typename Layer>
struct Layers {
    static constexpr int64_t kMost = (kArgumentBytes - 64) / sizeof(Layer);
    Layer layer[kMost];
};

// grid: chunks of a layer, layers.
template <typename B>
__global__ void __launch_bounds__(kThreads) merge_layers(const __grid_constant__ Layers<BnMerge> g) {
    const BnMerge& layer = g.layer[blockIdx.y];
    const B *batch_mean = static_cast<const B*>(layer.batch_mean), *batch_m2 = static_cast<const B*>(layer.batch_m2);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < layer.size; i += step) {
        const double mean = layer.mean != nullptr ? layer.mean[i] : 0, var = layer.mean != nullptr ? layer.var[i] : 1;
        const double centre = batch_mean[i], delta = centre - mean;
        layer.mean_out[i] = layer.keep_mean * mean + layer.weight * centre;
        layer.var_out[i] = layer.keep_var * var + layer.share * batch_m2[i] + layer.cross * (delta * delta);
    }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) finalize_layers(const __grid_constant__ Layers<BnFinalize> g,
                                                            double epsilon) {
    const BnFinalize& layer = g.layer[blockIdx.y];
    const A *gamma = static_cast<const A*>(layer.gamma), *beta = static_cast<const A*>(layer.beta);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < layer.size; i += step) {
        const int64_t c = i % layer.channels;
        const double a = (gamma != nullptr ? gamma[c] : A(1)) / sqrt(layer.var[i] / layer.divisor + epsilon);
        static_cast<A*>(layer.scale)[i] = static_cast<A>(a);
        static_cast<A*>(layer.shift)[i] = static_cast<A>((beta != nullptr ? beta[c] : A(0)) - layer.mean[i] * a);
    }
}

// Calls launch(layers of this launch, grid) until all had their turn.
template <typename Layer, typename Launch>
const char* in_turns(const std::vector<Layer>& layers, Launch launch) {
    constexpr int64_t kMost = Layers<Layer>::kMost;
    const int64_t count = layers.size();
    for (int64_t first = 0; first < count; first += kMost) {
        Layers<Layer> some;
        const int64_t now = std::min(kMost, count - first);
        int64_t longest = 1;
        for (int64_t i = 0; i < now; ++i) {
            some.layer[i] = layers[first + i];
            longest = std::max(longest, some.layer[i].size);
        }
        launch(some, dim3(std::min(kBlocksPerLayer, (longest + kThreads - 1) / kThreads), now));
        if (const char* error = launch_error()) return error;
    }
    return nullptr;
}

}  // namespace

const char* bn_merge(const std::vector<BnMerge>& layers, bool wide, void* stream) {
    return in_turns(layers, [=](const Layers<BnMerge>& some, dim3 grid) {
        if (wide)
            SPOS_LAUNCH((merge_layers<double>), grid, dim3(kThreads), 0, stream, some);
        else
            SPOS_LAUNCH((merge_layers<float>), grid, dim3(kThreads), 0, stream, some);
    });
}

const char* bn_finalize(const std::vector<BnFinalize>& layers, bool wide, double epsilon, void* stream) {
    return in_turns(layers, [=](const Layers<BnFinalize>& some, dim3 grid) {
        if (wide)
            SPOS_LAUNCH((finalize_layers<double>), grid, dim3(kThreads), 0, stream, some, epsilon);
        else
            SPOS_LAUNCH((finalize_layers<float>), grid, dim3(kThreads), 0, stream, some, epsilon);
    });
}

}  // namespace spos::cuda
