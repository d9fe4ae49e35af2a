// bn_merge and bn_finalize: lists of tensors as one list of layers for the kernels.
#include "csrc/cpu/bn_states.h"
#ifdef SPOS_FAST_WITH_CUDA
#include "kernels/cuda/bn_states.h"
#endif

#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "csrc/bindings/running.h"

namespace spos::bindings {
namespace {

using Tensors = std::vector<Tensor>;
using Pair = std::tuple<Tensors, Tensors>;

// A list of which every tensor has a dtype, a number of values and the device of others; packed.
class Given {
  public:
    Given(const Tensors& tensors, const char* name, ScalarType type, const Tensors& like) {
        STD_TORCH_CHECK(tensors.size() == like.size(), name, " must hold one tensor a layer, got ", tensors.size(),
                        " for ", like.size());
        packed_.reserve(tensors.size());
        for (size_t i = 0; i < tensors.size(); ++i) {
            STD_TORCH_CHECK(tensors[i].scalar_type() == type, name, "[", i, "] is of another dtype than it must be");
            // One device for all: one launch takes them all.
            STD_TORCH_CHECK(tensors[i].get_device_index() == like[0].get_device_index(), name, "[", i,
                            "] must be on the device of the other statistics");
            packed_.push_back(tensors[i].is_contiguous() ? tensors[i] : torch::stable::contiguous(tensors[i]));
        }
    }

    const Tensor& operator[](size_t i) const { return packed_[i]; }
    const void* data(size_t i) const { return packed_[i].const_data_ptr(); }

  private:
    Tensors packed_;
};

// Uninitialised and packed.
Tensors new_like(const Tensors& like, ScalarType type) {
    Tensors made;
    made.reserve(like.size());
    for (const Tensor& tensor : like) made.push_back(torch::stable::new_empty(tensor, tensor.sizes(), type));
    return made;
}

// Every count at least `least`, one a layer.
void check_counts(const std::vector<int64_t>& counts, const char* name, size_t layers, int64_t least) {
    STD_TORCH_CHECK(counts.size() == layers, name, " must hold one number a layer");
    for (const int64_t count : counts) STD_TORCH_CHECK(count >= least, name, " must be at least ", least);
}

bool is_wide(const Tensors& tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "there must be at least one layer");
    return tensors[0].scalar_type() == ScalarType::Double;
}

ScalarType float_type(bool wide) {
    return wide ? ScalarType::Double : ScalarType::Float;
}

// Checks the arguments of bn_merge, makes its outputs and calls run(layers, whether the batch's statistics are double).
template <typename Run>
Pair with_merges(const Tensors& mean, const Tensors& var, const std::vector<int64_t>& count, const Tensors& batch_mean,
                 const Tensors& batch_m2, const std::vector<int64_t>& batch_count, const std::string& mode,
                 int64_t batches, double momentum, bool biased, Run run) {
    const bool wide = is_wide(batch_mean), pooled = mode == "pooled", first = batches == 0;
    const size_t size = batch_mean.size();
    STD_TORCH_CHECK(pooled || mode == "cumulative" || mode == "ema", "mode must be cumulative, pooled or ema, got ",
                    mode);
    STD_TORCH_CHECK(batches >= 0, "batches must not be negative, got ", batches);
    const Given batch_means(batch_mean, "batch_mean", float_type(wide), batch_mean);
    const Given batch_m2s(batch_m2, "batch_m2", float_type(wide), batch_mean);
    check_counts(batch_count, "batch_count", size, pooled ? 1 : 2);
    if (pooled && !first) check_counts(count, "count", size, 1);
    std::optional<Given> means, vars;
    if (!first) {
        means.emplace(mean, "mean", ScalarType::Double, batch_mean);
        vars.emplace(var, "var", ScalarType::Double, batch_mean);
    }
    Pair made{new_like(batch_mean, ScalarType::Double), new_like(batch_mean, ScalarType::Double)};
    std::vector<BnMerge> layers(size);
    for (size_t i = 0; i < size; ++i) {
        BnMerge& layer = layers[i];
        layer.size = batch_mean[i].numel();
        STD_TORCH_CHECK(batch_m2s[i].numel() == layer.size &&
                            (first || ((*means)[i].numel() == layer.size && (*vars)[i].numel() == layer.size)),
                        "statistics of layer ", i, " must have one shape");
        layer.mean = first ? nullptr : static_cast<const double*>(means->data(i));
        layer.var = first ? nullptr : static_cast<const double*>(vars->data(i));
        layer.batch_mean = batch_means.data(i), layer.batch_m2 = batch_m2s.data(i);
        layer.mean_out = static_cast<double*>(std::get<0>(made)[i].mutable_data_ptr());
        layer.var_out = static_cast<double*>(std::get<1>(made)[i].mutable_data_ptr());
        if (pooled)
            layer.pool(first ? 0 : count[i], batch_count[i]);
        else
            layer.average(mode == "ema" ? momentum : 1 / static_cast<double>(batches + 1), batch_count[i]);
        if (biased) layer.share *= static_cast<double>(batch_count[i]);
    }
    run(layers, wide);
    return made;
}

// Likewise for bn_finalize; run(layers, whether scales and shifts are double).
template <typename Run>
Pair with_finalizes(const Tensors& mean, const Tensors& var, const Tensors& gamma, const Tensors& beta,
                    const std::vector<int64_t>& count, ScalarType type, Run run) {
    STD_TORCH_CHECK(!mean.empty(), "there must be at least one layer");
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "dtype must be float32 or float64");
    const size_t size = mean.size();
    const Given means(mean, "mean", ScalarType::Double, mean), vars(var, "var", ScalarType::Double, mean);
    std::optional<Given> gammas, betas;
    if (!gamma.empty()) gammas.emplace(gamma, "gamma", type, mean);
    if (!beta.empty()) betas.emplace(beta, "beta", type, mean);
    if (!count.empty()) check_counts(count, "count", size, 1);
    Pair made{new_like(mean, type), new_like(mean, type)};
    std::vector<BnFinalize> layers(size);
    for (size_t i = 0; i < size; ++i) {
        BnFinalize& layer = layers[i];
        layer.size = mean[i].numel();
        STD_TORCH_CHECK(mean[i].dim() > 0 && vars[i].numel() == layer.size, "mean and var of layer ", i,
                        " must have one shape, [..., C]");
        layer.channels = mean[i].size(-1);
        auto values = [&](const std::optional<Given>& given, const char* name) -> const void* {
            if (!given || (*given)[i].numel() == 0) return nullptr;
            STD_TORCH_CHECK((*given)[i].numel() == layer.channels, name, "[", i, "] must be [", layer.channels, "]");
            return given->data(i);
        };
        layer.gamma = values(gammas, "gamma"), layer.beta = values(betas, "beta");
        layer.mean = static_cast<const double*>(means.data(i)), layer.var = static_cast<const double*>(vars.data(i));
        layer.scale = std::get<0>(made)[i].mutable_data_ptr(), layer.shift = std::get<1>(made)[i].mutable_data_ptr();
        layer.divisor = 1;
        if (!count.empty()) layer.from_second_moment(count[i]);
    }
    run(layers, type == ScalarType::Double);
    return made;
}

Pair bn_merge_cpu(const Tensors& mean, const Tensors& var, const std::vector<int64_t>& count, const Tensors& batch_mean,
                  const Tensors& batch_m2, const std::vector<int64_t>& batch_count, const std::string& mode,
                  int64_t batches, double momentum, bool biased) {
    return with_merges(mean, var, count, batch_mean, batch_m2, batch_count, mode, batches, momentum, biased,
                       [](const auto& layers, bool wide) { spos::cpu::bn_merge(layers, wide, parallel_for); });
}

Pair bn_finalize_cpu(const Tensors& mean, const Tensors& var, const Tensors& gamma, const Tensors& beta, double epsilon,
                     const std::vector<int64_t>& count, ScalarType type) {
    return with_finalizes(mean, var, gamma, beta, count, type, [=](const auto& layers, bool wide) {
        spos::cpu::bn_finalize(layers, wide, epsilon, parallel_for);
    });
}

void bn_update_running_cpu(const Tensors& running_mean, const Tensors& running_var, const Tensors& counters,
                           const Tensor& mean, const Tensor& var, const std::vector<int64_t>& channels,
                           const std::vector<int64_t>& count, const std::vector<double>& momentum) {
    const ScalarType type = mean.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, "mean must be float32 or float64");
    const Tensor means = packed(mean), vars = packed(var, type);
    const RunningStatistics running{running_mean, running_var, counters, momentum};
    check_running(running, type, channels, count);
    STD_TORCH_CHECK(
        std::accumulate(channels.begin(), channels.end(), int64_t{0}) <= std::min(means.numel(), vars.numel()),
        "mean and var must have a value for every channel of every layer");
    move_running(running, type, means.const_data_ptr(), vars.const_data_ptr(), channels, count);
}

#ifdef SPOS_FAST_WITH_CUDA
Pair bn_merge_cuda(const Tensors& mean, const Tensors& var, const std::vector<int64_t>& count,
                   const Tensors& batch_mean, const Tensors& batch_m2, const std::vector<int64_t>& batch_count,
                   const std::string& mode, int64_t batches, double momentum, bool biased) {
    STD_TORCH_CHECK(!batch_mean.empty(), "there must be at least one layer");
    const torch::stable::accelerator::DeviceGuard guard(batch_mean[0].get_device_index());
    return with_merges(mean, var, count, batch_mean, batch_m2, batch_count, mode, batches, momentum, biased,
                       [&](const auto& layers, bool wide) {
                           const char* error = spos::cuda::bn_merge(layers, wide, current_stream(batch_mean[0]));
                           STD_TORCH_CHECK(error == nullptr, "bn_merge on CUDA: ", error);
                       });
}

Pair bn_finalize_cuda(const Tensors& mean, const Tensors& var, const Tensors& gamma, const Tensors& beta,
                      double epsilon, const std::vector<int64_t>& count, ScalarType type) {
    STD_TORCH_CHECK(!mean.empty(), "there must be at least one layer");
    const torch::stable::accelerator::DeviceGuard guard(mean[0].get_device_index());
    return with_finalizes(mean, var, gamma, beta, count, type, [&](const auto& layers, bool wide) {
        const char* error = spos::cuda::bn_finalize(layers, wide, epsilon, current_stream(mean[0]));
        STD_TORCH_CHECK(error == nullptr, "bn_finalize on CUDA: ", error);
    });
}
#endif

}  // namespace

Kernels bn_states_kernels() {
    return {
        {"bn_merge", "CPU", TORCH_BOX(&bn_merge_cpu)},
        {"bn_finalize", "CPU", TORCH_BOX(&bn_finalize_cpu)},
        {"bn_update_running", "CPU", TORCH_BOX(&bn_update_running_cpu)},
#ifdef SPOS_FAST_WITH_CUDA
        {"bn_merge", "CUDA", TORCH_BOX(&bn_merge_cuda)},
        {"bn_finalize", "CUDA", TORCH_BOX(&bn_finalize_cuda)},
#endif
    };
}

}  // namespace spos::bindings
