#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>

#include "csrc/bindings/quantizers.h"
#include "csrc/bindings/tensors.h"
#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/memory.h"
#include "csrc/cpu/quant_codes.h"
#include "csrc/cpu/quantize_weights.h"

namespace spos::bindings {
namespace {

// Zeros of the step vector's shape with the gradients of the entry: the sums times their factor, and, for what acts by
// its magnitude, the sign of the parameter.
Tensor step_gradient(const Tensor& step, const std::vector<double>& sums, double factor, const Selection& selection,
                     bool by_magnitude) {
    const Tensor grad = torch::stable::new_zeros(step, step.sizes());
    const int64_t first = selection.entry * static_cast<int64_t>(sums.size());
    for (size_t c = 0; c < sums.size(); ++c)
        set_value(grad, first + c, sums[c] * factor * (by_magnitude && value_of(step, first + c) < 0 ? -1 : 1));
    return grad;
}

double step_factor(const std::string& mode, const Quantizer& quantizer, int64_t values) {
    if (mode == "pact") return 1 / quantizer.high;
    if (mode == "pact_residual") return 1 / quantizer.high;
    return 1 / std::sqrt(std::max<int64_t>(values, 1) * quantizer.high);
}

bool same_strides(const Tensor& a, const Tensor& b) {
    for (int64_t dim = 0; dim < a.dim(); ++dim)
        if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
    return true;
}

// Whether the elements lie in one block of memory, in the order of some permutation of the dimensions.
bool is_dense(const Tensor& x) {
    std::vector<int64_t> dims;
    for (int64_t dim = 0; dim < x.dim(); ++dim)
        if (x.size(dim) > 1) dims.push_back(dim);
    std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.stride(a) < x.stride(b); });
    int64_t expected = 1;
    for (const int64_t dim : dims) {
        if (x.stride(dim) != expected) return false;
        expected *= x.size(dim);
    }
    return true;
}

// The values in the layout of a dense tensor.
Tensor laid_out_like(const Tensor& values, const Tensor& like) {
    if (same_strides(values, like)) return values;
    Tensor copy = torch::stable::empty_like(like);
    torch::stable::copy_(copy, values);
    return copy;
}

Tensor dense(const Tensor& x) {
    return is_dense(x) ? x : laid_out_like(x, torch::stable::empty_like(x));
}

// Uninitialised, with the shape and strides of a dense tensor, in memory that is kept between calls.
Tensor new_like(const Tensor& x, ScalarType type, int64_t item) {
    const int64_t bytes = std::max<int64_t>(1, x.numel() * item);
    return torch::stable::from_blob(spos::cpu::take_memory(bytes), x.sizes(), x.strides(), x.device(), type,
                                    [bytes](void* memory) { spos::cpu::give_back_memory(memory, bytes); });
}
Tensor new_like(const Tensor& x) {
    const int64_t item = item_size(dtype_of(x, "x"));
    return x.numel() * item < spos::cpu::kLargeBlock ? torch::stable::empty_like(x)
                                                     : new_like(x, x.scalar_type(), item);
}

void check_gradient(const Tensor& grad, const Tensor& x) {
    bool same = grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim();
    for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = grad.size(dim) == x.size(dim);
    STD_TORCH_CHECK(same, "grad must have the dtype and the shape of the values");
}

// --- fake_quant ---

// The arguments as the kernels take them.
struct FakeQuant {
    DType dtype;
    Selection selection;
    Quantizer quantizer;
    Tensor input, step, offset;  // dense; step and offset as given, packed
    spos::cpu::ChannelShape shape;
    Tensor steps, offsets;  // of the entry

    FakeQuant(const Tensor& x, const Tensor& step_vector, const MaybeTensor& offset_vector, const Tensor& bits,
              const Tensor& index, const std::string& mode, bool is_signed, int64_t axis)
        : dtype(dtype_of(x, "x")),
          selection(bits, index),
          quantizer(quantizer_of(mode, is_signed, selection.bits)),
          input(dense(x)),
          shape{1, 1, x.numel()} {
        STD_TORCH_CHECK(axis >= -1 && axis < x.dim(), "axis must be -1 or a dimension of x, got ", axis);
        STD_TORCH_CHECK(offset_vector.has_value() == (mode == "lsq+"),
                        "offset must be given for lsq+ and nothing else");
        if (axis >= 0) shape = {1, x.size(axis), 1};
        if (axis >= 0 && x.size(axis) == 1) shape.inner = x.numel();
        if (axis >= 0 && x.size(axis) > 1 && x.numel() > 0) {
            shape.inner = input.stride(axis);
            shape.outer = x.numel() / (shape.channels * shape.inner);
        }
        step = parameters(step_vector, "step", selection, shape.channels, axis >= 0, dtype);
        steps = effective_steps(step, mode, selection, shape.channels);
        offsets = torch::stable::new_zeros(steps, steps.sizes());
        if (!offset_vector) return;
        offset = parameters(*offset_vector, "offset", selection, shape.channels, axis >= 0, dtype);
        for (int64_t c = 0; c < shape.channels; ++c)
            set_value(offsets, c, value_of(offset, selection.entry * shape.channels + c));
    }
};

Tensor fake_quant_cpu(const Tensor& x, const Tensor& step, const MaybeTensor& offset, const Tensor& bits,
                      const Tensor& index, const std::string& mode, bool is_signed, int64_t axis) {
    const FakeQuant given(x, step, offset, bits, index, mode, is_signed, axis);
    const Tensor out = new_like(given.input);
    if (x.numel() == 0) return out;
    spos::cpu::fake_quant(given.dtype, given.input.const_data_ptr(), given.shape, given.quantizer,
                          given.steps.const_data_ptr(), given.offsets.const_data_ptr(), out.mutable_data_ptr(),
                          parallel_for);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& step,
                                                           const MaybeTensor& offset, const Tensor& bits,
                                                           const Tensor& index, const std::string& mode, bool is_signed,
                                                           int64_t axis) {
    const FakeQuant given(x, step, offset, bits, index, mode, is_signed, axis);
    check_gradient(grad, x);
    const Tensor gradient = laid_out_like(grad, given.input), grad_x = new_like(given.input);
    std::vector<double> step_sums(given.shape.channels), offset_sums(given.shape.channels);
    if (x.numel() > 0)
        spos::cpu::fake_quant_backward(given.dtype, gradient.const_data_ptr(), given.input.const_data_ptr(),
                                       given.shape, given.quantizer, given.steps.const_data_ptr(),
                                       given.offsets.const_data_ptr(), grad_x.mutable_data_ptr(), step_sums.data(),
                                       offset_sums.data(), parallel_for);
    const double factor = step_factor(mode, given.quantizer, given.shape.outer * given.shape.inner);
    const Tensor grad_step = step_gradient(given.step, step_sums, factor, given.selection, true);
    const Tensor grad_offset = offset ? step_gradient(given.offset, offset_sums, factor, given.selection, false)
                                      : torch::stable::new_zeros(step, step.sizes());
    return {grad_x, grad_step, grad_offset};
}

// --- codes of activations ---

std::tuple<Tensor, Tensor> quantize_codes_cpu(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& shift,
                                              const Tensor& step, const Tensor& bits, const Tensor& index,
                                              const std::string& mode) {
    const QuantImage given(x, scale, shift, step, bits, index, mode);
    const Tensor codes = given.image(ScalarType::Byte, 1), used = torch::stable::new_empty(given.step, {});
    const bool numbers = spos::cpu::quantize_codes(
        given.dtype, given.input.const_data_ptr(), given.pixels, given.channels, given.scales, given.shifts,
        given.quantizer, given.size.const_data_ptr(), static_cast<uint8_t*>(codes.mutable_data_ptr()), parallel_for);
    set_value(used, 0, numbers ? value_of(given.size, 0) : std::nan(""));
    return {codes, used};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_codes_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                       const MaybeTensor& scale,
                                                                       const MaybeTensor& shift, const Tensor& step,
                                                                       const Tensor& bits, const Tensor& index,
                                                                       const std::string& mode) {
    const QuantImage given(x, scale, shift, step, bits, index, mode);
    check_gradient(grad, x);
    const Tensor gradient = channels_last(grad);
    const Tensor grad_x = given.image(x.scalar_type(), item_size(given.dtype));
    std::vector<double> step_sum(1), scale_sums(given.channels), shift_sums(given.channels);
    spos::cpu::quantize_codes_backward(given.dtype, gradient.const_data_ptr(), given.input.const_data_ptr(),
                                       given.pixels, given.channels, given.scales, given.shifts, given.quantizer,
                                       given.size.const_data_ptr(), grad_x.mutable_data_ptr(), step_sum.data(),
                                       scale_sums.data(), shift_sums.data(), parallel_for);
    const Tensor grad_step =
        step_gradient(given.step, step_sum, step_factor(mode, given.quantizer, x.numel()), given.selection, true);
    const Tensor grad_scale = torch::stable::new_zeros(given.step, {given.channels});
    const Tensor grad_shift = torch::stable::new_zeros(given.step, {given.channels});
    for (int64_t c = 0; scale && c < given.channels; ++c)
        set_value(grad_scale, c, scale_sums[c]), set_value(grad_shift, c, shift_sums[c]);
    return {grad_x, grad_step, grad_scale, grad_shift};
}

// --- weights ---

// A weight as memory has it: rows of what shares a maximum, or of channels.
struct Weight {
    DType dtype;
    Tensor input;  // dense; the channels outermost where rows are channels
    spos::cpu::WeightShape shape;

    Weight(const Tensor& weight, bool by_channel) : dtype(dtype_of(weight, "weight")), input(dense(weight)) {
        STD_TORCH_CHECK(!by_channel || weight.dim() > 0, "weight must have output channels");
        const int64_t rows = by_channel ? weight.size(0) : 1;
        shape = {rows, rows > 0 ? weight.numel() / rows : 0};
        if (rows > 1 && weight.numel() > 0 && input.stride(0) != shape.columns)
            input = torch::stable::contiguous(weight);
    }

    // A result that lies like `input`, as the result for `weight`.
    Tensor laid_out(const Tensor& result, const Tensor& weight, ScalarType type, int64_t item) const {
        const Tensor like = torch::stable::empty_like(weight);
        if (same_strides(result, like)) return result;
        Tensor out = new_like(like, type, item);
        torch::stable::copy_(out, result);
        return out;
    }
};

Tensor dorefa_weights_cpu(const Tensor& weight, const Tensor& bits, const Tensor& index, bool per_channel, bool) {
    const Selection selection(bits, index);
    const Weight given(weight, per_channel);
    const Tensor out = new_like(given.input);
    if (weight.numel() > 0) {
        const auto extents = spos::cpu::weight_extents(given.dtype, given.input.const_data_ptr(), given.shape,
                                                       per_channel, parallel_for);
        spos::cpu::dorefa(given.dtype, given.input.const_data_ptr(), given.shape, extents, selection.bits,
                          out.mutable_data_ptr(), parallel_for);
    }
    return given.laid_out(out, weight, weight.scalar_type(), item_size(given.dtype));
}

Tensor dorefa_weights_backward_cpu(const Tensor& grad, const Tensor& weight, const Tensor& bits, const Tensor& index,
                                   bool per_channel, bool detach_max) {
    const Selection selection(bits, index);
    const Weight given(weight, per_channel);
    check_gradient(grad, weight);
    Tensor out = new_like(given.input);
    if (selection.bits == 1) {
        torch::stable::copy_(out, grad);
    } else if (weight.numel() > 0) {
        const Tensor gradient = laid_out_like(grad, given.input);
        spos::cpu::dorefa_backward(given.dtype, gradient.const_data_ptr(), given.input.const_data_ptr(), given.shape,
                                   per_channel, detach_max, out.mutable_data_ptr(), parallel_for);
    }
    return given.laid_out(out, weight, weight.scalar_type(), item_size(given.dtype));
}

std::tuple<Tensor, Tensor> weight_codes_cpu(const Tensor& weight, const MaybeTensor& step, const Tensor& bits,
                                            const Tensor& index, const std::string& mode, bool per_channel) {
    const Selection selection(bits, index);
    const Weight given(weight, true);
    STD_TORCH_CHECK(weight.numel() > 0, "weight must not be empty");
    STD_TORCH_CHECK(mode == "dorefa" || mode == "lsq", "mode must be dorefa or lsq, got ", mode);
    STD_TORCH_CHECK(step.has_value() == (mode == "lsq"), "step must be given for lsq and for nothing else");
    const int64_t channels = given.shape.rows;
    const Tensor codes = new_like(given.input, ScalarType::Char, 1);
    const Tensor scale = torch::stable::new_empty(weight, {channels}, statistics_type(given.dtype));
    const void* values = given.input.const_data_ptr();
    int8_t* to = static_cast<int8_t*>(codes.mutable_data_ptr());
    const auto numbers = std::make_unique<bool[]>(channels);
    std::vector<double> scales(channels);
    if (step) {
        const int64_t steps = per_channel ? channels : 1;
        const Tensor vectors = parameters(*step, "step", selection, channels, per_channel, given.dtype);
        const Tensor own = effective_steps(vectors, mode, selection, steps);
        spos::cpu::step_codes(given.dtype, values, given.shape, quantizer_of(mode, true, selection.bits),
                              own.const_data_ptr(), per_channel, to, numbers.get(), parallel_for);
        for (int64_t c = 0; c < channels; ++c) scales[c] = value_of(own, per_channel ? c : 0);
    } else {
        const auto extents = spos::cpu::weight_extents(given.dtype, values, given.shape, per_channel, parallel_for);
        spos::cpu::dorefa_codes(given.dtype, values, given.shape, extents, selection.bits, to, numbers.get(),
                                parallel_for);
        const int64_t shared = per_channel ? given.shape.columns : weight.numel();
        for (int64_t c = 0; c < channels; ++c)
            scales[c] = (selection.bits == 8 ? 2 : 1) *
                        spos::cpu::dorefa_scale(given.dtype, extents[per_channel ? c : 0], shared, selection.bits);
    }
    for (int64_t c = 0; c < channels; ++c) set_value(scale, c, numbers[c] ? scales[c] : std::nan(""));
    return {given.laid_out(codes, weight, ScalarType::Char, 1), scale};
}

}  // namespace

Kernels quant_kernels() {
    return {
        {"dorefa_weights", "CPU", TORCH_BOX(&dorefa_weights_cpu)},
        {"dorefa_weights_backward", "CPU", TORCH_BOX(&dorefa_weights_backward_cpu)},
        {"fake_quant", "CPU", TORCH_BOX(&fake_quant_cpu)},
        {"fake_quant_backward", "CPU", TORCH_BOX(&fake_quant_backward_cpu)},
        {"quantize_codes", "CPU", TORCH_BOX(&quantize_codes_cpu)},
        {"quantize_codes_backward", "CPU", TORCH_BOX(&quantize_codes_backward_cpu)},
        {"weight_codes", "CPU", TORCH_BOX(&weight_codes_cpu)},
    };
}

}  // namespace spos::bindings
