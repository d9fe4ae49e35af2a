// The words that nvcc and the host shim of the tests (tests/csrc/cuda_shim.h) spell differently.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// SPOS_LAUNCH((kernel<A, B>), grid, block, dynamic shared bytes, stream, arguments...)
#define SPOS_LAUNCH(kernel, grid, block, shared, stream, ...) \
    (kernel)<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#elif !defined(SPOS_CUDA_SHIM)
#error "compile with nvcc, or with -include tests/csrc/cuda_shim.h"
#endif

namespace spos::cuda {

// Null, or why the last launch was refused. Read once after every launch: the error would otherwise surface in
// whatever CUDA call comes next.
inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace spos::cuda
