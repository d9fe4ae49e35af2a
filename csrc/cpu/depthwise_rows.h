// The input rows under a depthwise kernel that walks down an image: each is made once, and kept as long as the kernel
// touches it.
#pragma once

#include <algorithm>
#include <vector>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/simd.h"
#include "csrc/cpu/unit_kernels.h"

namespace spos::cpu {

constexpr int64_t kRowsAhead = 2;  // how early rows are asked for; up to 16 makes no difference

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

    void start() { next_ = 0; }

    // Makes the rows from `begin` to `end`, not more than the kernel has, that lie in the image and are not there yet:
    // make(row, pack, to) writes the pixels of one pack of channels, kPack values each. Left and right of them lie
    // zeros. `begin` never decreases between two starts.
    template <typename Make>
    void cover(int64_t begin, int64_t end, int64_t packs, Make make) {
        first_ = std::max<int64_t>(0, -begin);
        top_ = begin + first_;
        const int64_t last = std::min(height_, end);
        count_ = std::max<int64_t>(0, last - top_);
        for (next_ = std::max(next_, top_); next_ < last; ++next_)
            for (int64_t pack = 0; pack < packs; ++pack) make(next_, pack, row(next_, pack) + kernel_ / 2 * kPack);
    }

    // Of the rows asked for, those that lie in the image, from `skipped` pixels behind the left end on.
    int64_t first() const { return first_; }
    int64_t count() const { return count_; }
    const A* const* rows(int64_t pack, int64_t skipped = 0) {
        const A* start = values_.data() + pack * kernel_ * length_ + skipped * kPack;
        int64_t slot = top_ % kernel_;
        for (int64_t i = 0; i < count_; ++i) {
            rows_[i] = start + slot * length_;
            slot = slot + 1 == kernel_ ? 0 : slot + 1;
        }
        return rows_.data();
    }

  private:
    A* row(int64_t y, int64_t pack) { return values_.data() + (pack * kernel_ + y % kernel_) * length_; }

    int64_t height_, kernel_, length_, next_ = 0, first_ = 0, count_ = 0, top_ = 0;
    Lines<A> values_;
    std::vector<const A*> rows_;
};

// Weights [mid_stored, kernel, kernel] of `mid` channels as [pack][kernel * kernel][kPack], zeros behind the last one.
template <typename A, typename T>
Lines<A> pack_depthwise(const T* weights, int64_t mid, int64_t kernel, bool flipped) {
    const int64_t taps = kernel * kernel;
    Lines<A> packed((mid + kPack - 1) / kPack * kPack * taps, A(0));
    for (int64_t m = 0; m < mid; ++m)
        for (int64_t t = 0; t < taps; ++t)
            packed[(m / kPack * taps + (flipped ? taps - 1 - t : t)) * kPack + m % kPack] =
                widen(weights[m * taps + t]);
    return packed;
}

}  // namespace spos::cpu
