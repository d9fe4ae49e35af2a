// The quantization ops on CUDA. Only compiled where CUDA is.
#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include "csrc/bindings/images.h"
#include "kernels/cuda/fake_quant.h"
#include "kernels/cuda/quantize_codes.h"
#include "kernels/cuda/quantize_weights.h"

namespace spos::bindings {
namespace {

using spos::cuda::BitChoice, spos::cuda::QuantMode, spos::cuda::QuantShape, spos::cuda::StepChoice;

// Whether the values are one run of memory, in whatever order of the dimensions.
bool is_dense(const Tensor& x) {
    std::vector<int64_t> order(x.dim());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) < x.stride(b); });
    int64_t expected = 1;
    for (const int64_t dim : order) {
        if (x.size(dim) == 1) continue;
        if (x.stride(dim) != expected) return false;
        expected *= x.size(dim);
    }
    return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
    for (int64_t dim = 0; dim < a.dim(); ++dim)
        if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
    return true;
}

// As torch.empty_like, which keeps dimensions in their order in memory.
Tensor empty_codes_like(const Tensor& x) {
    std::array<StableIValue, 6> stack{
        torch::stable::detail::from(x),
        torch::stable::detail::from(std::optional<ScalarType>(ScalarType::Char)),
        torch::stable::detail::from(std::nullopt),
        torch::stable::detail::from(std::nullopt),
        torch::stable::detail::from(std::nullopt),
        torch::stable::detail::from(std::nullopt),
    };
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// The tensor itself if it lies as `like`, which is dense; else a copy that does.
Tensor laid_out_as(const Tensor& x, const Tensor& like) {
    if (same_layout(x, like)) return x;
    Tensor copy = torch::stable::empty_like(like);
    torch::stable::copy_(copy, x);
    return copy;
}

// The tensor itself if it is dense; else a dense copy, in the layout of what empty_like gives for it.
Tensor dense(const Tensor& x) {
    return is_dense(x) ? x : laid_out_as(x, torch::stable::empty_like(x));
}

// How a dense tensor lies in memory, seen from an axis; with axis -1 all of it is one channel.
QuantShape shape_along(const Tensor& x, int64_t axis) {
    if (axis < 0 || x.size(axis) == 1) return {1, 1, x.numel()};
    const int64_t inner = x.stride(axis), channels = x.size(axis);
    return {x.numel() / (channels * inner), channels, inner};
}

QuantMode mode_of(const std::string& mode) {
    if (mode == "pact") return QuantMode::pact;
    if (mode == "pact_residual") return QuantMode::pact_residual;
    STD_TORCH_CHECK(mode == "lsq" || mode == "lsq+", "mode must be pact, pact_residual, lsq or lsq+, got ", mode);
    return QuantMode::lsq;
}

// One of the bit-widths, and the steps that go with them; the tensors live as long as this does.
class Given {
  public:
    Given(const Tensor& x, const Tensor& bits, const Tensor& index)
        : x_(x), bits_(torch::stable::contiguous(bits)), index_(index) {
        STD_TORCH_CHECK(bits.dim() == 1 && bits.size(0) > 0 && bits.scalar_type() == ScalarType::Int,
                        "bits must be int32 [K]");
        const bool wide = index.scalar_type() == ScalarType::Long;
        STD_TORCH_CHECK(index.dim() == 0 && (wide || index.scalar_type() == ScalarType::Int),
                        "index must be an int32 or int64 tensor without dimensions");
        check_device(bits, "bits");
        check_device(index, "index");
        choice_.bits = {static_cast<const int32_t*>(bits_.const_data_ptr()), index.const_data_ptr(), wide,
                        static_cast<int>(bits.size(0))};
    }

    // channels: none for a single step.
    void set_step(const Tensor& step, const std::optional<Tensor>& offset, std::optional<int64_t> channels,
                  const std::string& mode, bool signed_codes) {
        step_ = checked_vector(step, "step", channels);
        if (offset) offset_ = checked_vector(*offset, "offset", channels);
        choice_.step = step_->const_data_ptr();
        choice_.offset = offset_ ? offset_->const_data_ptr() : nullptr;
        choice_.channels = static_cast<int>(channels.value_or(1));
        choice_.mode = mode_of(mode);
        choice_.signed_codes = signed_codes;
    }

    const StepChoice& choice() const { return choice_; }
    Tensor new_vector(int64_t size) const {
        return torch::stable::new_empty(x_, {size}, statistics_type(dtype_of(x_, "x")));
    }

    // [channels] in the dtype of steps, or null.
    const void* affine(const std::optional<Tensor>& value, const char* name, int64_t channels,
                       std::optional<Tensor>& packed) const {
        if (!value) return nullptr;
        STD_TORCH_CHECK(value->scalar_type() == statistics_type(dtype_of(x_, "x")) && value->dim() == 1 &&
                            value->size(0) == channels,
                        name, " must be [", channels, "], float32, or float64 for float64 images");
        check_device(*value, name);
        packed = torch::stable::contiguous(*value);
        return packed->const_data_ptr();
    }

  private:
    void check_device(const Tensor& value, const char* name) const {
        STD_TORCH_CHECK(value.get_device_index() == x_.get_device_index(), name,
                        " must be on the device of the values");
    }

    Tensor checked_vector(const Tensor& value, const char* name, std::optional<int64_t> channels) const {
        STD_TORCH_CHECK(value.scalar_type() == statistics_type(dtype_of(x_, "x")), name,
                        " must be float32, or float64 for float64 values");
        const int64_t choices = choice_.bits.choices;
        const bool fits =
            value.dim() == (channels ? 2 : 1) && value.size(0) == choices && (!channels || value.size(1) == *channels);
        STD_TORCH_CHECK(fits, name, " must have an entry for each of the ", choices, " bit-widths, and each channel");
        check_device(value, name);
        return torch::stable::contiguous(value);
    }

    Tensor x_, bits_, index_;
    std::optional<Tensor> step_, offset_;
    StepChoice choice_{};
};

Tensor new_workspace(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

void check_grad(const Tensor& grad, const Tensor& x) {
    bool same = grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() &&
                grad.get_device_index() == x.get_device_index();
    for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = grad.size(dim) == x.size(dim);
    STD_TORCH_CHECK(same, "grad must have the shape, dtype and device of the values");
}

void set_fake_quant_step(Given& given, const Tensor& x, const Tensor& step, const std::optional<Tensor>& offset,
                         const std::string& mode, bool signed_codes, int64_t axis) {
    STD_TORCH_CHECK(axis < x.dim(), "axis must be a dimension of x, got ", axis);
    given.set_step(step, offset, axis < 0 ? std::nullopt : std::optional(x.size(axis)), mode, signed_codes);
}

Tensor fake_quant_cuda(const Tensor& x, const Tensor& step, const std::optional<Tensor>& offset, const Tensor& bits,
                       const Tensor& index, const std::string& mode, bool signed_codes, int64_t axis) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Given given(x, bits, index);
    set_fake_quant_step(given, x, step, offset, mode, signed_codes, axis);
    const Tensor values = dense(x), out = torch::stable::empty_like(values);
    if (x.numel() == 0) return out;
    const spos::cuda::FakeQuant call{dtype_of(x, "x"), shape_along(values, axis), given.choice(),
                                     values.const_data_ptr()};
    const char* error = spos::cuda::fake_quant(call, out.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "fake_quant on CUDA: ", error);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& step,
                                                            const std::optional<Tensor>& offset, const Tensor& bits,
                                                            const Tensor& index, const std::string& mode,
                                                            bool signed_codes, int64_t axis) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_grad(grad, x);
    Given given(x, bits, index);
    set_fake_quant_step(given, x, step, offset, mode, signed_codes, axis);
    const Tensor values = dense(x), grad_x = torch::stable::empty_like(values);
    if (x.numel() == 0) {
        const auto type = step.scalar_type();
        return {grad_x, torch::stable::new_zeros(step, step.sizes(), type),
                torch::stable::new_zeros(step, step.sizes(), type)};
    }
    const Tensor grad_step = torch::stable::new_empty(step, step.sizes());
    const Tensor grad_offset = torch::stable::new_empty(step, step.sizes());
    const Tensor incoming = laid_out_as(grad, values);
    const spos::cuda::FakeQuant call{dtype_of(x, "x"), shape_along(values, axis), given.choice(),
                                     values.const_data_ptr()};
    const Tensor workspace = new_workspace(x, spos::cuda::fake_quant_backward_workspace_bytes(call));
    const char* error = spos::cuda::fake_quant_backward(call, incoming.const_data_ptr(), workspace.mutable_data_ptr(),
                                                        grad_x.mutable_data_ptr(), grad_step.mutable_data_ptr(),
                                                        grad_offset.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "fake_quant_backward on CUDA: ", error);
    return {grad_x, grad_step, grad_offset};
}

// A dense weight as the kernels read it.
spos::cuda::Weights weights_of(const Tensor& weight, bool per_channel) {
    STD_TORCH_CHECK(weight.dim() > 0 || !per_channel, "weight must have output channels for per_channel");
    return {dtype_of(weight, "weight"), shape_along(weight, weight.dim() > 0 ? 0 : -1), per_channel,
            weight.const_data_ptr()};
}

Tensor dorefa_weights_cuda(const Tensor& weight, const Tensor& bits, const Tensor& index, bool per_channel, bool) {
    const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
    const Given given(weight, bits, index);
    const Tensor values = dense(weight), out = torch::stable::empty_like(values);
    if (weight.numel() == 0) return out;
    const spos::cuda::Weights weights = weights_of(values, per_channel);
    const Tensor workspace = new_workspace(weight, spos::cuda::weights_workspace_bytes(weights));
    const char* error = spos::cuda::dorefa_weights(weights, given.choice().bits, workspace.mutable_data_ptr(),
                                                   out.mutable_data_ptr(), current_stream(weight));
    STD_TORCH_CHECK(error == nullptr, "dorefa_weights on CUDA: ", error);
    return out;
}

Tensor dorefa_weights_backward_cuda(const Tensor& grad, const Tensor& weight, const Tensor& bits, const Tensor& index,
                                    bool per_channel, bool detach_max) {
    const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
    check_grad(grad, weight);
    const Given given(weight, bits, index);
    const Tensor values = dense(weight), out = torch::stable::empty_like(values);
    if (weight.numel() == 0) return out;
    const Tensor incoming = laid_out_as(grad, values);
    const spos::cuda::Weights weights = weights_of(values, per_channel);
    const Tensor workspace = new_workspace(weight, spos::cuda::weights_workspace_bytes(weights));
    const char* error = spos::cuda::dorefa_weights_backward(weights, given.choice().bits, detach_max,
                                                            incoming.const_data_ptr(), workspace.mutable_data_ptr(),
                                                            out.mutable_data_ptr(), current_stream(weight));
    STD_TORCH_CHECK(error == nullptr, "dorefa_weights_backward on CUDA: ", error);
    return out;
}

std::tuple<Tensor, Tensor> weight_codes_cuda(const Tensor& weight, const std::optional<Tensor>& step,
                                             const Tensor& bits, const Tensor& index, const std::string& mode,
                                             bool per_channel) {
    const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
    STD_TORCH_CHECK(weight.dim() > 0 && weight.numel() > 0, "weight must be [C_out, ...] and not empty");
    STD_TORCH_CHECK(mode == "dorefa" || mode == "lsq", "mode must be dorefa or lsq, got ", mode);
    STD_TORCH_CHECK(step.has_value() == (mode == "lsq"), "step must be given for lsq and for nothing else");
    Given given(weight, bits, index);
    if (step)
        given.set_step(*step, std::nullopt, per_channel ? std::optional(weight.size(0)) : std::nullopt, mode, true);
    const Tensor values = dense(weight), codes = empty_codes_like(values), scale = given.new_vector(weight.size(0));
    const spos::cuda::Weights weights = weights_of(values, per_channel);
    const Tensor workspace = new_workspace(weight, spos::cuda::weights_workspace_bytes(weights));
    const char* error = spos::cuda::weight_codes(weights, given.choice(), workspace.mutable_data_ptr(),
                                                 static_cast<int8_t*>(codes.mutable_data_ptr()),
                                                 scale.mutable_data_ptr(), current_stream(weight));
    STD_TORCH_CHECK(error == nullptr, "weight_codes on CUDA: ", error);
    return {codes, scale};
}

// What both passes of quantize_codes read, and its tensors alive as long as they do.
struct CodesArguments {
    Image image;
    Given given;
    std::optional<Tensor> scales, shifts;
    spos::cuda::QuantizeCodes call;

    CodesArguments(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                   const Tensor& step, const Tensor& bits, const Tensor& index, const std::string& mode)
        : image(x), given(x, bits, index) {
        const int64_t channels = x.size(1);
        STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift must be given both, or none");
        given.set_step(step, std::nullopt, std::nullopt, mode, false);
        const void* scale_data = given.affine(scale, "scale", channels, scales);
        const void* shift_data = given.affine(shift, "shift", channels, shifts);
        call = {dtype_of(x, "x"), image.pixels(), channels,   image.data(),
                image.pitch,      scale_data,     shift_data, given.choice()};
    }
};

void check_image(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W] and not empty");
}

std::tuple<Tensor, Tensor> quantize_codes_cuda(const Tensor& x, const std::optional<Tensor>& scale,
                                               const std::optional<Tensor>& shift, const Tensor& step,
                                               const Tensor& bits, const Tensor& index, const std::string& mode) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_image(x);
    const CodesArguments arguments(x, scale, shift, step, bits, index, mode);
    const Tensor codes =
        torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Byte, std::nullopt, x.device(),
                             std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
    const Tensor step_used = torch::stable::new_empty(step, {});
    const char* error = spos::cuda::quantize_codes(arguments.call, static_cast<uint8_t*>(codes.mutable_data_ptr()),
                                                   step_used.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "quantize_codes on CUDA: ", error);
    return {codes, step_used};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_codes_backward_cuda(const Tensor& grad, const Tensor& x,
                                                                        const std::optional<Tensor>& scale,
                                                                        const std::optional<Tensor>& shift,
                                                                        const Tensor& step, const Tensor& bits,
                                                                        const Tensor& index, const std::string& mode) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_image(x);
    check_grad(grad, x);
    const CodesArguments arguments(x, scale, shift, step, bits, index, mode);
    const Image incoming(grad);
    const Tensor grad_x = empty_channels_last(x, x.size(0), x.size(1), x.size(2), x.size(3));
    const Tensor grad_step = torch::stable::new_empty(step, step.sizes());
    const Tensor grad_scale = arguments.given.new_vector(x.size(1)), grad_shift = arguments.given.new_vector(x.size(1));
    const Tensor workspace = new_workspace(x, spos::cuda::quantize_codes_backward_workspace_bytes(arguments.call));
    const char* error = spos::cuda::quantize_codes_backward(
        arguments.call, incoming.data(), incoming.pitch, workspace.mutable_data_ptr(), grad_x.mutable_data_ptr(),
        grad_step.mutable_data_ptr(), grad_scale.mutable_data_ptr(), grad_shift.mutable_data_ptr(), current_stream(x));
    STD_TORCH_CHECK(error == nullptr, "quantize_codes_backward on CUDA: ", error);
    return {grad_x, grad_step, grad_scale, grad_shift};
}

}  // namespace

Kernels quantization_cuda_kernels() {
    return {
        {"fake_quant", "CUDA", TORCH_BOX(&fake_quant_cuda)},
        {"fake_quant_backward", "CUDA", TORCH_BOX(&fake_quant_backward_cuda)},
        {"dorefa_weights", "CUDA", TORCH_BOX(&dorefa_weights_cuda)},
        {"dorefa_weights_backward", "CUDA", TORCH_BOX(&dorefa_weights_backward_cuda)},
        {"quantize_codes", "CUDA", TORCH_BOX(&quantize_codes_cuda)},
        {"quantize_codes_backward", "CUDA", TORCH_BOX(&quantize_codes_backward_cuda)},
        {"weight_codes", "CUDA", TORCH_BOX(&weight_codes_cuda)},
    };
}

}  // namespace spos::bindings
