#include "csrc/cpu/unit_infer.h"

#include <initializer_list>
#include <optional>

#include "csrc/bindings/groups.h"

namespace spos::bindings {
namespace {

using spos::cpu::InferLayer;
using MaybeTensor = std::optional<Tensor>;

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
        const ScalarType statistics = statistics_type(unit_.dtype);
        auto checked = [&](const Tensor& value, const char* name) {
            STD_TORCH_CHECK(is_grouped_vector(value, next_, groups_), name, " must be [", next_, "], or [", groups_,
                            ", ", next_, "] of several groups");
            return torch::stable::contiguous(torch::stable::to(value, statistics));
        };
        const Tensor shifts = checked(shift, "shift");
        const MaybeTensor scales = scale ? MaybeTensor(checked(*scale, "scale")) : std::nullopt;
        // Statistics begin with the main branch's layers, the output with the projection's channels.
        if (unit_.branches.size() == 2) std::swap(unit_.branches[0], unit_.branches[1]);
        const Tensor out =
            empty_channels_last(x_, x_.size(0), unit_.out_channels(), unit_.out_height(), unit_.out_width());
        for_each_group(x_, groups_, [&](int64_t group, const spos::cpu::ParallelFor& pool) {
            spos::cpu::UnitInference run = unit_;
            run.x = part(x_, group, groups_), run.out = part_to_fill(out, group, groups_);
            run.shift = part(shifts, group, groups_);
            run.scale = scales ? part(*scales, group, groups_) : nullptr;
            spos::cpu::unit_infer(run, pool);
        });
        return out;
    }

  private:
    void add(const Tensor& weight, const char* name, InferLayer layer, int64_t channels) {
        STD_TORCH_CHECK(weight.scalar_type() == x_.scalar_type(), name, " must have the dtype of x");
        kept_.push_back(torch::stable::contiguous(weight));
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

Tensor shuffle_unit_infer_cpu(const Tensor& x, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                              const MaybeTensor& proj_dw, const MaybeTensor& proj_pw, const MaybeTensor& scale,
                              const Tensor& shift, int64_t mid, const MaybeTensor& width, int64_t stride,
                              int64_t groups) {
    const int64_t used = used_channels(width, mid);
    Arguments arguments(x, stride, splits(proj_dw, proj_pw), groups);
    arguments.begin_branch();
    arguments.pointwise(pw1, "pw1", arguments.branch_channels(), mid, used);
    arguments.depthwise(dw, "dw", mid, used);
    arguments.pointwise(pw2, "pw2", mid, pw2.size(0), pw2.size(0));
    arguments.projection(proj_dw, proj_pw);
    return arguments.run(scale, shift);
}

Tensor xception_unit_infer_cpu(const Tensor& x, const Tensor& dw1, const Tensor& pw1, const Tensor& dw2,
                               const Tensor& pw2, const Tensor& dw3, const Tensor& pw3, const MaybeTensor& proj_dw,
                               const MaybeTensor& proj_pw, const MaybeTensor& scale, const Tensor& shift, int64_t mid,
                               const MaybeTensor& width, int64_t stride, int64_t groups) {
    const int64_t used = used_channels(width, mid);
    Arguments arguments(x, stride, splits(proj_dw, proj_pw), groups);
    const int64_t in = arguments.branch_channels();
    arguments.begin_branch();
    arguments.depthwise(dw1, "dw1", in, in);
    arguments.pointwise(pw1, "pw1", in, mid, used);
    arguments.depthwise(dw2, "dw2", mid, used);
    arguments.pointwise(pw2, "pw2", mid, mid, used);
    arguments.depthwise(dw3, "dw3", mid, used);
    arguments.pointwise(pw3, "pw3", mid, pw3.size(0), pw3.size(0));
    arguments.projection(proj_dw, proj_pw);
    return arguments.run(scale, shift);
}

}  // namespace

Kernels unit_infer_kernels() {
    return {
        {"shuffle_unit_infer", "CPU", TORCH_BOX(&shuffle_unit_infer_cpu)},
        {"xception_unit_infer", "CPU", TORCH_BOX(&xception_unit_infer_cpu)},
    };
}

}  // namespace spos::bindings
