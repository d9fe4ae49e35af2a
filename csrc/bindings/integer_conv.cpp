#include "csrc/cpu/integer_conv.h"

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/bindings/cpu_memory.h"
#include "csrc/bindings/quantizers.h"
#include "csrc/bindings/tensors.h"

namespace spos::bindings {
namespace {

Tensor pack_codes_cpu(const Tensor& codes) {
    STD_TORCH_CHECK(codes.dim() == 4 && codes.scalar_type() == ScalarType::Char, "codes must be int8 [O, C, kh, kw]");
    const int64_t out = codes.size(0), in = codes.size(1), height = codes.size(2), width = codes.size(3);
    STD_TORCH_CHECK(codes.numel() > 0 && out % 16 == 0 && in % 4 == 0,
                    "codes must have a multiple of 16 output channels and of 4 input channels, got ", out, " and ", in);
    const Tensor from = packed(codes);
    const Tensor to = torch::stable::new_empty(codes, {out / 16, height, width, in / 4, 16, 4});
    spos::cpu::pack_codes(static_cast<const int8_t*>(from.const_data_ptr()), out, in, height * width,
                          static_cast<int8_t*>(to.mutable_data_ptr()), parallel_for);
    return to;
}

spos::cpu::IntegerConvShape shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding) {
    STD_TORCH_CHECK(weight.dim() == 6 && weight.size(4) == 16 && weight.size(5) == 4 &&
                        weight.scalar_type() == ScalarType::Char && weight.is_contiguous() && weight.numel() > 0,
                    "weight must be what pack_codes gives");
    STD_TORCH_CHECK(x.size(1) == 4 * weight.size(3), "x must have ", 4 * weight.size(3), " channels, got ", x.size(1));
    STD_TORCH_CHECK(weight.numel() / (16 * weight.size(0)) * 255 * 128 < int64_t(1) << 31,
                    "weight has so many values an output channel that a sum could overflow");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && stride[0] > 0 && stride[1] > 0 && padding[0] >= 0 &&
                        padding[1] >= 0,
                    "stride must be two positive numbers and padding two that are not negative");
    spos::cpu::IntegerConvShape shape{};
    shape.samples = x.size(0), shape.in_channels = x.size(1), shape.height = x.size(2), shape.width = x.size(3);
    shape.out_channels = 16 * weight.size(0);
    shape.kernel_height = weight.size(1), shape.kernel_width = weight.size(2);
    shape.vertical_stride = stride[0], shape.horizontal_stride = stride[1];
    shape.vertical_padding = padding[0], shape.horizontal_padding = padding[1];
    const int64_t down = shape.height + 2 * padding[0] - shape.kernel_height;
    const int64_t right = shape.width + 2 * padding[1] - shape.kernel_width;
    STD_TORCH_CHECK(down >= 0 && right >= 0, "x, with its padding, must be at least as large as the kernel");
    shape.out_height = down / stride[0] + 1, shape.out_width = right / stride[1] + 1;
    return shape;
}

Tensor vector_of(const Tensor& values, const char* name, int64_t channels) {
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.size(0) == channels, name,
                    " must be float32 [", channels, "]");
    return packed(values);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Results integer_conv2d_cpu(const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                           const Tensor& act_step, const Tensor& act_bits, const Tensor& act_index,
                           const std::string& act_mode, const Tensor& weight, const Tensor& out_scale,
                           const std::optional<Tensor>& out_shift, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, bool relu, bool statistics, bool keep_codes) {
    const QuantImage given(x, scale, shift, act_step, act_bits, act_index, act_mode);
    STD_TORCH_CHECK(given.dtype != DType::float64, "x must be float32, float16 or bfloat16");
    const auto shape = shape_of(x, weight, stride, padding);
    const float step = static_cast<float>(value_of(given.size, 0));
    std::vector<float> scales(shape.out_channels), shifts(shape.out_channels);
    const Tensor steps = vector_of(out_scale, "out_scale", shape.out_channels);
    for (int64_t c = 0; c < shape.out_channels; ++c) scales[c] = step * static_cast<float>(value_of(steps, c));
    if (out_shift) {
        const Tensor values = vector_of(*out_shift, "out_shift", shape.out_channels);
        for (int64_t c = 0; c < shape.out_channels; ++c) shifts[c] = static_cast<float>(value_of(values, c));
    }
    // What training keeps for backward goes into torch's memory, which it shares with all that comes between two calls.
    const int64_t n = shape.samples, c = shape.out_channels, h = shape.out_height, w = shape.out_width;
    Tensor out = keep_codes ? empty_channels_last(x, n, c, h, w) : kept_image(x, n, c, h, w);
    const int64_t channels = statistics ? shape.out_channels : 0;
    Tensor mean = torch::stable::new_empty(given.step, {channels}),
           m2 = torch::stable::new_empty(given.step, {channels});
    const Tensor codes =
        keep_codes ? given.image(ScalarType::Byte, 1) : torch::stable::new_empty(x, {0}, ScalarType::Byte);
    auto data = [](const Tensor& values) { return static_cast<float*>(values.mutable_data_ptr()); };
    const bool numbers =
        spos::cpu::integer_conv(shape,
                                {given.dtype, given.input.const_data_ptr(), static_cast<const float*>(given.scales),
                                 static_cast<const float*>(given.shifts), given.quantizer, step,
                                 keep_codes ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr},
                                static_cast<const int8_t*>(weight.const_data_ptr()),
                                {scales.data(), shifts.data(), relu, out.mutable_data_ptr(),
                                 statistics ? data(mean) : nullptr, statistics ? data(m2) : nullptr},
                                parallel_for);
    if (!numbers) {
        for (Tensor* made : {&out, &mean, &m2}) torch::stable::fill_(*made, std::nan(""));
    }
    const Tensor used = torch::stable::new_empty(given.step, {});
    set_value(used, 0, numbers ? step : std::nan(""));
    return {out, mean, m2, codes, used};
}

}  // namespace

Kernels integer_conv_kernels() {
    return {
        {"integer_conv2d", "CPU", TORCH_BOX(&integer_conv2d_cpu)},
        {"pack_codes", "CPU", TORCH_BOX(&pack_codes_cpu)},
    };
}

}  // namespace spos::bindings
