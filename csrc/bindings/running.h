// The running statistics of batch normalisation layers, moved in place by those of a batch.
#pragma once

#include "csrc/bindings/tensors.h"

namespace spos::bindings {

// One mean, variance and momentum a layer; counters of batches, as many as there are.
struct RunningStatistics {
    const std::vector<Tensor>&mean, &var, &counters;
    const std::vector<double>& momentum;
};

// Of every layer the first `channels` channels move, by statistics of `count` values each and of dtype `type`.
inline void check_running(const RunningStatistics& running, ScalarType type, const std::vector<int64_t>& channels,
                          const std::vector<int64_t>& count) {
    const size_t size = channels.size();
    STD_TORCH_CHECK(running.mean.size() == size && running.var.size() == size && count.size() == size &&
                        running.momentum.size() == size,
                    "there must be one running_mean, running_var, count and momentum for each of ", size, " layers");
    for (size_t i = 0; i < size; ++i) {
        STD_TORCH_CHECK(count[i] >= 2, "count must be at least 2");
        for (const Tensor* values : {&running.mean[i], &running.var[i]})
            STD_TORCH_CHECK(values->scalar_type() == type && values->dim() == 1 && channels[i] >= 0 &&
                                values->size(0) >= channels[i],
                            "running statistics of layer ", i, " must be [", channels[i],
                            "] or longer, of the dtype of the batch's");
    }
    for (const Tensor& counter : running.counters)
        STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 1,
                        "counters must be int64 tensors of one value");
}

template <typename A>
void move_towards(const Tensor& running, const A* values, int64_t channels, double share, double factor) {
    A* to = static_cast<A*>(running.mutable_data_ptr());
    const A kept = static_cast<A>(1 - share), taken = static_cast<A>(share * factor);
    const int64_t step = running.stride(0);
    for (int64_t c = 0; c < channels; ++c) to[c * step] = kept * to[c * step] + taken * values[c];
}

// mean and var: of the batch, all layers behind one another, var divided by the count. After check_running().
template <typename A>
void move_running(const RunningStatistics& running, const A* mean, const A* var, const std::vector<int64_t>& channels,
                  const std::vector<int64_t>& count) {
    for (size_t i = 0; i < channels.size(); ++i) {
        const double unbiased = static_cast<double>(count[i]) / static_cast<double>(count[i] - 1);
        move_towards(running.mean[i], mean, channels[i], running.momentum[i], 1);
        move_towards(running.var[i], var, channels[i], running.momentum[i], unbiased);
        mean += channels[i], var += channels[i];
    }
    for (const Tensor& counter : running.counters) ++*static_cast<int64_t*>(counter.mutable_data_ptr());
}
inline void move_running(const RunningStatistics& running, ScalarType type, const void* mean, const void* var,
                         const std::vector<int64_t>& channels, const std::vector<int64_t>& count) {
    if (type == ScalarType::Double)
        return move_running(running, static_cast<const double*>(mean), static_cast<const double*>(var), channels,
                            count);
    move_running(running, static_cast<const float*>(mean), static_cast<const float*>(var), channels, count);
}

}  // namespace spos::bindings
