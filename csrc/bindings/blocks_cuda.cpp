// The building blocks on CUDA. Only compiled where CUDA is.
#include <array>
#include <optional>
#include <tuple>

#include "csrc/bindings/groups.h"
#include "csrc/bindings/images.h"
#include "kernels/cuda/bn_act_cat.h"
#include "kernels/cuda/depthwise.h"

namespace spos::bindings {
namespace {

void check_image(const Tensor& x, const char* name, const Tensor& like) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, name, " must be [N, C, H, W] and not empty");
    STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.get_device_index() == like.get_device_index(), name,
                    " must have the dtype and the device of the other images");
}

void check_size(const Tensor& x, const char* name, const std::array<int64_t, 4>& wanted) {
    for (int64_t dim = 0; dim < 4; ++dim)
        STD_TORCH_CHECK(x.size(dim) == wanted[dim], name, " must be [", wanted[0], ", ", wanted[1], ", ", wanted[2],
                        ", ", wanted[3], "], got ", x.size(dim), " at dimension ", dim);
}

// One number a channel (times `rows`), in the dtype of statistics.
Tensor statistics(const Tensor& value, const char* name, int64_t channels, const Tensor& like, int64_t rows = 1) {
    STD_TORCH_CHECK(value.scalar_type() == statistics_type(dtype_of(like, "x")), name,
                    " must be float32, or float64 for float64 images");
    STD_TORCH_CHECK(value.numel() == rows * channels, name, " must hold ", rows * channels, " values, got ",
                    value.numel());
    STD_TORCH_CHECK(value.get_device_index() == like.get_device_index(), name, " must be on the device of the images");
    return torch::stable::contiguous(value);
}

std::optional<Tensor> statistics(const std::optional<Tensor>& value, const char* name, int64_t channels,
                                 const Tensor& like, int64_t rows = 1) {
    if (!value) return std::nullopt;
    return statistics(*value, name, channels, like, rows);
}

const void* data(const std::optional<Tensor>& value) {
    return value ? value->const_data_ptr() : nullptr;
}

const int32_t* width_data(const std::optional<Tensor>& width, const Tensor& like) {
    if (!width) return nullptr;
    STD_TORCH_CHECK(width->scalar_type() == ScalarType::Int && width->dim() == 0 &&
                        width->get_device_index() == like.get_device_index(),
                    "width must be an int32 tensor [] on the device of x");
    return static_cast<const int32_t*>(width->const_data_ptr());
}

Tensor new_statistics(const Tensor& like, int64_t channels) {
    return torch::stable::new_empty(like, {channels}, statistics_type(dtype_of(like, "x")));
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// A depthwise layer as the kernels read it, and its tensors alive as long as they do.
struct DepthwiseArguments {
    Image x;
    Tensor weight;
    std::optional<Tensor> scale, shift;
    spos::cuda::Depthwise layer;

    DepthwiseArguments(const Tensor& image, const Tensor& weights, const std::optional<Tensor>& scales,
                       const std::optional<Tensor>& shifts, bool relu, int64_t stride, int64_t channels,
                       const std::optional<Tensor>& width, int64_t groups = 1)
        : x(image), weight(torch::stable::contiguous(weights)) {
        const int64_t kernel = weight.size(2);
        STD_TORCH_CHECK(weight.scalar_type() == image.scalar_type(), "weight must have the dtype of x");
        STD_TORCH_CHECK(weight.size(1) == 1 && weight.size(3) == kernel && kernel % 2 == 1,
                        "weight must be [stored, 1, k, k] with an odd k");
        STD_TORCH_CHECK(channels >= 1 && channels <= weight.size(0) && channels <= x.size(1),
                        "channels must be from 1 ", "to the channels that x (", x.size(1), ") and weight (",
                        weight.size(0), ") have, got ", channels);
        STD_TORCH_CHECK(stride >= 1, "stride must be at least 1, got ", stride);
        scale = statistics(scales, "scale", channels, image, groups);
        shift = statistics(shifts, "shift", channels, image, groups);
        layer = {dtype_of(image, "x"),
                 group_samples(image, groups),
                 x.size(2),
                 x.size(3),
                 channels,
                 kernel,
                 stride,
                 width_data(width, image),
                 x.data(),
                 x.pitch,
                 weight.const_data_ptr(),
                 data(scale),
                 data(shift),
                 relu,
                 groups};
    }
};

std::tuple<Tensor, Tensor, Tensor> dw_bnstats_cuda(const Tensor& x, const Tensor& weight,
                                                   const std::optional<Tensor>& scale,
                                                   const std::optional<Tensor>& shift, bool relu, int64_t stride,
                                                   int64_t channels, const std::optional<Tensor>& width,
                                                   int64_t groups) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_image(x, "x", x);
    STD_TORCH_CHECK(weight.dim() == 4, "weight must have 4 dimensions, got ", weight.dim());
    const DepthwiseArguments given(x, weight, scale, shift, relu, stride, channels, width, groups);
    const auto& layer = given.layer;
    const Tensor z = empty_channels_last(x, x.size(0), channels, layer.out_height(), layer.out_width());
    const ScalarType type = statistics_type(layer.dtype);
    const Tensor mean = grouped_vector(x, type, channels, groups), m2 = grouped_vector(x, type, channels, groups);
    const Tensor workspace = new_workspace(x, spos::cuda::depthwise_workspace_bytes(layer));
    const char* error = spos::cuda::depthwise(layer, z.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                              mean.mutable_data_ptr(), m2.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "dw_bnstats on CUDA: ", error);
    return {z, mean, m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dw_bnstats_backward_cuda(
    const Tensor& grad, const Tensor& z, const Tensor& norm, bool relu, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::optional<Tensor>& centre,
    bool in_relu, int64_t stride, int64_t channels, const std::optional<Tensor>& width) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_image(x, "x", x);
    check_image(grad, "grad", x);
    check_image(z, "z", x);
    STD_TORCH_CHECK(weight.dim() == 4, "weight must have 4 dimensions, got ", weight.dim());
    const DepthwiseArguments given(x, weight, scale, shift, in_relu, stride, channels, width);
    const auto& layer = given.layer;
    check_size(grad, "grad", {layer.samples, channels, layer.out_height(), layer.out_width()});
    check_size(z, "z", {layer.samples, channels, layer.out_height(), layer.out_width()});
    const Image incoming(grad), output(z);
    const Tensor norms = statistics(norm, "norm", channels, x, 5);
    const std::optional<Tensor> centres = statistics(centre, "centre", channels, x);

    const Tensor grad_x = empty_channels_last(x, layer.samples, channels, layer.height, layer.width);
    const Tensor grad_weight = torch::stable::new_empty(
        x, {given.weight.size(0), given.weight.size(1), given.weight.size(2), given.weight.size(3)});
    const Tensor sum = new_statistics(x, centre ? channels : 0), product = new_statistics(x, centre ? channels : 0);
    const Tensor workspace = new_workspace(x, spos::cuda::depthwise_backward_workspace_bytes(layer));
    const spos::cuda::DepthwiseGradient gradient{incoming.data(),
                                                 incoming.pitch,
                                                 output.data(),
                                                 output.pitch,
                                                 norms.const_data_ptr(),
                                                 relu,
                                                 data(centres),
                                                 given.weight.size(0),
                                                 grad_x.mutable_data_ptr(),
                                                 grad_weight.mutable_data_ptr(),
                                                 sum.mutable_data_ptr(),
                                                 product.mutable_data_ptr()};
    const char* error =
        spos::cuda::depthwise_backward(layer, gradient, workspace.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "dw_bnstats_backward on CUDA: ", error);
    return {grad_x, grad_weight, sum, product};
}

Tensor bn_act_cat_cuda(const Tensor& z, const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& other,
                       const std::optional<Tensor>& other_scale, const std::optional<Tensor>& other_shift, bool relu) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    check_image(z, "z", z);
    const Image image(z);
    const int64_t channels = z.size(1);
    const Tensor scales = statistics(scale, "scale", channels, z), shifts = statistics(shift, "shift", channels, z);
    spos::cuda::BnActCat layer{dtype_of(z, "z"),        image.pixels(),          channels, image.data(), image.pitch,
                               scales.const_data_ptr(), shifts.const_data_ptr(), relu};
    STD_TORCH_CHECK(other_scale.has_value() == other_shift.has_value() && (other || !other_scale),
                    "other_scale and other_shift must be given both, with other, or not at all");
    std::optional<Image> front;
    std::optional<Tensor> front_scale, front_shift;
    if (other) {
        check_image(*other, "other", z);
        check_size(*other, "other", {z.size(0), other->size(1), z.size(2), z.size(3)});
        front.emplace(*other);
        front_scale = statistics(other_scale, "other_scale", other->size(1), z);
        front_shift = statistics(other_shift, "other_shift", other->size(1), z);
        layer.other = front->data();
        layer.other_pitch = front->pitch;
        layer.other_channels = other->size(1);
        layer.other_scale = data(front_scale);
        layer.other_shift = data(front_shift);
    }
    const Tensor out = empty_channels_last(z, z.size(0), layer.front() + channels, z.size(2), z.size(3));
    const char* error = spos::cuda::bn_act_cat(layer, out.mutable_data_ptr(), current_stream(z));
    STD_TORCH_CHECK(error == nullptr, "bn_act_cat on CUDA: ", error);
    return out;
}

std::tuple<Tensor, Tensor> bn_act_cat_backward_cuda(const Tensor& grad, int64_t first, const Tensor& z,
                                                    const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                    bool relu) {
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    check_image(z, "z", z);
    check_image(grad, "grad", z);
    const int64_t channels = z.size(1);
    check_size(grad, "grad", {z.size(0), grad.size(1), z.size(2), z.size(3)});
    STD_TORCH_CHECK(first >= 0 && first + channels <= grad.size(1), "grad must hold the ", channels,
                    " channels of z from ", first, " on, got ", grad.size(1));
    const Image image(z), incoming(grad);
    const Tensor scales = statistics(scale, "scale", channels, z), shifts = statistics(shift, "shift", channels, z);
    const Tensor means = statistics(mean, "mean", channels, z);
    const DType dtype = dtype_of(z, "z");
    const spos::cuda::BnActSums layer{dtype,
                                      image.pixels(),
                                      channels,
                                      static_cast<const char*>(incoming.data()) + first * item_size(dtype),
                                      incoming.pitch,
                                      image.data(),
                                      image.pitch,
                                      scales.const_data_ptr(),
                                      shifts.const_data_ptr(),
                                      means.const_data_ptr(),
                                      relu};
    const Tensor sum = new_statistics(z, channels), product = new_statistics(z, channels);
    const Tensor workspace = new_workspace(z, spos::cuda::bn_act_sums_workspace_bytes(layer));
    const char* error = spos::cuda::bn_act_sums(layer, workspace.mutable_data_ptr(), sum.mutable_data_ptr(),
                                                product.mutable_data_ptr(), current_stream(z));
    STD_TORCH_CHECK(error == nullptr, "bn_act_cat_backward on CUDA: ", error);
    return {sum, product};
}

}  // namespace

Kernels blocks_cuda_kernels() {
    return {
        {"dw_bnstats", "CUDA", TORCH_BOX(&dw_bnstats_cuda)},
        {"dw_bnstats_backward", "CUDA", TORCH_BOX(&dw_bnstats_backward_cuda)},
        {"bn_act_cat", "CUDA", TORCH_BOX(&bn_act_cat_cuda)},
        {"bn_act_cat_backward", "CUDA", TORCH_BOX(&bn_act_cat_backward_cuda)},
    };
}

}  // namespace spos::bindings
