// What the bindings of all families share: torch's tensors as the kernels see them, and the table of kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "csrc/dtype.h"

// A shim of torch's CUDA library. Weak, so that the same file loads where torch has no CUDA; the address is then null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace spos::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Kernel {
    const char* op;
    const char* dispatch_key;
    void (*boxed)(StableIValue*, uint64_t, uint64_t);
};
using Kernels = std::vector<Kernel>;

// One a family, in its file.
Kernels batchnorm_kernels();
Kernels bn_add_relu_kernels();
Kernels bn_states_kernels();
Kernels blocks_kernels();
#ifdef SPOS_FAST_WITH_CUDA
Kernels blocks_cuda_kernels();
Kernels quantization_cuda_kernels();
#endif
Kernels integer_conv_kernels();
Kernels quant_kernels();
Kernels unit_infer_kernels();
Kernels units_kernels();

inline DType dtype_of(const Tensor& x, const char* argument) {
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

inline void parallel_for(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, tasks, 1, body);
}

inline ScalarType statistics_type(DType dtype) {
    return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself wherever nothing has to be done: a call of torch's costs tens of microseconds when the kernels have
// filled the caches.
inline Tensor packed(const Tensor& x) {
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
}
inline Tensor packed(const Tensor& x, ScalarType type) {
    return packed(x.scalar_type() == type ? x : torch::stable::to(x, type));
}
inline Tensor channels_last(const Tensor& x) {
    if (x.dim() == 4) {
        const int64_t c = x.size(1), row = x.size(3) * c;
        if (x.stride(1) == 1 && x.stride(3) == c && x.stride(2) == row && x.stride(0) == x.size(2) * row) return x;
    }
    return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Not a view of another tensor: autograd lets nobody write into views that an op returns.
inline Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
    return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                                torch::headeronly::MemoryFormat::ChannelsLast);
}

// Of `stored` channels, how many a kernel on the CPU uses: all, or what the optional int32 tensor says.
inline int64_t used_channels(const std::optional<Tensor>& width, int64_t stored) {
    if (!width) return stored;
    STD_TORCH_CHECK(width->dim() == 0 && width->scalar_type() == ScalarType::Int,
                    "a width must be an int32 tensor without dimensions");
    return std::clamp<int64_t>(*static_cast<const int32_t*>(width->const_data_ptr()), 1, stored);
}

#ifdef SPOS_FAST_WITH_CUDA
inline void* current_stream(const Tensor& x) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return stream;
}

#endif

}  // namespace spos::bindings
