// Tensors that hold several groups: what every group has of its own lies one behind the other.
#pragma once

#include "csrc/bindings/tensors.h"
#include "csrc/cpu/groups.h"

namespace spos::bindings {

// Images of one group.
inline int64_t group_samples(const Tensor& x, int64_t groups) {
    STD_TORCH_CHECK(groups >= 1 && x.size(0) % groups == 0, "groups must divide the ", x.size(0), " images of x, got ",
                    groups);
    return x.size(0) / groups;
}

// Uninitialised [size], or [groups, size] of several groups.
inline Tensor grouped_vector(const Tensor& like, ScalarType type, int64_t size, int64_t groups) {
    return groups == 1 ? torch::stable::new_empty(like, {size}, type)
                       : torch::stable::new_empty(like, {groups, size}, type);
}

inline bool is_grouped_vector(const Tensor& value, int64_t size, int64_t groups) {
    if (groups == 1) return value.dim() == 1 && value.size(0) == size;
    return value.dim() == 2 && value.size(0) == groups && value.size(1) == size;
}

// Values of every group and channel of images x, [groups, channels] (a scale, a shift), as the kernels read them.
inline Tensor per_group(const Tensor& values, const char* name, const Tensor& x, int64_t groups) {
    STD_TORCH_CHECK(values.scalar_type() == statistics_type(dtype_of(x, "x")), name,
                    " must be float32, or float64 for float64 images");
    STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == groups && values.size(1) == x.size(1), name, " must be [",
                    groups, ", ", x.size(1), "]");
    STD_TORCH_CHECK(values.get_device_index() == x.get_device_index(), name, " must be on the device of x");
    return torch::stable::contiguous(values);
}

// A group's share of a packed tensor, to read or to fill.
inline const void* part(const Tensor& values, int64_t group, int64_t groups) {
    const int64_t bytes = values.numel() / groups * item_size(dtype_of(values, "x"));
    return static_cast<const char*>(values.const_data_ptr()) + group * bytes;
}
inline void* part_to_fill(const Tensor& values, int64_t group, int64_t groups) {
    const int64_t bytes = values.numel() / groups * item_size(dtype_of(values, "x"));
    return static_cast<char*>(values.mutable_data_ptr()) + group * bytes;
}

// Calls run(group, pool) for every group of images x, on the CPU.
inline void for_each_group(const Tensor& x, int64_t groups,
                           const std::function<void(int64_t, const spos::cpu::ParallelFor&)>& run) {
    const int64_t bytes = x.numel() / groups * item_size(dtype_of(x, "x"));
    spos::cpu::for_each_group(groups, bytes, torch::stable::get_num_threads(), parallel_for, run);
}

}  // namespace spos::bindings
