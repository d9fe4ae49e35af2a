// bn_add_relu and its backward: shapes and layouts checked, then the kernels. Python sees to the layout: packed
// channels last.
#include "csrc/cpu/bn_add_relu.h"

#include <tuple>

#include "csrc/bindings/cpu_memory.h"

namespace spos::bindings {
namespace {

using OptionalTensor = std::optional<Tensor>;

const void* data(const OptionalTensor& values) {
    return values ? values->const_data_ptr() : nullptr;
}

spos::cpu::AddReluShape shape_of(const Tensor& x, int64_t groups) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W] and not empty");
    STD_TORCH_CHECK(groups >= 1 && x.size(0) % groups == 0, "groups must divide the batch of ", x.size(0),
                    " samples, got ", groups);
    return {groups, x.size(0) / groups * x.size(2) * x.size(3), x.size(1)};
}

// As the kernels read it: of x's dtype and shape, packed channels last.
Tensor image_like(const Tensor& image, const char* name, const Tensor& x) {
    STD_TORCH_CHECK(image.scalar_type() == x.scalar_type() && image.dim() == 4, name, " must have x's dtype and shape");
    for (int64_t dim = 0; dim < 4; ++dim)
        STD_TORCH_CHECK(image.size(dim) == x.size(dim), name, " must have x's dtype and shape");
    return channels_last(image);
}

Tensor values_of(const Tensor& values, const char* name, const Tensor& x, int64_t groups) {
    STD_TORCH_CHECK(values.scalar_type() == statistics_type(dtype_of(x, "x")), name,
                    " must be float32, or float64 for float64 images");
    STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == groups && values.size(1) == x.size(1), name, " must be [",
                    groups, ", ", x.size(1), "]");
    return torch::stable::contiguous(values);
}

OptionalTensor values_of(const OptionalTensor& values, const char* name, const Tensor& x, int64_t groups) {
    return values ? OptionalTensor(values_of(*values, name, x, groups)) : std::nullopt;
}

Tensor bn_add_relu_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& residual,
                       const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, int64_t groups) {
    const auto shape = shape_of(x, groups);
    STD_TORCH_CHECK(residual_scale.has_value() == residual_shift.has_value(),
                    "residual_scale and residual_shift must be given together");
    const Tensor input = channels_last(x), added = image_like(residual, "residual", x);
    const Tensor scales = values_of(scale, "scale", x, groups), shifts = values_of(shift, "shift", x, groups);
    const auto residual_scales = values_of(residual_scale, "residual_scale", x, groups);
    const auto residual_shifts = values_of(residual_shift, "residual_shift", x, groups);
    const Tensor out = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3));
    spos::cpu::bn_add_relu(dtype_of(x, "x"), shape, input.const_data_ptr(), scales.const_data_ptr(),
                           shifts.const_data_ptr(), added.const_data_ptr(), data(residual_scales),
                           data(residual_shifts), out.mutable_data_ptr(), parallel_for);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward_cpu(const Tensor& grad, const Tensor& out,
                                                                            const Tensor& x, const Tensor& scale,
                                                                            const Tensor& residual,
                                                                            const OptionalTensor& residual_scale,
                                                                            int64_t groups) {
    const auto shape = shape_of(x, groups);
    const Tensor input = channels_last(x), added = image_like(residual, "residual", x);
    const Tensor grads = image_like(grad, "grad", x), outs = image_like(out, "out", x);
    const Tensor scales = values_of(scale, "scale", x, groups);
    const auto residual_scales = values_of(residual_scale, "residual_scale", x, groups);
    const Tensor grad_x = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const Tensor grad_residual = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const Tensor grad_scale = torch::stable::new_empty(scales, scales.sizes());
    const Tensor grad_shift = torch::stable::new_empty(scales, scales.sizes());
    const Tensor grad_residual_scale =
        residual_scale ? torch::stable::new_empty(scales, scales.sizes()) : torch::stable::new_empty(scales, {0});
    spos::cpu::bn_add_relu_backward(dtype_of(x, "x"), shape, grads.const_data_ptr(), outs.const_data_ptr(),
                                    input.const_data_ptr(), scales.const_data_ptr(), added.const_data_ptr(),
                                    data(residual_scales), grad_x.mutable_data_ptr(), grad_residual.mutable_data_ptr(),
                                    grad_scale.mutable_data_ptr(), grad_shift.mutable_data_ptr(),
                                    residual_scale ? grad_residual_scale.mutable_data_ptr() : nullptr, parallel_for);
    return {grad_x, grad_residual, grad_scale, grad_shift, grad_residual_scale};
}

}  // namespace

Kernels bn_add_relu_kernels() {
    return {
        {"bn_add_relu", "CPU", TORCH_BOX(&bn_add_relu_cpu)},
        {"bn_add_relu_backward", "CPU", TORCH_BOX(&bn_add_relu_backward_cpu)},
    };
}

}  // namespace spos::bindings
