// Tensors on the CPU in memory that is kept between calls (csrc/cpu/memory.h).
#pragma once

#include "csrc/bindings/tensors.h"
#include "csrc/cpu/memory.h"

namespace spos::bindings {

// `size` values, uninitialised. Small ones are torch's own.
inline Tensor kept_values(const Tensor& like, int64_t size) {
    const int64_t bytes = size * item_size(dtype_of(like, "x"));
    if (bytes < spos::cpu::kLargeBlock) return torch::stable::new_empty(like, {size});
    return torch::stable::from_blob(spos::cpu::take_memory(bytes), {size}, {1}, like.device(), like.scalar_type(),
                                    [bytes](void* memory) { spos::cpu::give_back_memory(memory, bytes); });
}

inline Tensor kept_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
    const Tensor pixels = torch::stable::view(kept_values(like, n * c * h * w), {n, h, w, c});
    return torch::stable::transpose(torch::stable::transpose(pixels, 1, 3), 2, 3);
}

}  // namespace spos::bindings
