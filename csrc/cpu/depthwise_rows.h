// The input rows under a depthwise kernel that walks down an image: each is made once, and kept as long as the kernel
// touches it.
#pragma once

#include <vector>

#include "csrc/cpu/simd.h"
#include "csrc/cpu/unit_kernels.h"

namespace spos::cpu {

template <typename A>
class RowWindow {
  public:
    // For `packs` packs of channels of images of height x width and an odd kernel.
    RowWindow(int64_t height, int64_t width, int64_t kernel, int64_t packs)
        : height_(height),
          kernel_(kernel),
          length_((width + kernel - 1 + kSlack) * kPack),
          values_(packs * kernel * length_, A(0)),
          rows_(kernel) {}

    void start(int64_t top) { next_ = std::max<int64_t>(0, top - kernel_ / 2); }

    // Makes the rows that a kernel centred on row y needs and that are not there yet: make(row, pack, to) writes the
    // pixels of one pack of channels, kPack values each. Left and right of them lie zeros.
    template <typename Make>
    void reach(int64_t y, int64_t packs, Make make) {
        const int64_t last = std::min(height_ - 1, y + kernel_ / 2);
        for (; next_ <= last; ++next_)
            for (int64_t pack = 0; pack < packs; ++pack) make(next_, pack, row(next_, pack) + kernel_ / 2 * kPack);
        first_ = std::max<int64_t>(0, kernel_ / 2 - y);
        count_ = std::min(kernel_, height_ - y + kernel_ / 2) - first_;
        top_ = y - kernel_ / 2 + first_;
    }

    // Of the kernel on row y, those of its rows that lie in the image.
    int64_t first() const { return first_; }
    int64_t count() const { return count_; }
    const A* const* rows(int64_t pack) {
        for (int64_t i = 0; i < count_; ++i) rows_[i] = row(top_ + i, pack);
        return rows_.data();
    }

  private:
    A* row(int64_t y, int64_t pack) { return values_.data() + (pack * kernel_ + y % kernel_) * length_; }

    int64_t height_, kernel_, length_, next_ = 0, first_ = 0, count_ = 0, top_ = 0;
    std::vector<A> values_;
    std::vector<const A*> rows_;
};

// Weights [mid_stored, kernel, kernel] of `mid` channels as [pack][kernel * kernel][kPack], zeros behind the last one.
template <typename A, typename T>
std::vector<A> pack_depthwise(const T* weights, int64_t mid, int64_t kernel, bool flipped) {
    const int64_t taps = kernel * kernel;
    std::vector<A> packed((mid + kPack - 1) / kPack * kPack * taps, A(0));
    for (int64_t m = 0; m < mid; ++m)
        for (int64_t t = 0; t < taps; ++t)
            packed[(m / kPack * taps + (flipped ? taps - 1 - t : t)) * kPack + m % kPack] =
                widen(weights[m * taps + t]);
    return packed;
}

}  // namespace spos::cpu
