#include <tuple>

#include "csrc/bindings/cpu_memory.h"
#include "csrc/bindings/groups.h"
#include "csrc/cpu/bn_moments.h"
#include "csrc/cpu/bn_normalize.h"
#ifdef SPOS_FAST_WITH_CUDA
#include "kernels/cuda/bn_moments.h"
#include "kernels/cuda/bn_normalize.h"
#endif

namespace spos::bindings {
namespace {

bool has_neighbouring_channels(const Tensor& x) {
    return x.size(1) > 1 && x.stride(1) == 1;
}

// What x [N, C, H, W] looks like in memory, if the kernels can read it where it lies: packed, or a slice of the
// channels of something packed. The stride of a dimension of size 1 says nothing and is not looked at.
bool read_layout(const Tensor& x, MomentsShape& shape) {
    const auto size = x.sizes(), stride = x.strides();
    const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
    auto is = [&](int dim, int64_t expected) { return size[dim] == 1 || stride[dim] == expected; };

    const int64_t pixel = w > 1 ? stride[3] : h > 1 ? stride[2] : n > 1 ? stride[0] : c;
    if (has_neighbouring_channels(x) && pixel >= c && is(2, w * pixel) && is(0, h * w * pixel)) {
        shape.channels_last = true;
        shape.pitch = pixel;
        return true;
    }
    const int64_t sample = n > 1 ? stride[0] : c * h * w;
    if (is(3, 1) && is(2, w) && is(1, h * w) && sample >= c * h * w) {
        shape.channels_last = false;
        shape.pitch = sample;
        return true;
    }
    return false;
}

// Checks x and groups; returns the tensor to read (x, or one packed copy, channels last where they are neighbours) and
// fills in its shape.
Tensor checked_input(const Tensor& x, int64_t groups, MomentsShape& shape) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.numel() > 0, "x must hold at least one value in each channel, got none");
    STD_TORCH_CHECK(groups >= 1 && x.size(0) % groups == 0, "groups must divide the batch of ", x.size(0),
                    " samples, got ", groups);
    shape.groups = groups;
    shape.samples = x.size(0) / groups;
    shape.channels = x.size(1);
    shape.pixels = x.size(2) * x.size(3);
    if (read_layout(x, shape)) return x;
    Tensor packed = has_neighbouring_channels(x) ? channels_last(x) : torch::stable::contiguous(x);
    read_layout(packed, shape);
    return packed;
}

std::tuple<Tensor, Tensor> moments_outputs(const Tensor& x, int64_t groups, DType dtype) {
    const auto type = dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
    return {torch::stable::new_empty(x, {groups, x.size(1)}, type),
            torch::stable::new_empty(x, {groups, x.size(1)}, type)};
}

std::tuple<Tensor, Tensor> bn_moments_cpu(const Tensor& x, int64_t groups) {
    MomentsShape shape;
    const DType dtype = dtype_of(x, "x");
    const Tensor input = checked_input(x, groups, shape);
    auto [mean, m2] = moments_outputs(input, groups, dtype);
    spos::cpu::bn_moments(dtype, input.const_data_ptr(), shape, mean.mutable_data_ptr(), m2.mutable_data_ptr(),
                          parallel_for);
    return {mean, m2};
}

Tensor bn_normalize_cpu(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, int64_t groups) {
    MomentsShape shape;
    const DType dtype = dtype_of(x, "x");
    const Tensor input = checked_input(x, groups, shape);
    const Tensor scales = per_group(scale, "scale", x, groups), shifts = per_group(shift, "shift", x, groups);
    const Tensor out = kept_image(x, x.size(0), x.size(1), x.size(2), x.size(3), shape.channels_last);
    spos::cpu::bn_normalize(dtype, input.const_data_ptr(), shape, scales.const_data_ptr(), shifts.const_data_ptr(),
                            relu, out.mutable_data_ptr(), parallel_for);
    return out;
}

#ifdef SPOS_FAST_WITH_CUDA
std::tuple<Tensor, Tensor> bn_moments_cuda(const Tensor& x, int64_t groups) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    MomentsShape shape;
    const DType dtype = dtype_of(x, "x");
    const Tensor input = checked_input(x, groups, shape);
    auto [mean, m2] = moments_outputs(input, groups, dtype);
    const Tensor workspace =
        torch::stable::new_empty(input, {spos::cuda::bn_moments_workspace_bytes(dtype, shape)}, ScalarType::Byte);
    const char* error = spos::cuda::bn_moments(dtype, input.const_data_ptr(), shape, workspace.mutable_data_ptr(),
                                               mean.mutable_data_ptr(), m2.mutable_data_ptr(), current_stream(input));
    STD_TORCH_CHECK(error == nullptr, "bn_moments on CUDA: ", error);
    return {mean, m2};
}

Tensor bn_normalize_cuda(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, int64_t groups) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    MomentsShape shape;
    const DType dtype = dtype_of(x, "x");
    const Tensor input = checked_input(x, groups, shape);
    const Tensor scales = per_group(scale, "scale", x, groups), shifts = per_group(shift, "shift", x, groups);
    const Tensor out = shape.channels_last ? empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3))
                                           : torch::stable::new_empty(x, x.sizes());
    const char* error =
        spos::cuda::bn_normalize(dtype, input.const_data_ptr(), shape, scales.const_data_ptr(), shifts.const_data_ptr(),
                                 relu, out.mutable_data_ptr(), current_stream(input));
    STD_TORCH_CHECK(error == nullptr, "bn_normalize on CUDA: ", error);
    return out;
}
#endif

}  // namespace

Kernels batchnorm_kernels() {
    return {
        {"bn_moments", "CPU", TORCH_BOX(&bn_moments_cpu)},
        {"bn_normalize", "CPU", TORCH_BOX(&bn_normalize_cpu)},
#ifdef SPOS_FAST_WITH_CUDA
        {"bn_moments", "CUDA", TORCH_BOX(&bn_moments_cuda)},
        {"bn_normalize", "CUDA", TORCH_BOX(&bn_normalize_cuda)},
#endif
    };
}

}  // namespace spos::bindings
