// Torch's door to csrc/cpu and kernels/cuda: unpacks tensors into pointers and shapes, and nothing more. Written
// against torch's stable ABI, so one build serves every torch from 2.11 on, with CUDA or without.
//
// Schemas, fakes and autograd live in spos_fast/ops. Python also decides which kernel serves which device, so nothing
// is registered when the library is loaded: spos_fast/ops/dispatch.py calls spos_fast_register_kernel at the end of
// this file. A new op adds its function here and a line to the table there.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "csrc/cpu/bn_moments.h"
#include "csrc/cpu/shuffle_unit.h"
#include "csrc/dtype.h"
#ifdef SPOS_FAST_WITH_CUDA
#include "kernels/cuda/bn_moments.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A shim of torch's CUDA library. Weak, so that the same file loads where torch has no CUDA; the address is then null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

using spos::DType;
using spos::MomentsShape;

DType dtype_of(const Tensor& x, const char* argument) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            return DType::float32;
        case ScalarType::Double:
            return DType::float64;
        case ScalarType::Half:
            return DType::float16;
        case ScalarType::BFloat16:
            return DType::bfloat16;
        default:
            STD_TORCH_CHECK(false, argument, " must be float32, float64, float16 or bfloat16, got scalar type number ",
                            static_cast<int>(x.scalar_type()));
    }
    return DType::float32;
}

void parallel_for(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, tasks, 1, body);
}

// What x [N, C, H, W] looks like in memory, if the kernels can read it where it lies: packed, or a slice of the
// channels of something packed. The stride of a dimension of size 1 says nothing and is not looked at.
bool read_layout(const Tensor& x, MomentsShape& shape) {
    const auto size = x.sizes(), stride = x.strides();
    const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
    auto is = [&](int dim, int64_t expected) { return size[dim] == 1 || stride[dim] == expected; };

    const int64_t pixel = w > 1 ? stride[3] : h > 1 ? stride[2] : n > 1 ? stride[0] : c;
    if (c > 1 && stride[1] == 1 && pixel >= c && is(2, w * pixel) && is(0, h * w * pixel)) {
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

// Checks the arguments of bn_moments; returns the tensor to read (x, or one packed copy) and fills in its shape.
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
    Tensor packed = torch::stable::contiguous(x);
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

// --- shuffle_unit ---

ScalarType statistics_type(DType dtype) {
    return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

Tensor channels_last(const Tensor& x) {
    return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
    const Tensor pixels = torch::stable::new_empty(like, {n, h, w, c});
    return torch::stable::transpose(torch::stable::transpose(pixels, 1, 3), 2, 3);
}

// A unit's tensors as the kernels read them, and alive as long as they do.
struct UnitArguments {
    Tensor x, pw1, dw, pw2;
    std::optional<Tensor> gamma, beta;
    spos::cpu::ShuffleUnit unit;
};

UnitArguments unit_arguments(const Tensor& x, const Tensor& pw1, const Tensor& dw, const Tensor& pw2,
                             const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, int64_t mid,
                             double epsilon) {
    const DType dtype = dtype_of(x, "x");
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.size(1) % 2 == 0,
                    "x must be [N, C, H, W], not empty, with an even number of channels");
    const int64_t half = x.size(1) / 2;
    STD_TORCH_CHECK(pw1.dim() == 4 && pw1.size(1) == half && pw1.size(2) == 1 && pw1.size(3) == 1, "pw1 must be [M, ",
                    half, ", 1, 1]");
    const int64_t stored = pw1.size(0);
    STD_TORCH_CHECK(
        dw.dim() == 4 && dw.size(0) == stored && dw.size(1) == 1 && dw.size(2) == dw.size(3) && dw.size(2) % 2 == 1,
        "dw must be [", stored, ", 1, k, k] with an odd k");
    STD_TORCH_CHECK(pw2.dim() == 4 && pw2.size(1) == stored && pw2.size(2) == 1 && pw2.size(3) == 1,
                    "pw2 must be [out, ", stored, ", 1, 1]");
    STD_TORCH_CHECK(mid >= 1 && mid <= stored, "mid must be from 1 to ", stored, ", got ", mid);
    for (const Tensor* weight : {&pw1, &dw, &pw2})
        STD_TORCH_CHECK(weight->scalar_type() == x.scalar_type(), "weights must have the dtype of x");
    UnitArguments given{channels_last(x),
                        torch::stable::contiguous(pw1),
                        torch::stable::contiguous(dw),
                        torch::stable::contiguous(pw2),
                        std::nullopt,
                        std::nullopt,
                        {}};
    const int64_t made = pw2.size(0), normalised = 2 * mid + made;
    for (const auto& [from, to] : {std::pair{&gamma, &given.gamma}, std::pair{&beta, &given.beta}}) {
        if (!from->has_value()) continue;
        STD_TORCH_CHECK((*from)->dim() == 1 && (*from)->size(0) == normalised, "gamma and beta must be [", normalised,
                        "]");
        *to = torch::stable::contiguous(torch::stable::to(**from, statistics_type(dtype)));
    }
    given.unit = {dtype,
                  x.size(0),
                  x.size(2),
                  x.size(3),
                  half,
                  mid,
                  made,
                  dw.size(2),
                  stored,
                  given.x.const_data_ptr(),
                  given.pw1.const_data_ptr(),
                  given.dw.const_data_ptr(),
                  given.pw2.const_data_ptr(),
                  given.gamma ? given.gamma->const_data_ptr() : nullptr,
                  given.beta ? given.beta->const_data_ptr() : nullptr,
                  epsilon};
    return given;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shuffle_unit_cpu(const Tensor& x, const Tensor& pw1,
                                                                            const Tensor& dw, const Tensor& pw2,
                                                                            const std::optional<Tensor>& gamma,
                                                                            const std::optional<Tensor>& beta,
                                                                            int64_t mid, double epsilon, bool save) {
    const UnitArguments given = unit_arguments(x, pw1, dw, pw2, gamma, beta, mid, epsilon);
    const auto& unit = given.unit;
    const int64_t n = unit.samples, h = unit.height, w = unit.width;
    const Tensor out = empty_channels_last(given.x, n, unit.half + unit.made, h, w);
    const Tensor mean = torch::stable::new_empty(given.x, {unit.normalised()}, statistics_type(unit.dtype));
    const Tensor var = torch::stable::new_empty(mean, {unit.normalised()});
    if (save) {
        const Tensor z1 = empty_channels_last(given.x, n, mid, h, w), z2 = empty_channels_last(given.x, n, mid, h, w);
        const Tensor z3 = empty_channels_last(given.x, n, unit.made, h, w);
        spos::cpu::shuffle_unit_forward(unit,
                                        {out.mutable_data_ptr(),
                                         z1.mutable_data_ptr(),
                                         z2.mutable_data_ptr(),
                                         z3.mutable_data_ptr(),
                                         {mid, mid, unit.made},
                                         mean.mutable_data_ptr(),
                                         var.mutable_data_ptr()},
                                        parallel_for);
        return {out, z1, z2, z3, mean, var};
    }
    const int64_t pitch = std::max(mid, unit.made);
    const Tensor last = torch::stable::new_empty(given.x, {unit.pixels(), pitch});
    const bool apart = !spos::cpu::depthwise_in_place(unit);
    const Tensor first = torch::stable::new_empty(given.x, {apart ? unit.pixels() : 0, pitch});
    spos::cpu::shuffle_unit_forward(unit,
                                    {out.mutable_data_ptr(),
                                     apart ? first.mutable_data_ptr() : last.mutable_data_ptr(),
                                     last.mutable_data_ptr(),
                                     last.mutable_data_ptr(),
                                     {pitch, pitch, pitch},
                                     mean.mutable_data_ptr(),
                                     var.mutable_data_ptr()},
                                    parallel_for);
    return {out,
            empty_channels_last(given.x, 0, mid, h, w),
            empty_channels_last(given.x, 0, mid, h, w),
            empty_channels_last(given.x, 0, unit.made, h, w),
            mean,
            var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shuffle_unit_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& z1, const Tensor& z2, const Tensor& z3, const Tensor& mean,
    const Tensor& var, const Tensor& pw1, const Tensor& dw, const Tensor& pw2, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, int64_t mid, double epsilon) {
    const UnitArguments given = unit_arguments(x, pw1, dw, pw2, gamma, beta, mid, epsilon);
    const auto& unit = given.unit;
    const int64_t n = unit.samples, h = unit.height, w = unit.width;
    auto image = [&](const Tensor& value, int64_t channels) {
        STD_TORCH_CHECK(value.scalar_type() == x.scalar_type() && value.dim() == 4 && value.size(0) == n &&
                            value.size(1) == channels && value.size(2) == h && value.size(3) == w,
                        "shuffle_unit_backward needs what shuffle_unit saves (save=True)");
        return channels_last(value);
    };
    const Tensor out = image(grad, unit.half + unit.made), first = image(z1, mid), second = image(z2, mid),
                 third = image(z3, unit.made);
    auto statistics = [&](const Tensor& value) {
        STD_TORCH_CHECK(value.scalar_type() == statistics_type(unit.dtype) && value.dim() == 1 &&
                            value.size(0) == unit.normalised(),
                        "mean and var must be what shuffle_unit returned");
        return torch::stable::contiguous(value);
    };
    const Tensor means = statistics(mean), vars = statistics(var);
    const Tensor grad_x = empty_channels_last(given.x, n, x.size(1), h, w);
    const Tensor grad_pw1 = torch::stable::new_empty(x, {unit.mid_stored, unit.half, 1, 1});
    const Tensor grad_dw = torch::stable::new_empty(x, {unit.mid_stored, 1, unit.kernel, unit.kernel});
    const Tensor grad_pw2 = torch::stable::new_empty(x, {unit.made, unit.mid_stored, 1, 1});
    const Tensor grad_gamma = torch::stable::new_empty(means, {unit.normalised()});
    const Tensor grad_beta = torch::stable::new_empty(means, {unit.normalised()});
    spos::cpu::shuffle_unit_backward(
        unit,
        {out.const_data_ptr(), first.const_data_ptr(), second.const_data_ptr(), third.const_data_ptr(),
         means.const_data_ptr(), vars.const_data_ptr(), grad_x.mutable_data_ptr(), grad_pw1.mutable_data_ptr(),
         grad_dw.mutable_data_ptr(), grad_pw2.mutable_data_ptr(), grad_gamma.mutable_data_ptr(),
         grad_beta.mutable_data_ptr()},
        parallel_for);
    return {grad_x, grad_pw1, grad_dw, grad_pw2, grad_gamma, grad_beta};
}

#ifdef SPOS_FAST_WITH_CUDA
void* current_stream(const Tensor& x) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return stream;
}

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
#endif

struct Kernel {
    const char* op;
    const char* dispatch_key;
    void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

const Kernel kKernels[] = {
    {"bn_moments", "CPU", TORCH_BOX(&bn_moments_cpu)},
    {"shuffle_unit", "CPU", TORCH_BOX(&shuffle_unit_cpu)},
    {"shuffle_unit_backward", "CPU", TORCH_BOX(&shuffle_unit_backward_cpu)},
#ifdef SPOS_FAST_WITH_CUDA
    {"bn_moments", "CUDA", TORCH_BOX(&bn_moments_cuda)},
#endif
};

}  // namespace

// Makes this library's kernel for spos_fast::<op> serve `dispatch_key`. 0: done; 1: there is no such kernel in this
// build; 2: torch refused it. A registration lasts as long as the process, hence the handle that is never freed.
extern "C" __attribute__((visibility("default"))) int spos_fast_register_kernel(const char* op,
                                                                                const char* dispatch_key) {
    for (const Kernel& kernel : kKernels) {
        if (std::strcmp(kernel.op, op) != 0 || std::strcmp(kernel.dispatch_key, dispatch_key) != 0) continue;
        TorchLibraryHandle library;
        if (aoti_torch_library_init_impl("spos_fast", dispatch_key, __FILE__, __LINE__, &library)) return 2;
        return torch_library_impl(library, op, kernel.boxed, TORCH_ABI_VERSION) ? 2 : 0;
    }
    return 1;
}
