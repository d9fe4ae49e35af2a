// Mean and centred second moment of many channels side by side, and how two sets of them become one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace spos::cpu {

inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// The moments of `count` and of `other_count` values, for each of `channels`, merged into the first by the rule of
// Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
inline void merge_moments(double count, double* mean, double* m2, double other_count, const double* other_mean,
                          const double* other_m2, int64_t channels) {
    if (other_count == 0) return;
    const double weight = other_count / (count + other_count), cross = count * weight;
    for (int64_t c = 0; c < channels; ++c) {
        const double delta = other_mean[c] - mean[c];
        mean[c] += delta * weight;
        m2[c] += other_m2[c] + delta * delta * cross;
    }
}

}  // namespace spos::cpu
