#include "csrc/cpu/bn_states.h"

#include <cmath>

namespace spos::cpu {
namespace {

template <typename B>
void merge(BnMerge layer) {  // by value: no store can change it, and the loops become vector code
    const B* __restrict batch_mean = static_cast<const B*>(layer.batch_mean);
    const B* __restrict batch_m2 = static_cast<const B*>(layer.batch_m2);
    const double* __restrict mean = layer.mean, * __restrict var = layer.var;
    double* __restrict mean_out = layer.mean_out, * __restrict var_out = layer.var_out;
    if (mean == nullptr) {
        for (int64_t i = 0; i < layer.size; ++i) {
            mean_out[i] = layer.weight * batch_mean[i];
            var_out[i] = layer.keep_var + layer.share * batch_m2[i];
        }
        return;
    }
    for (int64_t i = 0; i < layer.size; ++i) {
        const double centre = batch_mean[i], delta = centre - mean[i];
        mean_out[i] = layer.keep_mean * mean[i] + layer.weight * centre;
        var_out[i] = layer.keep_var * var[i] + layer.share * batch_m2[i] + layer.cross * (delta * delta);
    }
}

template <typename A>
void finalize(const BnFinalize& layer, double epsilon) {
    const A *gamma = static_cast<const A*>(layer.gamma), *beta = static_cast<const A*>(layer.beta);
    A *scale = static_cast<A*>(layer.scale), *shift = static_cast<A*>(layer.shift);
    for (int64_t first = 0; first < layer.size; first += layer.channels)
        for (int64_t c = 0; c < layer.channels; ++c) {
            const double a = (gamma ? gamma[c] : 1) / std::sqrt(layer.var[first + c] / layer.divisor + epsilon);
            scale[first + c] = static_cast<A>(a);
            shift[first + c] = static_cast<A>((beta ? beta[c] : 0) - layer.mean[first + c] * a);
        }
}

template <typename Layer, typename Act>
void for_each(const std::vector<Layer>& layers, const ParallelFor& parallel_for, Act act) {
    // Several layers a task: they are small.
    constexpr int64_t kPerTask = 16;
    const int64_t count = layers.size();
    parallel_for((count + kPerTask - 1) / kPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kPerTask; i < std::min(count, end * kPerTask); ++i) act(layers[i]);
    });
}

}  // namespace

void bn_merge(const std::vector<BnMerge>& layers, bool wide, const ParallelFor& parallel_for) {
    for_each(layers, parallel_for, wide ? merge<double> : merge<float>);
}

void bn_finalize(const std::vector<BnFinalize>& layers, bool wide, double epsilon, const ParallelFor& parallel_for) {
    for_each(layers, parallel_for, [=](const BnFinalize& layer) {
        return wide ? finalize<double>(layer, epsilon) : finalize<float>(layer, epsilon);
    });
}

}  // namespace spos::cpu
