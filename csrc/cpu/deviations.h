// Moments of channels while their values are still in registers: for every pack of channels the deviations from a pivot
// are added up, and their squares. The pivot is the mean of the first values seen. However far it lies from the mean m
// of all n values, a share of at least p / n of the second moment is p (pivot - m)^2, p being the number of first
// values: so the rounding of n (pivot - m)^2, which is subtracted in the end, is at most n / p roundings of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {

// Of each pack: pivot, sum of deviations, sum of their squares.
constexpr int64_t kDeviations = 3 * kPack;

// Adds `count` values of one pack of channels, `step` apart; the first ones also make the pivot.
template <typename Pack, typename A>
SPOS_SIMD_INLINE void add_deviations(const Pack* values, int64_t count, int64_t step, A* to, bool fresh) {
    Pack pivot, sum, square;
    if (fresh) {
        pivot = values[0];
#pragma GCC unroll 16
        for (int64_t i = 1; i < count; ++i) pivot += values[i * step];
        pivot /= static_cast<A>(count);
        store_pack(to, pivot);
        sum = square = Pack{};
    } else {
        pivot = load_pack(to), sum = load_pack(to + kPack), square = load_pack(to + 2 * kPack);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < count; ++i) {
        const Pack d = values[i * step] - pivot;
        sum += d;
        square += d * d;
    }
    store_pack(to + kPack, sum), store_pack(to + 2 * kPack, square);
}

// Adds sums and squares of some packs to their totals [packs][2][kPack], and begins them anew.
void settle_deviations(float* deviations, double* totals, int64_t packs);
void settle_deviations(double* deviations, double* totals, int64_t packs);

// Means and second moments of the first channels of some packs, of `count` values each, from deviations and totals.
// Below zero by rounding only; a NaN stays one.
void deviation_moments(const float* deviations, const double* totals, int64_t count, int64_t channels, double* mean,
                       double* m2);
void deviation_moments(const double* deviations, const double* totals, int64_t count, int64_t channels, double* mean,
                       double* m2);

// What one task gathers of some packs of channels. Sums of a block are kept as the values are, those of all blocks in
// double.
template <typename A>
class Deviations {
  public:
    explicit Deviations(int64_t packs) : packs_(packs), current_(packs * kDeviations), total_(packs * 2 * kPack) {}

    void start() { std::fill(total_.begin(), total_.end(), 0.0); }
    // Of one pack, for the kernels.
    A* of(int64_t pack) { return current_.data() + pack * kDeviations; }

    // Ends a block, of all packs.
    void settle() { settle(0, packs_); }
    // That of some packs.
    void settle(int64_t pack, int64_t packs) { settle_deviations(of(pack), total_.data() + pack * 2 * kPack, packs); }

    void moments(int64_t count, int64_t channels, double* mean, double* m2) const {
        deviation_moments(current_.data(), total_.data(), count, channels, mean, m2);
    }

  private:
    int64_t packs_;
    Lines<A> current_;
    Lines<double> total_;
};

}  // namespace spos::cpu
