#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "csrc/bindings/cpu_memory.h"
#include "csrc/bindings/groups.h"
#include "csrc/bindings/running.h"
#include "csrc/bindings/weight_list.h"
#include "csrc/cpu/unit.h"

namespace spos::bindings {
namespace {

using spos::cpu::ParallelFor, spos::cpu::Unit, spos::cpu::UnitKind, spos::cpu::UnitShape, spos::cpu::Weight;
using MaybeTensor = std::optional<Tensor>;

// A unit's tensors as the kernels read them, and alive as long as they do.
struct UnitArguments {
    Tensor x;
    std::vector<Tensor> weights;
    MaybeTensor gamma, beta;
    Unit unit;      // of one group, the first
    bool narrowed;  // to fewer channels than results are laid out for
};

void check_weight(const Tensor& weight, const Tensor& x, const char* name, int64_t rows, int64_t columns,
                  bool depthwise) {
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
    const bool fits = weight.dim() == 4 && weight.size(0) == rows && weight.size(1) == columns &&
                      weight.size(2) == weight.size(3) && (depthwise ? weight.size(2) % 2 == 1 : weight.size(2) == 1);
    if (depthwise) {
        STD_TORCH_CHECK(fits, name, " must be [", rows, ", 1, k, k] with an odd k");
    } else {
        STD_TORCH_CHECK(fits, name, " must be [", rows, ", ", columns, ", 1, 1]");
    }
}

MaybeTensor bn_vector(const MaybeTensor& given, const char* name, int64_t size, ScalarType type) {
    if (!given) return std::nullopt;
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == size, name, " must be [", size, "]");
    return packed(*given, type);
}

const void* data_of(const MaybeTensor& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
}

UnitArguments unit_arguments(UnitKind kind, const Tensor& x, std::vector<Tensor> weights, const MaybeTensor& proj_dw,
                             const MaybeTensor& proj_pw, const MaybeTensor& gamma, const MaybeTensor& beta, int64_t mid,
                             const MaybeTensor& width, int64_t stride, double epsilon, int64_t groups = 1) {
    const DType dtype = dtype_of(x, "x");
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W], not empty");
    const int64_t samples = group_samples(x, groups);
    STD_TORCH_CHECK(proj_dw.has_value() == proj_pw.has_value(), "proj_dw and proj_pw go together");
    STD_TORCH_CHECK(stride == 1 || (stride == 2 && proj_dw), "stride must be 1, or 2 with a projection, got ", stride);
    STD_TORCH_CHECK(proj_dw || x.size(1) % 2 == 0, "x must have an even number of channels");
    for (const Tensor& weight : weights) STD_TORCH_CHECK(weight.dim() == 4, "weights must be [out, in, k, k]");
    const bool shuffle = kind == UnitKind::shuffle;
    const int64_t before = proj_dw ? x.size(1) : x.size(1) / 2;
    const int64_t stored = weights[shuffle ? 0 : 1].size(0), made = weights.back().size(0);
    const char* const* names;
    if (shuffle) {
        static const char* const kNames[] = {"pw1", "dw", "pw2"};
        names = kNames;
    } else {
        static const char* const kNames[] = {"dw1", "pw1", "dw2", "pw2", "dw3", "pw3"};
        names = kNames;
    }
    for (size_t i = 0; i < weights.size(); ++i) {
        const bool depthwise = (i % 2 == 1) == shuffle;
        const int64_t rows = i + 1 == weights.size() ? made : !shuffle && i == 0 ? before : stored;
        const int64_t columns = depthwise ? 1 : i < 2 ? before : stored;
        check_weight(weights[i], x, names[i], rows, columns, depthwise);
    }
    if (proj_dw) {
        check_weight(*proj_dw, x, "proj_dw", before, 1, true);
        check_weight(*proj_pw, x, "proj_pw", before, before, false);
        weights.push_back(*proj_dw), weights.push_back(*proj_pw);
    }
    STD_TORCH_CHECK(mid >= 1 && mid <= stored, "mid must be from 1 to ", stored, ", got ", mid);

    UnitArguments given{channels_last(x), {}, {}, {}, {}, used_channels(width, mid) < mid};
    std::vector<Weight> data;
    for (const Tensor& weight : weights) {
        given.weights.push_back(packed(weight));
        data.push_back({given.weights.back().const_data_ptr(), weight.size(2)});
    }
    const UnitShape shape{
        kind,   dtype, samples, x.size(2), x.size(3), x.size(1), proj_dw.has_value(), mid, used_channels(width, mid),
        stored, made,  stride};
    given.unit = spos::cpu::unit_of(shape, data);
    const int64_t normalised = given.unit.normalised();
    given.gamma = bn_vector(gamma, "gamma", normalised, statistics_type(dtype));
    given.beta = bn_vector(beta, "beta", normalised, statistics_type(dtype));
    given.unit.x = given.x.const_data_ptr();
    given.unit.gamma = data_of(given.gamma), given.unit.beta = data_of(given.beta);
    given.unit.epsilon = epsilon;
    return given;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs forward(const UnitArguments& given, bool save, int64_t groups) {
    const Unit& unit = given.unit;
    const Tensor out =
        kept_image(given.x, groups * unit.samples, unit.out_channels(), unit.out_height(), unit.out_width());
    const Tensor saved = kept_values(given.x, save ? unit.saved_size() : 0, groups);
    // Nobody reads absent channels, but equal calls should return equal bits.
    if (save && given.narrowed) std::memset(saved.mutable_data_ptr(), 0, saved.numel() * item_size(unit.dtype));
    const Tensor mean = grouped_vector(given.x, statistics_type(unit.dtype), unit.normalised(), groups);
    const Tensor var = grouped_vector(given.x, statistics_type(unit.dtype), unit.normalised(), groups);
    for_each_group(given.x, groups, [&](int64_t group, const ParallelFor& pool) {
        Unit run = unit;
        run.x = part(given.x, group, groups);
        unit_forward(run,
                     {part_to_fill(out, group, groups), save ? part_to_fill(saved, group, groups) : nullptr,
                      part_to_fill(mean, group, groups), part_to_fill(var, group, groups)},
                     pool);
    });
    return {out, saved, mean, var};
}

// Gradients of x, of all weights (the projection's empty if there is none), of gamma and of beta.
template <size_t kCount>
std::array<Tensor, kCount> backward(const UnitArguments& given, const Tensor& grad, const Tensor& saved,
                                    const Tensor& mean, const Tensor& var) {
    const Unit& unit = given.unit;
    const ScalarType type = given.x.scalar_type(), statistics = statistics_type(unit.dtype);
    STD_TORCH_CHECK(saved.scalar_type() == type && saved.numel() == unit.saved_size(), "saved must hold the ",
                    unit.saved_size(), " values that a forward pass with save=True leaves");
    STD_TORCH_CHECK(grad.scalar_type() == type && grad.dim() == 4 && grad.size(0) == unit.samples &&
                        grad.size(1) == unit.out_channels() && grad.size(2) == unit.out_height() &&
                        grad.size(3) == unit.out_width(),
                    "grad must have the shape and dtype of the unit's output");
    for (const Tensor* values : {&mean, &var})
        STD_TORCH_CHECK(
            values->scalar_type() == statistics && values->dim() == 1 && values->size(0) == unit.normalised(),
            "mean and var must be what the forward pass returned");
    const Tensor out = channels_last(grad), z = packed(saved);
    const Tensor means = packed(mean), vars = packed(var);
    std::array<Tensor, kCount> made;
    made[0] = kept_image(given.x, unit.samples, unit.channels, unit.height, unit.width);
    std::vector<void*> weights;
    for (size_t i = 0; i < kCount - 3; ++i) {
        const bool there = i < given.weights.size();
        made[1 + i] = there ? torch::stable::new_empty(given.weights[i], given.weights[i].sizes())
                            : torch::stable::new_empty(given.x, {0});
        if (there) weights.push_back(made[1 + i].mutable_data_ptr());
    }
    for (size_t i = kCount - 2; i < kCount; ++i) made[i] = torch::stable::new_empty(means, {unit.normalised()});
    spos::cpu::unit_backward(
        unit,
        {out.const_data_ptr(), z.const_data_ptr(), means.const_data_ptr(), vars.const_data_ptr(),
         made[0].mutable_data_ptr(), weights, made[kCount - 2].mutable_data_ptr(), made[kCount - 1].mutable_data_ptr()},
        parallel_for);
    return made;
}

Outputs shuffle_unit_cpu(const Tensor& x, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                         const MaybeTensor& proj_dw, const MaybeTensor& proj_pw, const MaybeTensor& gamma,
                         const MaybeTensor& beta, int64_t mid, const MaybeTensor& width, int64_t stride, double epsilon,
                         bool save, int64_t groups) {
    return forward(unit_arguments(UnitKind::shuffle, x, {pw1, dw, pw2}, proj_dw, proj_pw, gamma, beta, mid, width,
                                  stride, epsilon, groups),
                   save, groups);
}

Outputs xception_unit_cpu(const Tensor& x, const Tensor& dw1, const Tensor& pw1, const Tensor& dw2, const Tensor& pw2,
                          const Tensor& dw3, const Tensor& pw3, const MaybeTensor& proj_dw, const MaybeTensor& proj_pw,
                          const MaybeTensor& gamma, const MaybeTensor& beta, int64_t mid, const MaybeTensor& width,
                          int64_t stride, double epsilon, bool save, int64_t groups) {
    return forward(unit_arguments(UnitKind::xception, x, {dw1, pw1, dw2, pw2, dw3, pw3}, proj_dw, proj_pw, gamma, beta,
                                  mid, width, stride, epsilon, groups),
                   save, groups);
}

// Vectors of all layers, of which the channels in use are read, behind one another; none of no layer.
MaybeTensor joined(const std::vector<Tensor>& vectors, const char* name, const UnitArguments& given) {
    if (vectors.empty()) return std::nullopt;
    const ScalarType type = statistics_type(given.unit.dtype);
    const auto layers = given.unit.layers();
    STD_TORCH_CHECK(vectors.size() == layers.size(), name, " must hold ", layers.size(), " tensors, got ",
                    vectors.size());
    const Tensor all = torch::stable::new_empty(given.x, {given.unit.normalised()}, type);
    char* to = static_cast<char*>(all.mutable_data_ptr());
    for (size_t i = 0; i < layers.size(); ++i) {
        STD_TORCH_CHECK(vectors[i].dim() == 1 && vectors[i].size(0) >= layers[i]->out, name, "[", i, "] must be [",
                        layers[i]->out, "] or longer");
        const Tensor values = packed(vectors[i], type);
        const int64_t bytes = layers[i]->out * (type == ScalarType::Double ? sizeof(double) : sizeof(float));
        std::memcpy(to, values.const_data_ptr(), bytes);
        to += bytes;
    }
    return all;
}

Tensor unit_train_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& running_mean,
                      const std::vector<Tensor>& running_var, const std::vector<Tensor>& counters,
                      const std::vector<Tensor>& gamma, const std::vector<Tensor>& beta,
                      const std::vector<double>& momentum, int64_t mid, int64_t stride, double epsilon) {
    const WeightList given_weights(weights);
    UnitArguments given = unit_arguments(given_weights.shuffle() ? UnitKind::shuffle : UnitKind::xception, x,
                                         {weights.begin(), weights.begin() + given_weights.main()},
                                         given_weights.depthwise_projection(), given_weights.pointwise_projection(),
                                         std::nullopt, std::nullopt, mid, std::nullopt, stride, epsilon);
    Unit& unit = given.unit;
    given.gamma = joined(gamma, "gamma", given), given.beta = joined(beta, "beta", given);
    unit.gamma = data_of(given.gamma), unit.beta = data_of(given.beta);
    std::vector<int64_t> channels, count;
    for (const auto* chain : {&unit.main, &unit.projection})
        for (size_t i = 0; i < chain->size(); ++i) {
            channels.push_back((*chain)[i].out);
            count.push_back(unit.pixels_behind(*chain, i));
        }
    const ScalarType type = statistics_type(unit.dtype);
    const RunningStatistics running{running_mean, running_var, counters, momentum};
    check_running(running, type, channels, count);
    const Tensor out = kept_image(given.x, unit.samples, unit.out_channels(), unit.out_height(), unit.out_width());
    std::vector<double> mean(unit.normalised()), var(unit.normalised());  // room for either type
    unit_forward(unit, {out.mutable_data_ptr(), nullptr, mean.data(), var.data()}, parallel_for);
    move_running(running, type, mean.data(), var.data(), channels, count);
    return out;
}

auto shuffle_unit_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& saved, const Tensor& mean,
                               const Tensor& var, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                               const MaybeTensor& proj_dw, const MaybeTensor& proj_pw, const MaybeTensor& gamma,
                               const MaybeTensor& beta, int64_t mid, const MaybeTensor& width, int64_t stride,
                               double epsilon) {
    const auto given = unit_arguments(UnitKind::shuffle, x, {pw1, dw, pw2}, proj_dw, proj_pw, gamma, beta, mid, width,
                                      stride, epsilon);
    return std::tuple_cat(backward<8>(given, grad, saved, mean, var));
}

auto xception_unit_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& saved, const Tensor& mean,
                                const Tensor& var, const Tensor& dw1, const Tensor& pw1, const Tensor& dw2,
                                const Tensor& pw2, const Tensor& dw3, const Tensor& pw3, const MaybeTensor& proj_dw,
                                const MaybeTensor& proj_pw, const MaybeTensor& gamma, const MaybeTensor& beta,
                                int64_t mid, const MaybeTensor& width, int64_t stride, double epsilon) {
    const auto given = unit_arguments(UnitKind::xception, x, {dw1, pw1, dw2, pw2, dw3, pw3}, proj_dw, proj_pw, gamma,
                                      beta, mid, width, stride, epsilon);
    return std::tuple_cat(backward<11>(given, grad, saved, mean, var));
}

}  // namespace

Kernels units_kernels() {
    return {
        {"shuffle_unit", "CPU", TORCH_BOX(&shuffle_unit_cpu)},
        {"shuffle_unit_backward", "CPU", TORCH_BOX(&shuffle_unit_backward_cpu)},
        {"xception_unit", "CPU", TORCH_BOX(&xception_unit_cpu)},
        {"xception_unit_backward", "CPU", TORCH_BOX(&xception_unit_backward_cpu)},
        {"unit_train", "CPU", TORCH_BOX(&unit_train_cpu)},
    };
}

}  // namespace spos::bindings
