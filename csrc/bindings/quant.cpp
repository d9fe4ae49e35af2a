#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>

#include "csrc/bindings/tensors.h"
#include "csrc/cpu/fake_quant.h"
#include "csrc/cpu/memory.h"
#include "csrc/cpu/quant_codes.h"
#include "csrc/cpu/quantize_weights.h"

namespace spos::bindings {
namespace {

using MaybeTensor = std::optional<Tensor>;
using spos::cpu::Quantizer;

constexpr double kMinStep = 1.0 / (1 << 24);

// The entry that the index picks, and its bit-width.
struct Selection {
    int64_t entry, bits, entries;

    Selection(const Tensor& all, const Tensor& index) : entries(all.dim() == 1 ? all.size(0) : 0) {
        STD_TORCH_CHECK(all.dim() == 1 && all.scalar_type() == ScalarType::Int, "bits must be an int32 tensor [K]");
        STD_TORCH_CHECK(index.dim() == 0, "index must be a tensor without dimensions");
        const bool is_long = index.scalar_type() == ScalarType::Long;
        STD_TORCH_CHECK(is_long || index.scalar_type() == ScalarType::Int, "index must be int32 or int64");
        const void* at = index.const_data_ptr();
        entry = is_long ? *static_cast<const int64_t*>(at) : *static_cast<const int32_t*>(at);
        STD_TORCH_CHECK(entry >= 0 && entry < entries, "index must be from 0 to ", entries - 1, ", got ", entry);
        bits = static_cast<const int32_t*>(all.const_data_ptr())[entry * all.stride(0)];
        STD_TORCH_CHECK(bits >= 1 && bits <= 8, "bits must be from 1 to 8, got ", bits);
    }
};

bool is_pact(const std::string& mode) {
    return mode == "pact" || mode == "pact_residual";
}

Quantizer quantizer_of(const std::string& mode, bool is_signed, int64_t bits) {
    STD_TORCH_CHECK(is_pact(mode) || mode == "lsq" || mode == "lsq+",
                    "mode must be pact, pact_residual, lsq or lsq+, got ", mode);
    STD_TORCH_CHECK(!is_signed || !is_pact(mode), "signed must be False for ", mode);
    const double levels = 1 << bits;
    if (!is_signed) return {0, levels - 1, false, mode != "pact"};
    return {-levels / 2, bits == 1 ? 1 : levels / 2 - 1, bits == 1, true};
}

// A float or a double of the computation.
double value_of(const Tensor& values, int64_t at) {
    return values.scalar_type() == ScalarType::Double ? static_cast<const double*>(values.const_data_ptr())[at]
                                                      : static_cast<const float*>(values.const_data_ptr())[at];
}
void set_value(const Tensor& values, int64_t at, double value) {
    if (values.scalar_type() == ScalarType::Double)
        static_cast<double*>(values.mutable_data_ptr())[at] = value;
    else
        static_cast<float*>(values.mutable_data_ptr())[at] = static_cast<float>(value);
}

// Vectors of parameters, [K] or [K, channels] in the type of the computation, packed.
Tensor parameters(const Tensor& values, const char* name, const Selection& selection, int64_t channels, bool each,
                  DType dtype) {
    STD_TORCH_CHECK(values.scalar_type() == statistics_type(dtype), name,
                    " must be float32, or float64 for float64 values");
    const bool fits = each ? values.dim() == 2 && values.size(1) == channels : values.dim() == 1;
    STD_TORCH_CHECK(fits && values.size(0) == selection.entries, name, " must be [", selection.entries,
                    each ? ", channels]" : "]");
    return torch::stable::contiguous(values);
}

// The steps of the entry, [channels] of the type of the computation: positive.
Tensor effective_steps(const Tensor& step, const std::string& mode, const Selection& selection, int64_t channels) {
    const Tensor steps = torch::stable::new_empty(step, {channels});
    const int64_t n = (1 << selection.bits) - 1;
    auto fill = [&](auto* to) {
        using A = std::remove_pointer_t<decltype(to)>;
        const A* from = static_cast<const A*>(step.const_data_ptr()) + selection.entry * channels;
        for (int64_t c = 0; c < channels; ++c) {
            const A size = is_pact(mode) ? std::fabs(from[c]) / A(n) : std::fabs(from[c]);
            to[c] = size < A(kMinStep) ? A(kMinStep) : size;
        }
    };
    if (step.scalar_type() == ScalarType::Double)
        fill(static_cast<double*>(steps.mutable_data_ptr()));
    else
        fill(static_cast<float*>(steps.mutable_data_ptr()));
    return steps;
}

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

struct Image {
    DType dtype;
    Selection selection;
    Quantizer quantizer;
    Tensor input, step, size;  // channels last; the vector, packed; the step of the entry, [1]
    int64_t channels, pixels;
    Tensor scale, shift;
    const void *scales = nullptr, *shifts = nullptr;

    Image(const Tensor& x, const MaybeTensor& scale_vector, const MaybeTensor& shift_vector, const Tensor& step_vector,
          const Tensor& bits, const Tensor& index, const std::string& mode)
        : dtype(dtype_of(x, "x")), selection(bits, index), quantizer(quantizer_of(mode, false, selection.bits)) {
        STD_TORCH_CHECK(mode != "lsq+", "mode must be pact, pact_residual or lsq, got lsq+");
        STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W] and hold at least one value");
        input = channels_last(x);
        channels = x.size(1);
        pixels = x.numel() / channels;
        step = parameters(step_vector, "step", selection, 1, false, dtype);
        size = effective_steps(step, mode, selection, 1);
        STD_TORCH_CHECK(scale_vector.has_value() == shift_vector.has_value(),
                        "scale and shift must be given both or not at all");
        if (!scale_vector) return;
        scale = per_channel(*scale_vector, "scale"), shift = per_channel(*shift_vector, "shift");
        scales = scale.const_data_ptr(), shifts = shift.const_data_ptr();
    }

    Tensor per_channel(const Tensor& values, const char* name) const {
        STD_TORCH_CHECK(values.scalar_type() == statistics_type(dtype), name,
                        " must be float32, or float64 for float64 images");
        STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == channels, name, " must be [", channels, "]");
        return torch::stable::contiguous(values);
    }

    // Uninitialised, [N, C, H, W], channels last.
    Tensor image(ScalarType type, int64_t item) const {
        const int64_t n = input.size(0), h = input.size(2), w = input.size(3), bytes = pixels * channels * item;
        return torch::stable::from_blob(spos::cpu::take_memory(bytes), {n, channels, h, w},
                                        {h * w * channels, 1, w * channels, channels}, input.device(), type,
                                        [bytes](void* memory) { spos::cpu::give_back_memory(memory, bytes); });
    }
};

std::tuple<Tensor, Tensor> quantize_codes_cpu(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& shift,
                                              const Tensor& step, const Tensor& bits, const Tensor& index,
                                              const std::string& mode) {
    const Image given(x, scale, shift, step, bits, index, mode);
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
    const Image given(x, scale, shift, step, bits, index, mode);
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

DType dtype_named(ScalarType type) {
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                        type == ScalarType::BFloat16,
                    "dtype must be float32, float64, float16 or bfloat16");
    return type == ScalarType::Double     ? DType::float64
           : type == ScalarType::Half     ? DType::float16
           : type == ScalarType::BFloat16 ? DType::bfloat16
                                          : DType::float32;
}

Tensor dequantize_codes_cpu(const Tensor& codes, const Tensor& step, ScalarType type) {
    const DType dtype = dtype_named(type);
    STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte, "codes must be uint8");
    STD_TORCH_CHECK(step.dim() == 0 && step.scalar_type() == statistics_type(dtype),
                    "step must be float32 (float64 for float64 values) and without dimensions");
    const Tensor input = dense(codes), values = new_like(input, type, item_size(dtype));
    spos::cpu::dequantize_codes(dtype, static_cast<const uint8_t*>(input.const_data_ptr()), input.numel(),
                                step.const_data_ptr(), values.mutable_data_ptr(), parallel_for);
    return values;
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
        {"dequantize_codes", "CPU", TORCH_BOX(&dequantize_codes_cpu)},
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
