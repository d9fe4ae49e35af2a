// Tensors on the CPU in memory that is kept between calls (csrc/cpu/memory.h).
#pragma once

#include <initializer_list>

#include "csrc/bindings/groups.h"
#include "csrc/bindings/tensors.h"
#include "csrc/cpu/memory.h"

namespace spos::bindings {

// Uninitialised, in memory that is kept from a size on where that pays; small tensors are torch's own.
inline Tensor kept(const Tensor& like, std::initializer_list<int64_t> size, std::initializer_list<int64_t> stride) {
    int64_t bytes = item_size(dtype_of(like, "x"));
    for (const int64_t length : size) bytes *= length;
    if (bytes < spos::cpu::kLargeBlock) return {};
    return torch::stable::from_blob(spos::cpu::take_memory(bytes), size, stride, like.device(), like.scalar_type(),
                                    [bytes](void* memory) { spos::cpu::give_back_memory(memory, bytes); });
}

// [size], or [groups, size] of several groups.
inline Tensor kept_values(const Tensor& like, int64_t size, int64_t groups) {
    const Tensor values = groups == 1 ? kept(like, {size}, {1}) : kept(like, {groups, size}, {size, 1});
    return values.defined() ? values : grouped_vector(like, like.scalar_type(), size, groups);
}

inline Tensor kept_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool last = true) {
    const Tensor image =
        last ? kept(like, {n, c, h, w}, {h * w * c, 1, w * c, c}) : kept(like, {n, c, h, w}, {c * h * w, h * w, w, 1});
    if (image.defined()) return image;
    return last ? empty_channels_last(like, n, c, h, w) : torch::stable::new_empty(like, {n, c, h, w});
}

}  // namespace spos::bindings
