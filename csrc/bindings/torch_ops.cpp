// Torch's door to csrc/cpu and kernels/cuda: unpacks tensors into pointers and shapes, and nothing more. Written
// against torch's stable ABI, so one build serves every torch from 2.11 on, with CUDA or without.
//
// Schemas, fakes and autograd live in spos_fast/ops. Python also decides which kernel serves which device, so nothing
// is registered when the library is loaded: spos_fast/ops/dispatch.py calls spos_fast_register_kernel at the end of
// this file. A new op adds a function and a line to the table in the file of its family.
#include <cstring>

#include "csrc/bindings/tensors.h"

using spos::bindings::Kernel, spos::bindings::Kernels;

namespace {

std::vector<Kernels> families() {
    using namespace spos::bindings;
    return {
        batchnorm_kernels(),    bn_add_relu_kernels(),
        bn_states_kernels(),    blocks_kernels(),
        integer_conv_kernels(), quant_kernels(),
        unit_infer_kernels(),   units_kernels(),
#ifdef SPOS_FAST_WITH_CUDA
        blocks_cuda_kernels(),  quantization_cuda_kernels(),
#endif
    };
}

}  // namespace

// Makes this library's kernel for spos_fast::<op> serve `dispatch_key`. 0: done; 1: there is no such kernel in this
// build; 2: torch refused it. A registration lasts as long as the process, hence the handle that is never freed.
extern "C" __attribute__((visibility("default"))) int spos_fast_register_kernel(const char* op,
                                                                                const char* dispatch_key) {
    for (const Kernels& family : families())
        for (const Kernel& kernel : family) {
            if (std::strcmp(kernel.op, op) != 0 || std::strcmp(kernel.dispatch_key, dispatch_key) != 0) continue;
            TorchLibraryHandle library;
            if (aoti_torch_library_init_impl("spos_fast", dispatch_key, __FILE__, __LINE__, &library)) return 2;
            return torch_library_impl(library, op, kernel.boxed, TORCH_ABI_VERSION) ? 2 : 0;
        }
    return 1;
}
