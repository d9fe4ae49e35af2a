// The building blocks of the fused units: one layer at a time.
#include <cstring>
#include <tuple>

#include "csrc/bindings/cpu_memory.h"
#include "csrc/bindings/groups.h"
#include "csrc/cpu/layers.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::bindings {
namespace {

using namespace spos::cpu;
using MaybeTensor = std::optional<Tensor>;

// act(T{}) with the type in which values are stored.
template <typename Act>
void with_type(DType dtype, Act act) {
    switch (dtype) {
        case DType::float32:
            return act(float{});
        case DType::float64:
            return act(double{});
        case DType::float16:
            return act(Half{});
        case DType::bfloat16:
            return act(BFloat16{});
    }
}

int64_t pixels_of(const Tensor& x) {
    return x.size(0) * x.size(2) * x.size(3);
}

void check_image(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, name, " must be [N, C, H, W], not empty");
}

void check_vector(const Tensor& value, const char* name, int64_t size, ScalarType type) {
    STD_TORCH_CHECK(value.scalar_type() == type && value.numel() == size, name, " must hold ", size,
                    " statistics in their dtype");
}

// Values of a tensor from `first` on, zeros behind them up to a whole pack.
template <typename A>
Lines<A> padded(const Tensor& values, int64_t first, int64_t size) {
    const Tensor packed = torch::stable::contiguous(values);
    Lines<A> result(whole_packs(size));
    std::copy_n(static_cast<const A*>(packed.const_data_ptr()) + first, size, result.begin());
    return result;
}

// What a layer reads (of one of several groups), with the vectors that it points to.
template <typename T>
struct Loaded {
    using A = typename Compute<T>::type;
    Lines<A> scale, shift;
    Input<T> input;

    Loaded(const Tensor& x, const MaybeTensor& scale_in, const MaybeTensor& shift_in, bool relu, int64_t first,
           int64_t step, int64_t channels, int64_t group = 0, int64_t groups = 1) {
        input = {static_cast<const T*>(part(x, group, groups)) + first, x.size(1), step};
        if (scale_in)
            scale = padded<A>(*scale_in, group * channels, channels),
            shift = padded<A>(*shift_in, group * channels, channels);
        else if (relu)
            scale.assign(whole_packs(channels), A(1)), shift.assign(whole_packs(channels), A(0));
        else
            return;
        input.scale = scale.data(), input.shift = shift.data(), input.relu = relu;
    }
};

// Arguments that both layers share.
void check_layer(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                 int64_t channels, int64_t groups = 1) {
    check_image(x, "x");
    const ScalarType statistics = statistics_type(dtype_of(x, "x"));
    STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == x.scalar_type(),
                    "weight must be [out, in, k, k] in the dtype of x");
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "scale and shift go together");
    const int64_t size = groups * channels;
    if (scale) check_vector(*scale, "scale", size, statistics), check_vector(*shift, "shift", size, statistics);
}

void check_pointwise(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                     int64_t first, int64_t step, int64_t in, int64_t out) {
    check_layer(x, weight, scale, shift, in);
    STD_TORCH_CHECK(weight.size(2) == 1 && weight.size(3) == 1 && in >= 1 && in <= weight.size(1) && out >= 1 &&
                        out <= weight.size(0),
                    "weight must be [out, in, 1, 1] with at least ", out, " and ", in, " channels");
    STD_TORCH_CHECK(first >= 0 && step >= 1 && first + step * (in - 1) < x.size(1), "x has no channel ",
                    first + step * (in - 1));
}

void check_depthwise(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                     int64_t stride, int64_t channels, int64_t groups = 1) {
    check_layer(x, weight, scale, shift, channels, groups);
    STD_TORCH_CHECK(weight.size(1) == 1 && weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
                    "weight must be [channels, 1, k, k] with an odd k");
    STD_TORCH_CHECK(channels >= 1 && channels <= weight.size(0) && channels <= x.size(1) && stride >= 1,
                    "channels must be there, and the stride positive");
}

Window window_of(const Tensor& x, const Tensor& weight, int64_t channels, int64_t stride) {
    return {x.size(0), x.size(2), x.size(3), channels, weight.size(2), stride};
}

// An image of `channels` channels, zeros where some of them are absent.
Tensor new_image(const Tensor& x, int64_t channels, int64_t used, int64_t height, int64_t width) {
    const Tensor made = kept_image(x, x.size(0), channels, height, width);
    if (used < channels) std::memset(made.mutable_data_ptr(), 0, made.numel() * item_size(dtype_of(x, "x")));
    return made;
}

using Statistics3 = std::tuple<Tensor, Tensor, Tensor>;

// The first values, and zeros for absent channels behind them.
template <typename A>
void fill_statistics(const std::vector<double>& values, int64_t size, A* to) {
    for (int64_t c = 0; c < size; ++c) to[c] = c < int64_t(values.size()) ? static_cast<A>(values[c]) : 0;
}

template <typename A>
Tensor statistics_tensor(const Tensor& x, const std::vector<double>& values, int64_t size) {
    const Tensor made = torch::stable::new_empty(x, {size}, statistics_type(dtype_of(x, "x")));
    fill_statistics(values, size, static_cast<A*>(made.mutable_data_ptr()));
    return made;
}

Statistics3 pw_bnstats_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                           bool relu, int64_t first, int64_t step, int64_t in, int64_t out, const MaybeTensor& width_in,
                           const MaybeTensor& width_out) {
    check_pointwise(x, weight, scale, shift, first, step, in, out);
    const Tensor image = channels_last(x), packed = torch::stable::contiguous(weight);
    const int64_t used_out = used_channels(width_out, out);
    const Tensor z = new_image(image, out, used_out, x.size(2), x.size(3));
    Tensor mean, m2;
    with_type(dtype_of(x, "x"), [&](auto type) {
        using T = decltype(type);
        using A = typename Compute<T>::type;
        const Loaded<T> loaded(image, scale, shift, relu, first, step, in);
        const Moments moments = pointwise_forward(Pointwise<T>{loaded.input,
                                                               pixels_of(x),
                                                               used_channels(width_in, in),
                                                               used_out,
                                                               static_cast<const T*>(packed.const_data_ptr()),
                                                               weight.size(1),
                                                               static_cast<T*>(z.mutable_data_ptr()),
                                                               out,
                                                               {},
                                                               false},
                                                  parallel_for);
        mean = statistics_tensor<A>(x, moments.mean, out), m2 = statistics_tensor<A>(x, moments.m2, out);
    });
    return {z, mean, m2};
}

Statistics3 dw_bnstats_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                           bool relu, int64_t stride, int64_t channels, const MaybeTensor& width, int64_t groups) {
    check_depthwise(x, weight, scale, shift, stride, channels, groups);
    const Tensor image = channels_last(x), packed = torch::stable::contiguous(weight);
    Window window = window_of(x, weight, used_channels(width, channels), stride);
    const Tensor z = new_image(image, channels, window.channels, window.out_height(), window.out_width());
    window.samples = group_samples(x, groups);
    const ScalarType wide = statistics_type(dtype_of(x, "x"));
    const Tensor mean = grouped_vector(x, wide, channels, groups), m2 = grouped_vector(x, wide, channels, groups);
    with_type(dtype_of(x, "x"), [&](auto type) {
        using T = decltype(type);
        using A = typename Compute<T>::type;
        for_each_group(x, groups, [&](int64_t group, const spos::cpu::ParallelFor& pool) {
            const Loaded<T> loaded(image, scale, shift, relu, 0, 1, channels, group, groups);
            const Moments moments = depthwise_forward(Depthwise<T>{loaded.input,
                                                                   window,
                                                                   static_cast<const T*>(packed.const_data_ptr()),
                                                                   static_cast<T*>(part_to_fill(z, group, groups)),
                                                                   channels,
                                                                   {},
                                                                   false},
                                                      pool);
            fill_statistics(moments.mean, channels, static_cast<A*>(part_to_fill(mean, group, groups)));
            fill_statistics(moments.m2, channels, static_cast<A*>(part_to_fill(m2, group, groups)));
        });
    });
    return {z, mean, m2};
}

Tensor bn_act_cat_cpu(const Tensor& z, const Tensor& scale, const Tensor& shift, const MaybeTensor& other,
                      const MaybeTensor& other_scale, const MaybeTensor& other_shift, bool relu) {
    check_image(z, "z");
    const DType dtype = dtype_of(z, "z");
    const int64_t channels = z.size(1), pixels = pixels_of(z);
    check_vector(scale, "scale", channels, statistics_type(dtype));
    check_vector(shift, "shift", channels, statistics_type(dtype));
    int64_t front = 0;
    if (other) {
        check_image(*other, "other");
        STD_TORCH_CHECK(other->scalar_type() == z.scalar_type() && pixels_of(*other) == pixels,
                        "other must have the dtype and the images of z");
        STD_TORCH_CHECK(other_scale.has_value() == other_shift.has_value(), "other_scale and other_shift go together");
        front = other_scale ? other->size(1) : (other->size(1) + 1) / 2;
        if (other_scale)
            for (const Tensor& value : {*other_scale, *other_shift})
                check_vector(value, "other_scale and other_shift", front, statistics_type(dtype));
    }
    const Tensor image = channels_last(z), beside = other ? channels_last(*other) : image;
    const Tensor out = kept_image(image, z.size(0), front + channels, z.size(2), z.size(3));
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        T* to = static_cast<T*>(out.mutable_data_ptr());
        const int64_t pitch = front + channels;
        const bool stream = pixels * pitch * int64_t(sizeof(T)) > kKept;
        if (other && other_scale) {
            const Loaded<T> loaded(beside, other_scale, other_shift, relu, 0, 1, front);
            activate(loaded.input, pixels, front, to, pitch, stream, false, parallel_for);
        } else if (other) {
            const int64_t channels_of_other = other->size(1);
            pass_on(Passing<T>{static_cast<const T*>(beside.const_data_ptr()), channels_of_other, to, pitch,
                               stream && channels_of_other % 2 == 0},
                    pixels, front, parallel_for);
        }
        const Loaded<T> loaded(image, scale, shift, relu, 0, 1, channels);
        activate(loaded.input, pixels, channels, to + front, pitch, stream, false, parallel_for);
    });
    return out;
}

// A gradient as it lies: packed channels last, or a slice of the channels of something that is; else a packed copy.
Tensor readable(const Tensor& grad, int64_t& pitch) {
    const auto size = grad.sizes(), stride = grad.strides();
    const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
    auto is = [&](int dim, int64_t expected) { return size[dim] == 1 || stride[dim] == expected; };
    pitch = w > 1 ? stride[3] : h > 1 ? stride[2] : n > 1 ? stride[0] : c;
    if (is(1, 1) && pitch >= c && is(2, w * pitch) && is(0, h * w * pitch)) return grad;
    pitch = c;
    return channels_last(grad);
}

// The gradient of a layer's output, with the vectors that it points to.
template <typename T>
struct MadeOnLoad {
    using A = typename Compute<T>::type;
    Lines<A> rows[5];
    OutputGradient<T> output;

    MadeOnLoad(const Tensor& grad, int64_t pitch, const Tensor& z, const Tensor& norm, bool relu) {
        const int64_t channels = z.size(1);
        for (int i = 0; i < 5; ++i) rows[i] = padded<A>(norm, i * channels, channels);
        output = {static_cast<const T*>(grad.const_data_ptr()),
                  nullptr,
                  pitch,
                  static_cast<const T*>(z.const_data_ptr()),
                  channels,
                  {rows[0].data(), rows[1].data(), rows[2].data(), rows[3].data(), rows[4].data(), relu}};
    }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_gradient(const Tensor& grad, const Tensor& z, const Tensor& norm, const Tensor& x, const MaybeTensor& centre,
                    int64_t in, int64_t out, int64_t stride) {
    const ScalarType statistics = statistics_type(dtype_of(x, "x"));
    for (const Tensor* image : {&grad, &z})
        STD_TORCH_CHECK(image->scalar_type() == x.scalar_type() && image->dim() == 4 && image->size(0) == x.size(0) &&
                            image->size(1) == out && image->size(2) == (x.size(2) - 1) / stride + 1 &&
                            image->size(3) == (x.size(3) - 1) / stride + 1,
                        "grad and z must have the dtype of x and the shape of the layer's output");
    check_vector(norm, "norm", 5 * out, statistics);
    if (centre) check_vector(*centre, "centre", in, statistics);
}

Gradients pw_bnstats_backward_cpu(const Tensor& grad, const Tensor& z, const Tensor& norm, bool relu, const Tensor& x,
                                  const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                                  const MaybeTensor& centre, bool in_relu, int64_t first, int64_t step, int64_t in,
                                  int64_t out, const MaybeTensor& width_in, const MaybeTensor& width_out) {
    check_pointwise(x, weight, scale, shift, first, step, in, out);
    check_gradient(grad, z, norm, x, centre, in, out, 1);
    int64_t pitch;
    const Tensor behind = readable(grad, pitch), image = channels_last(x), output = channels_last(z);
    const Tensor packed = torch::stable::contiguous(weight);
    const int64_t used_in = used_channels(width_in, in), used_out = used_channels(width_out, out);
    const Tensor grad_x = new_image(image, in, used_in, x.size(2), x.size(3));
    const Tensor grad_weight = torch::stable::new_empty(x, weight.sizes());
    Tensor sum, product;
    with_type(dtype_of(x, "x"), [&](auto type) {
        using T = decltype(type);
        using A = typename Compute<T>::type;
        const Loaded<T> loaded(image, scale, shift, in_relu, first, step, in);
        const MadeOnLoad<T> made(behind, pitch, output, norm, relu);
        Lines<A> middle(whole_packs(in)), at_middle(whole_packs(in));
        if (centre) middle = padded<A>(*centre, 0, in);
        for (int64_t j = 0; j < in; ++j)
            at_middle[j] = scale ? static_cast<A>(double(loaded.scale[j]) * middle[j] + loaded.shift[j]) : middle[j];
        const bool centred = centre || (scale && !in_relu);
        InputGradient<T> gradient;
        gradient.to = static_cast<T*>(grad_x.mutable_data_ptr()), gradient.pitch = in;
        const GradientSums sums = pointwise_backward(
            PointwiseBackward<T>{
                made.output, loaded.input, centred ? middle.data() : nullptr, at_middle.data(), centre.has_value(),
                pixels_of(x), used_in, used_out, static_cast<const T*>(packed.const_data_ptr()),
                static_cast<T*>(grad_weight.mutable_data_ptr()), weight.size(0), weight.size(1), gradient},
            parallel_for);
        sum = statistics_tensor<A>(x, sums.sum, centre ? in : 0);
        product = statistics_tensor<A>(x, sums.product, centre ? in : 0);
    });
    return {grad_x, grad_weight, sum, product};
}

Gradients dw_bnstats_backward_cpu(const Tensor& grad, const Tensor& z, const Tensor& norm, bool relu, const Tensor& x,
                                  const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                                  const MaybeTensor& centre, bool in_relu, int64_t stride, int64_t channels,
                                  const MaybeTensor& width) {
    check_depthwise(x, weight, scale, shift, stride, channels);
    check_gradient(grad, z, norm, x, centre, channels, channels, stride);
    int64_t pitch;
    const Tensor behind = readable(grad, pitch), image = channels_last(x), output = channels_last(z);
    const Tensor packed = torch::stable::contiguous(weight);
    const Window window = window_of(x, weight, used_channels(width, channels), stride);
    const Tensor grad_x = new_image(image, channels, window.channels, x.size(2), x.size(3));
    const Tensor grad_weight = torch::stable::new_empty(x, weight.sizes());
    Tensor sum, product;
    with_type(dtype_of(x, "x"), [&](auto type) {
        using T = decltype(type);
        using A = typename Compute<T>::type;
        const Loaded<T> loaded(image, scale, shift, in_relu, 0, 1, channels);
        const MadeOnLoad<T> made(behind, pitch, output, norm, relu);
        Lines<A> middle;
        if (centre) middle = padded<A>(*centre, 0, channels);
        InputGradient<T> gradient;
        gradient.to = static_cast<T*>(grad_x.mutable_data_ptr()), gradient.pitch = channels;
        const GradientSums sums = depthwise_backward(
            DepthwiseBackward<T>{made.output, loaded.input, centre ? middle.data() : nullptr, window,
                                 static_cast<const T*>(packed.const_data_ptr()),
                                 static_cast<T*>(grad_weight.mutable_data_ptr()), weight.size(0), gradient},
            parallel_for);
        sum = statistics_tensor<A>(x, sums.sum, centre ? channels : 0);
        product = statistics_tensor<A>(x, sums.product, centre ? channels : 0);
    });
    return {grad_x, grad_weight, sum, product};
}

std::tuple<Tensor, Tensor> bn_act_cat_backward_cpu(const Tensor& grad, int64_t first, const Tensor& z,
                                                   const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                   bool relu) {
    check_image(z, "z");
    const DType dtype = dtype_of(z, "z");
    const int64_t channels = z.size(1);
    STD_TORCH_CHECK(grad.scalar_type() == z.scalar_type() && grad.dim() == 4 && grad.size(0) == z.size(0) &&
                        grad.size(2) == z.size(2) && grad.size(3) == z.size(3) && first >= 0 &&
                        first + channels <= grad.size(1),
                    "grad must hold z's channels from ", first, " on");
    for (const Tensor* value : {&scale, &shift, &mean})
        check_vector(*value, "scale, shift and mean", channels, statistics_type(dtype));
    const Tensor behind = channels_last(grad), image = channels_last(z);
    Tensor sum, product;
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        using A = typename Compute<T>::type;
        const Lines<A> rows[] = {padded<A>(scale, 0, channels), padded<A>(shift, 0, channels),
                                 padded<A>(mean, 0, channels)};
        const OutputGradient<T> output{static_cast<const T*>(behind.const_data_ptr()) + first,
                                       nullptr,
                                       grad.size(1),
                                       static_cast<const T*>(image.const_data_ptr()),
                                       channels,
                                       {rows[0].data(), rows[1].data(), rows[2].data(), nullptr, nullptr, relu}};
        const GradientSums sums = output_sums(output, pixels_of(z), channels, parallel_for);
        sum = statistics_tensor<A>(z, sums.sum, channels), product = statistics_tensor<A>(z, sums.product, channels);
    });
    return {sum, product};
}

}  // namespace

Kernels blocks_kernels() {
    return {
        {"pw_bnstats", "CPU", TORCH_BOX(&pw_bnstats_cpu)},
        {"pw_bnstats_backward", "CPU", TORCH_BOX(&pw_bnstats_backward_cpu)},
        {"dw_bnstats", "CPU", TORCH_BOX(&dw_bnstats_cpu)},
        {"dw_bnstats_backward", "CPU", TORCH_BOX(&dw_bnstats_backward_cpu)},
        {"bn_act_cat", "CPU", TORCH_BOX(&bn_act_cat_cpu)},
        {"bn_act_cat_backward", "CPU", TORCH_BOX(&bn_act_cat_backward_cpu)},
    };
}

}  // namespace spos::bindings
