#include "csrc/cpu/unit_infer.h"

#include <initializer_list>
#include <optional>

#include "csrc/bindings/cpu_memory.h"
#include "csrc/bindings/weight_list.h"

namespace spos::bindings {
namespace {

using spos::cpu::InferLayer;
using MaybeTensor = std::optional<Tensor>;

// Normalisation layers, main branch before projection.
struct Norms {
    const std::vector<Tensor>&mean, &var, &gamma, &beta;
    double epsilon;
};

// A unit's tensors as the kernel reads them, layer by layer, and alive as long as it does. `unit_` is one group's.
class Arguments {
  public:
    Arguments(const Tensor& x, int64_t stride, bool split, int64_t groups) : x_(channels_last(x)), groups_(groups) {
        STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W], not empty");
        STD_TORCH_CHECK(!split || x.size(1) % 2 == 0, "x must have an even number of channels without a projection");
        STD_TORCH_CHECK(stride >= 1 && (!split || stride == 1), "stride must be 1 without a projection, got ", stride);
        unit_.dtype = dtype_of(x, "x");
        unit_.samples = group_samples(x, groups), unit_.stride = stride, unit_.split = split;
        unit_.channels = x.size(1), unit_.height = x.size(2), unit_.width = x.size(3);
    }

    int64_t branch_channels() const { return unit_.split ? unit_.channels / 2 : unit_.channels; }

    void begin_branch() { unit_.branches.emplace_back(); }

    // The next layer's statistics lie `channels` behind this one's, of which `used` channels are computed.
    void pointwise(const Tensor& weight, const char* name, int64_t in, int64_t channels, int64_t used) {
        STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= channels && weight.size(1) >= in &&
                            weight.numel() == weight.size(0) * weight.size(1),
                        name, " must be [", channels, " or more, ", in, " or more, 1, 1]");
        add(weight, name, {nullptr, weight.size(1), 0, used, next_}, channels);
    }
    void depthwise(const Tensor& weight, const char* name, int64_t channels, int64_t used) {
        STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) >= channels && weight.size(1) == 1 &&
                            weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                        name, " must be [", channels, " or more, 1, k, k] with an odd k");
        add(weight, name, {nullptr, 0, weight.size(2), used, next_}, channels);
    }
    void projection(const MaybeTensor& depthwise_weight, const MaybeTensor& pointwise_weight) {
        if (unit_.split) return;
        begin_branch();
        depthwise(*depthwise_weight, "proj_dw", unit_.channels, unit_.channels);
        pointwise(*pointwise_weight, "proj_pw", unit_.channels, unit_.channels, unit_.channels);
    }

    Tensor run(const MaybeTensor& scale, const Tensor& shift) {
        auto checked = [&](const Tensor& value, const char* name) {
            STD_TORCH_CHECK(is_grouped_vector(value, next_, groups_), name, " must be [", next_, "], or [", groups_,
                            ", ", next_, "] of several groups");
            return packed(value, statistics_type(unit_.dtype));
        };
        const Tensor shifts = checked(shift, "shift");
        const MaybeTensor scales = scale ? MaybeTensor(checked(*scale, "scale")) : std::nullopt;
        return run([&](int64_t group) { return scales ? part(*scales, group, groups_) : nullptr; },
                   [&](int64_t group) { return part(shifts, group, groups_); });
    }

    // With one tensor a layer (gamma and beta: or none at all), of which the channels that are used are read.
    Tensor run(const Norms& norms) {
        return unit_.dtype == DType::float64 ? run_folded<double>(norms) : run_folded<float>(norms);
    }

  private:
    template <typename Scale, typename Shift>
    Tensor run(const Scale& scale_of, const Shift& shift_of) {
        // Statistics begin with the main branch's layers, the output with the projection's channels.
        if (unit_.branches.size() == 2) std::swap(unit_.branches[0], unit_.branches[1]);
        const Tensor out = kept_image(x_, x_.size(0), unit_.out_channels(), unit_.out_height(), unit_.out_width());
        for_each_group(x_, groups_, [&](int64_t group, const spos::cpu::ParallelFor& pool) {
            spos::cpu::UnitInference run = unit_;
            run.x = part(x_, group, groups_), run.out = part_to_fill(out, group, groups_);
            run.scale = scale_of(group), run.shift = shift_of(group);
            spos::cpu::unit_infer(run, pool);
        });
        return out;
    }

    template <typename A>
    Tensor run_folded(const Norms& norms) {
        std::vector<InferLayer> layers;
        for (const auto& branch : unit_.branches) layers.insert(layers.end(), branch.begin(), branch.end());
        std::vector<A> scale(next_), shift(next_);
        for (size_t i = 0; i < layers.size(); ++i) {
            const Tensor mean = values_of(norms.mean, "mean", i, layers), var = values_of(norms.var, "var", i, layers);
            MaybeTensor gamma, beta;
            if (!norms.gamma.empty()) gamma = values_of(norms.gamma, "gamma", i, layers);
            if (!norms.beta.empty()) beta = values_of(norms.beta, "beta", i, layers);
            auto data = [](const Tensor& values) { return static_cast<const A*>(values.const_data_ptr()); };
            spos::cpu::fold_norm(data(mean), data(var), gamma ? data(*gamma) : nullptr, beta ? data(*beta) : nullptr,
                                 static_cast<A>(norms.epsilon), layers[i].channels, scale.data() + layers[i].first,
                                 shift.data() + layers[i].first);
        }
        return run([&](int64_t) { return scale.data(); }, [&](int64_t) { return shift.data(); });
    }

    Tensor values_of(const std::vector<Tensor>& all, const char* name, size_t layer,
                     const std::vector<InferLayer>& layers) const {
        STD_TORCH_CHECK(all.size() == layers.size(), name, " must hold ", layers.size(), " tensors, got ", all.size());
        STD_TORCH_CHECK(all[layer].dim() == 1 && all[layer].size(0) >= layers[layer].channels, name, "[", layer,
                        "] must be [", layers[layer].channels, "] or longer");
        return packed(all[layer], statistics_type(unit_.dtype));
    }

    void add(const Tensor& weight, const char* name, InferLayer layer, int64_t channels) {
        STD_TORCH_CHECK(weight.scalar_type() == x_.scalar_type(), name, " must have the dtype of x");
        kept_.push_back(packed(weight));
        layer.weights = kept_.back().const_data_ptr();
        unit_.branches.back().push_back(layer);
        next_ += channels;
    }

    Tensor x_;
    int64_t groups_;
    std::vector<Tensor> kept_;
    spos::cpu::UnitInference unit_{};
    int64_t next_ = 0;  // first of the next layer's channels in scale and shift
};

bool splits(const MaybeTensor& proj_dw, const MaybeTensor& proj_pw) {
    STD_TORCH_CHECK(proj_dw.has_value() == proj_pw.has_value(), "proj_dw and proj_pw must come together");
    return !proj_dw.has_value();
}

// The branches of both units: main one, then projection.
void shuffle_branches(Arguments& unit, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                      const MaybeTensor& proj_dw, const MaybeTensor& proj_pw, int64_t mid, int64_t used) {
    unit.begin_branch();
    unit.pointwise(pw1, "pw1", unit.branch_channels(), mid, used);
    unit.depthwise(dw, "dw", mid, used);
    unit.pointwise(pw2, "pw2", mid, pw2.size(0), pw2.size(0));
    unit.projection(proj_dw, proj_pw);
}

void xception_branches(Arguments& unit, const Tensor& dw1, const Tensor& pw1, const Tensor& dw2, const Tensor& pw2,
                       const Tensor& dw3, const Tensor& pw3, const MaybeTensor& proj_dw, const MaybeTensor& proj_pw,
                       int64_t mid, int64_t used) {
    const int64_t in = unit.branch_channels();
    unit.begin_branch();
    unit.depthwise(dw1, "dw1", in, in);
    unit.pointwise(pw1, "pw1", in, mid, used);
    unit.depthwise(dw2, "dw2", mid, used);
    unit.pointwise(pw2, "pw2", mid, mid, used);
    unit.depthwise(dw3, "dw3", mid, used);
    unit.pointwise(pw3, "pw3", mid, pw3.size(0), pw3.size(0));
    unit.projection(proj_dw, proj_pw);
}

Tensor shuffle_unit_infer_cpu(const Tensor& x, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                              const MaybeTensor& proj_dw, const MaybeTensor& proj_pw, const MaybeTensor& scale,
                              const Tensor& shift, int64_t mid, const MaybeTensor& width, int64_t stride,
                              int64_t groups) {
    Arguments unit(x, stride, splits(proj_dw, proj_pw), groups);
    shuffle_branches(unit, pw1, dw, pw2, proj_dw, proj_pw, mid, used_channels(width, mid));
    return unit.run(scale, shift);
}

Tensor xception_unit_infer_cpu(const Tensor& x, const Tensor& dw1, const Tensor& pw1, const Tensor& dw2,
                               const Tensor& pw2, const Tensor& dw3, const Tensor& pw3, const MaybeTensor& proj_dw,
                               const MaybeTensor& proj_pw, const MaybeTensor& scale, const Tensor& shift, int64_t mid,
                               const MaybeTensor& width, int64_t stride, int64_t groups) {
    Arguments unit(x, stride, splits(proj_dw, proj_pw), groups);
    xception_branches(unit, dw1, pw1, dw2, pw2, dw3, pw3, proj_dw, proj_pw, mid, used_channels(width, mid));
    return unit.run(scale, shift);
}

Tensor unit_eval_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& mean,
                     const std::vector<Tensor>& var, const std::vector<Tensor>& gamma, const std::vector<Tensor>& beta,
                     int64_t mid, int64_t stride, double epsilon) {
    const WeightList list(weights);
    const MaybeTensor proj_dw = list.depthwise_projection(), proj_pw = list.pointwise_projection();
    const auto& w = weights;
    Arguments unit(x, stride, !list.projects(), 1);
    const int64_t in = unit.branch_channels(), read = w[list.shuffle() ? 0 : 1].size(1);
    STD_TORCH_CHECK(read == in && (list.shuffle() || w[0].size(0) == in) && (!proj_dw || proj_dw->size(0) == in),
                    "x gives ", in, " channels to a branch whose weights are for ", read);
    if (list.shuffle())
        shuffle_branches(unit, w[0], w[1], w[2], proj_dw, proj_pw, mid, mid);
    else
        xception_branches(unit, w[0], w[1], w[2], w[3], w[4], w[5], proj_dw, proj_pw, mid, mid);
    return unit.run(Norms{mean, var, gamma, beta, epsilon});
}

}  // namespace

Kernels unit_infer_kernels() {
    return {
        {"shuffle_unit_infer", "CPU", TORCH_BOX(&shuffle_unit_infer_cpu)},
        {"xception_unit_infer", "CPU", TORCH_BOX(&xception_unit_infer_cpu)},
        {"unit_eval", "CPU", TORCH_BOX(&unit_eval_cpu)},
    };
}

}  // namespace spos::bindings
