// bn_add_relu and its backward: shapes and layouts checked, then the kernels. Python sees to the layout: packed
// channels last.
#include "csrc/cpu/bn_add_relu.h"

#include <tuple>

#include "csrc/bindings/cpu_memory.h"
#include "csrc/bindings/groups.h"
#ifdef SPOS_FAST_WITH_CUDA
#include "kernels/cuda/bn_add_relu.h"
#endif

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
    STD_TORCH_CHECK(image.get_device_index() == x.get_device_index(), name, " must be on the device of x");
    for (int64_t dim = 0; dim < 4; ++dim)
        STD_TORCH_CHECK(image.size(dim) == x.size(dim), name, " must have x's dtype and shape");
    return channels_last(image);
}

OptionalTensor maybe_per_group(const OptionalTensor& values, const char* name, const Tensor& x, int64_t groups) {
    return values ? OptionalTensor(per_group(*values, name, x, groups)) : std::nullopt;
}

// What both directions read, as the kernels read it.
struct Given {
    spos::cpu::AddReluShape shape;
    DType dtype;
    Tensor x, scale, residual;
    OptionalTensor residual_scale;

    Given(const Tensor& given, const Tensor& scale, const Tensor& residual, const OptionalTensor& residual_scale,
          int64_t groups)
        : shape(shape_of(given, groups)),
          dtype(dtype_of(given, "x")),
          x(channels_last(given)),
          scale(per_group(scale, "scale", given, groups)),
          residual(image_like(residual, "residual", given)),
          residual_scale(maybe_per_group(residual_scale, "residual_scale", given, groups)) {}

    // shift and residual_shift.
    std::tuple<Tensor, OptionalTensor> shifts(const Tensor& shift, const OptionalTensor& residual_shift) const {
        STD_TORCH_CHECK(residual_scale.has_value() == residual_shift.has_value(),
                        "residual_scale and residual_shift must be given together");
        return {per_group(shift, "shift", x, shape.groups),
                maybe_per_group(residual_shift, "residual_shift", x, shape.groups)};
    }

    // Gradients of scale, shift and residual_scale.
    std::tuple<Tensor, Tensor, Tensor> new_sums() const {
        auto like_scale = [this] { return torch::stable::new_empty(scale, scale.sizes()); };
        return {like_scale(), like_scale(), residual_scale ? like_scale() : torch::stable::new_empty(scale, {0})};
    }

#ifdef SPOS_FAST_WITH_CUDA
    spos::cuda::BnAddRelu call() const {
        return {dtype,
                shape.groups,
                shape.rows,
                shape.channels,
                x.const_data_ptr(),
                residual.const_data_ptr(),
                scale.const_data_ptr(),
                data(residual_scale)};
    }
#endif
};

Tensor bn_add_relu_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& residual,
                       const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, int64_t groups) {
    const Given given(x, scale, residual, residual_scale, groups);
    const auto [shifts, residual_shifts] = given.shifts(shift, residual_shift);
    const Tensor out = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3));
    spos::cpu::bn_add_relu(given.dtype, given.shape, given.x.const_data_ptr(), given.scale.const_data_ptr(),
                           shifts.const_data_ptr(), given.residual.const_data_ptr(), data(given.residual_scale),
                           data(residual_shifts), out.mutable_data_ptr(), parallel_for);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward_cpu(const Tensor& grad, const Tensor& out,
                                                                            const Tensor& x, const Tensor& scale,
                                                                            const Tensor& residual,
                                                                            const OptionalTensor& residual_scale,
                                                                            int64_t groups) {
    const Given given(x, scale, residual, residual_scale, groups);
    const Tensor grads = image_like(grad, "grad", x), outs = image_like(out, "out", x);
    const Tensor grad_x = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const Tensor grad_residual = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const auto [grad_scale, grad_shift, grad_residual_scale] = given.new_sums();
    spos::cpu::bn_add_relu_backward(
        given.dtype, given.shape, grads.const_data_ptr(), outs.const_data_ptr(), given.x.const_data_ptr(),
        given.scale.const_data_ptr(), given.residual.const_data_ptr(), data(given.residual_scale),
        grad_x.mutable_data_ptr(), grad_residual.mutable_data_ptr(), grad_scale.mutable_data_ptr(),
        grad_shift.mutable_data_ptr(), residual_scale ? grad_residual_scale.mutable_data_ptr() : nullptr, parallel_for);
    return {grad_x, grad_residual, grad_scale, grad_shift, grad_residual_scale};
}

#ifdef SPOS_FAST_WITH_CUDA
Tensor bn_add_relu_cuda(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& residual,
                        const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, int64_t groups) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const Given given(x, scale, residual, residual_scale, groups);
    const auto [shifts, residual_shifts] = given.shifts(shift, residual_shift);
    const Tensor out = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const char* error = spos::cuda::bn_add_relu(given.call(), shifts.const_data_ptr(), data(residual_shifts),
                                                out.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "bn_add_relu on CUDA: ", error);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward_cuda(const Tensor& grad, const Tensor& out,
                                                                             const Tensor& x, const Tensor& scale,
                                                                             const Tensor& residual,
                                                                             const OptionalTensor& residual_scale,
                                                                             int64_t groups) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const Given given(x, scale, residual, residual_scale, groups);
    const Tensor grads = image_like(grad, "grad", x), outs = image_like(out, "out", x);
    const Tensor grad_x = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const Tensor grad_residual = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const auto [grad_scale, grad_shift, grad_residual_scale] = given.new_sums();
    const spos::cuda::BnAddRelu call = given.call();
    const Tensor workspace =
        torch::stable::new_empty(x, {spos::cuda::bn_add_relu_backward_workspace_bytes(call)}, ScalarType::Byte);
    const spos::cuda::BnAddReluGradients to{grad_x.mutable_data_ptr(), grad_residual.mutable_data_ptr(),
                                            grad_scale.mutable_data_ptr(), grad_shift.mutable_data_ptr(),
                                            grad_residual_scale.mutable_data_ptr()};
    const char* error = spos::cuda::bn_add_relu_backward(call, grads.const_data_ptr(), outs.const_data_ptr(),
                                                         workspace.mutable_data_ptr(), to, current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "bn_add_relu_backward on CUDA: ", error);
    return {grad_x, grad_residual, grad_scale, grad_shift, grad_residual_scale};
}
#endif

}  // namespace

Kernels bn_add_relu_kernels() {
    return {
        {"bn_add_relu", "CPU", TORCH_BOX(&bn_add_relu_cpu)},
        {"bn_add_relu_backward", "CPU", TORCH_BOX(&bn_add_relu_backward_cpu)},
#ifdef SPOS_FAST_WITH_CUDA
        {"bn_add_relu", "CUDA", TORCH_BOX(&bn_add_relu_cuda)},
        {"bn_add_relu_backward", "CUDA", TORCH_BOX(&bn_add_relu_backward_cuda)},
#endif
    };
}

}  // namespace spos::bindings
