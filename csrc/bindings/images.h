// Images as the CUDA kernels read them: runs of neighbouring channels, one a pixel.
#pragma once

#include "csrc/bindings/tensors.h"

namespace spos::bindings {

// A channels-last image, or a slice of the channels of one, as it lies in memory; anything else is copied.
struct Image {
    Tensor tensor;
    int64_t pitch;  // elements from one pixel to the next

    explicit Image(const Tensor& x) : tensor(x) {
        if (is_columns()) return;
        tensor = channels_last(x);
        pitch = x.size(1);
    }

    int64_t size(int64_t dim) const { return tensor.size(dim); }
    int64_t pixels() const { return size(0) * size(2) * size(3); }
    const void* data() const { return tensor.const_data_ptr(); }

  private:
    // The stride of a dimension of size 1 says nothing and is not looked at.
    bool is_columns() {
        const int64_t n = size(0), c = size(1), h = size(2), w = size(3);
        const auto stride = [this](int64_t dim) { return tensor.stride(dim); };
        pitch = w > 1 ? stride(3) : h > 1 ? stride(2) : n > 1 ? stride(0) : c;
        return (c == 1 || stride(1) == 1) && pitch >= c && (h == 1 || stride(2) == w * pitch) &&
               (n == 1 || stride(0) == h * w * pitch);
    }
};

}  // namespace spos::bindings
