#include <algorithm>
#include <optional>
#include <tuple>

#include "csrc/bindings/tensors.h"
#include "csrc/cpu/shuffle_unit.h"

namespace spos::bindings {
namespace {

// A unit's tensors as the kernels read them, and alive as long as they do.
struct UnitArguments {
    Tensor x, pw1, dw, pw2;
    std::optional<Tensor> gamma, beta;
    spos::cpu::ShuffleUnit unit;
};

UnitArguments unit_arguments(const Tensor& x, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                             const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, int64_t mid,
                             double epsilon) {
    const DType dtype = dtype_of(x, "x");
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.size(1) % 2 == 0,
                    "x must be [N, C, H, W], not empty, with an even number of channels");
    const int64_t half = x.size(1) / 2;
    STD_TORCH_CHECK(pw1.dim() == 4 && pw1.size(1) == half && pw1.size(2) == 1 && pw1.size(3) == 1, "pw1 must be [M, ",
                    half, ", 1, 1]");
    const int64_t stored = pw1.size(0);
    STD_TORCH_CHECK(
        dw.dim() == 4 && dw.size(0) == stored && dw.size(1) == 1 && dw.size(2) == dw.size(3) && dw.size(2) % 2 == 1,
        "dw must be [", stored, ", 1, k, k] with an odd k");
    STD_TORCH_CHECK(pw2.dim() == 4 && pw2.size(1) == stored && pw2.size(2) == 1 && pw2.size(3) == 1,
                    "pw2 must be [out, ", stored, ", 1, 1]");
    STD_TORCH_CHECK(mid >= 1 && mid <= stored, "mid must be from 1 to ", stored, ", got ", mid);
    for (const Tensor* weight : {&pw1, &dw, &pw2})
        STD_TORCH_CHECK(weight->scalar_type() == x.scalar_type(), "weights must have the dtype of x");
    UnitArguments given{channels_last(x),
                        torch::stable::contiguous(pw1),
                        torch::stable::contiguous(dw),
                        torch::stable::contiguous(pw2),
                        std::nullopt,
                        std::nullopt,
                        {}};
    const int64_t made = pw2.size(0), normalised = 2 * mid + made;
    for (const auto& [from, to] : {std::pair{&gamma, &given.gamma}, std::pair{&beta, &given.beta}}) {
        if (!from->has_value()) continue;
        STD_TORCH_CHECK((*from)->dim() == 1 && (*from)->size(0) == normalised, "gamma and beta must be [", normalised,
                        "]");
        *to = torch::stable::contiguous(torch::stable::to(**from, statistics_type(dtype)));
    }
    given.unit = {dtype,
                  x.size(0),
                  x.size(2),
                  x.size(3),
                  half,
                  mid,
                  made,
                  dw.size(2),
                  stored,
                  given.x.const_data_ptr(),
                  given.pw1.const_data_ptr(),
                  given.dw.const_data_ptr(),
                  given.pw2.const_data_ptr(),
                  given.gamma ? given.gamma->const_data_ptr() : nullptr,
                  given.beta ? given.beta->const_data_ptr() : nullptr,
                  epsilon};
    return given;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shuffle_unit_cpu(const Tensor& x, const Tensor& pw1,
                                                                            const Tensor& dw, const Tensor& pw2,
                                                                            const std::optional<Tensor>& gamma,
                                                                            const std::optional<Tensor>& beta,
                                                                            int64_t mid, double epsilon, bool save) {
    const UnitArguments given = unit_arguments(x, pw1, dw, pw2, gamma, beta, mid, epsilon);
    const auto& unit = given.unit;
    const int64_t n = unit.samples, h = unit.height, w = unit.width;
    const Tensor out = empty_channels_last(given.x, n, unit.half + unit.made, h, w);
    const Tensor mean = torch::stable::new_empty(given.x, {unit.normalised()}, statistics_type(unit.dtype));
    const Tensor var = torch::stable::new_empty(mean, {unit.normalised()});
    if (save) {
        const Tensor z1 = empty_channels_last(given.x, n, mid, h, w), z2 = empty_channels_last(given.x, n, mid, h, w);
        const Tensor z3 = empty_channels_last(given.x, n, unit.made, h, w);
        spos::cpu::shuffle_unit_forward(unit,
                                        {out.mutable_data_ptr(),
                                         z1.mutable_data_ptr(),
                                         z2.mutable_data_ptr(),
                                         z3.mutable_data_ptr(),
                                         {mid, mid, unit.made},
                                         mean.mutable_data_ptr(),
                                         var.mutable_data_ptr()},
                                        parallel_for);
        return {out, z1, z2, z3, mean, var};
    }
    const int64_t pitch = std::max(mid, unit.made);
    const Tensor last = torch::stable::new_empty(given.x, {unit.pixels(), pitch});
    const bool apart = !spos::cpu::depthwise_in_place(unit);
    const Tensor first = torch::stable::new_empty(given.x, {apart ? unit.pixels() : 0, pitch});
    spos::cpu::shuffle_unit_forward(unit,
                                    {out.mutable_data_ptr(),
                                     apart ? first.mutable_data_ptr() : last.mutable_data_ptr(),
                                     last.mutable_data_ptr(),
                                     last.mutable_data_ptr(),
                                     {pitch, pitch, pitch},
                                     mean.mutable_data_ptr(),
                                     var.mutable_data_ptr()},
                                    parallel_for);
    return {out,
            empty_channels_last(given.x, 0, mid, h, w),
            empty_channels_last(given.x, 0, mid, h, w),
            empty_channels_last(given.x, 0, unit.made, h, w),
            mean,
            var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shuffle_unit_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& z1, const Tensor& z2, const Tensor& z3, const Tensor& mean,
    const Tensor& var, const Tensor& pw1, const Tensor& dw, const Tensor& pw2, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, int64_t mid, double epsilon) {
    const UnitArguments given = unit_arguments(x, pw1, dw, pw2, gamma, beta, mid, epsilon);
    const auto& unit = given.unit;
    const int64_t n = unit.samples, h = unit.height, w = unit.width;
    auto image = [&](const Tensor& value, int64_t channels) {
        STD_TORCH_CHECK(value.scalar_type() == x.scalar_type() && value.dim() == 4 && value.size(0) == n &&
                            value.size(1) == channels && value.size(2) == h && value.size(3) == w,
                        "shuffle_unit_backward needs what shuffle_unit saves (save=True)");
        return channels_last(value);
    };
    const Tensor out = image(grad, unit.half + unit.made), first = image(z1, mid), second = image(z2, mid),
                 third = image(z3, unit.made);
    auto statistics = [&](const Tensor& value) {
        STD_TORCH_CHECK(value.scalar_type() == statistics_type(unit.dtype) && value.dim() == 1 &&
                            value.size(0) == unit.normalised(),
                        "mean and var must be what shuffle_unit returned");
        return torch::stable::contiguous(value);
    };
    const Tensor means = statistics(mean), vars = statistics(var);
    const Tensor grad_x = empty_channels_last(given.x, n, x.size(1), h, w);
    const Tensor grad_pw1 = torch::stable::new_empty(x, {unit.mid_stored, unit.half, 1, 1});
    const Tensor grad_dw = torch::stable::new_empty(x, {unit.mid_stored, 1, unit.kernel, unit.kernel});
    const Tensor grad_pw2 = torch::stable::new_empty(x, {unit.made, unit.mid_stored, 1, 1});
    const Tensor grad_gamma = torch::stable::new_empty(means, {unit.normalised()});
    const Tensor grad_beta = torch::stable::new_empty(means, {unit.normalised()});
    spos::cpu::shuffle_unit_backward(
        unit,
        {out.const_data_ptr(), first.const_data_ptr(), second.const_data_ptr(), third.const_data_ptr(),
         means.const_data_ptr(), vars.const_data_ptr(), grad_x.mutable_data_ptr(), grad_pw1.mutable_data_ptr(),
         grad_dw.mutable_data_ptr(), grad_pw2.mutable_data_ptr(), grad_gamma.mutable_data_ptr(),
         grad_beta.mutable_data_ptr()},
        parallel_for);
    return {grad_x, grad_pw1, grad_dw, grad_pw2, grad_gamma, grad_beta};
}

}  // namespace

Kernels units_kernels() {
    return {
        {"shuffle_unit", "CPU", TORCH_BOX(&shuffle_unit_cpu)},
        {"shuffle_unit_backward", "CPU", TORCH_BOX(&shuffle_unit_backward_cpu)},
    };
}

}  // namespace spos::bindings
