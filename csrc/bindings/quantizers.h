// What the bindings of quantizing ops share: bit-widths, steps, and images to be quantized.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "csrc/bindings/tensors.h"
#include "csrc/cpu/memory.h"
#include "csrc/cpu/quantizer.h"

namespace spos::bindings {

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

inline bool is_pact(const std::string& mode) {
    return mode == "pact" || mode == "pact_residual";
}

inline Quantizer quantizer_of(const std::string& mode, bool is_signed, int64_t bits) {
    STD_TORCH_CHECK(is_pact(mode) || mode == "lsq" || mode == "lsq+",
                    "mode must be pact, pact_residual, lsq or lsq+, got ", mode);
    STD_TORCH_CHECK(!is_signed || !is_pact(mode), "signed must be False for ", mode);
    const double levels = 1 << bits;
    if (!is_signed) return {0, levels - 1, false, mode != "pact"};
    return {-levels / 2, bits == 1 ? 1 : levels / 2 - 1, bits == 1, true};
}

// A float or a double of the computation.
inline double value_of(const Tensor& values, int64_t at) {
    return values.scalar_type() == ScalarType::Double ? static_cast<const double*>(values.const_data_ptr())[at]
                                                      : static_cast<const float*>(values.const_data_ptr())[at];
}
inline void set_value(const Tensor& values, int64_t at, double value) {
    if (values.scalar_type() == ScalarType::Double)
        static_cast<double*>(values.mutable_data_ptr())[at] = value;
    else
        static_cast<float*>(values.mutable_data_ptr())[at] = static_cast<float>(value);
}

// Vectors of parameters, [K] or [K, channels] in the type of the computation, packed.
inline Tensor parameters(const Tensor& values, const char* name, const Selection& selection, int64_t channels,
                         bool each, DType dtype) {
    STD_TORCH_CHECK(values.scalar_type() == statistics_type(dtype), name,
                    " must be float32, or float64 for float64 values");
    const bool fits = each ? values.dim() == 2 && values.size(1) == channels : values.dim() == 1;
    STD_TORCH_CHECK(fits && values.size(0) == selection.entries, name, " must be [", selection.entries,
                    each ? ", channels]" : "]");
    return torch::stable::contiguous(values);
}

// The steps of the entry, [channels] of the type of the computation: positive.
inline Tensor effective_steps(const Tensor& step, const std::string& mode, const Selection& selection,
                              int64_t channels) {
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

// Activations, as what quantizes them takes them.
struct QuantImage {
    DType dtype;
    Selection selection;
    Quantizer quantizer;
    Tensor input, step, size;  // channels last; the vector, packed; the step of the entry, [1]
    int64_t channels, pixels;
    Tensor scale, shift;
    const void *scales = nullptr, *shifts = nullptr;

    QuantImage(const Tensor& x, const MaybeTensor& scale_vector, const MaybeTensor& shift_vector,
               const Tensor& step_vector, const Tensor& bits, const Tensor& index, const std::string& mode)
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

}  // namespace spos::bindings
