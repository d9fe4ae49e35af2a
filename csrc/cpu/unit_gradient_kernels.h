// The inner loops of the fused units' backward pass; the conventions are those of unit_kernels.h.
#pragma once

#include <cstdint>

#include "csrc/cpu/unit_kernels.h"

namespace spos::cpu {

// One BN layer with ReLU or without, per channel and padded to whole packs. With d = z - mean:
//   g = grad where scale * z + shift > 0, else 0 (grad everywhere without ReLU);   dz = scale * (g - offset
//   - slope * d).
template <typename A>
struct NormGradient {
    const A *scale, *shift, *mean;
    const A *offset, *slope;
    bool relu;

    NormGradient from(int64_t channel) const {
        return {scale + channel, shift + channel, mean + channel, offset + channel, slope + channel, relu};
    }
};

// sum[c] += sum over pixels of g, product[c] += that of g * d.
template <typename T, typename A>
void gradient_sums(const T* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels, int64_t channels,
                   const NormGradient<A>& norm, double* sum, double* product);

// dz, whole packs a pixel. What lies `ahead` pixels further is asked for meanwhile; 0: what lies 8 further, as far as
// these pixels go.
template <typename G, typename T, typename A>
void norm_gradient(const G* grad, int64_t grad_pitch, const T* z, int64_t z_pitch, int64_t pixels, int64_t channels,
                   const NormGradient<A>& norm, A* to, int64_t to_pitch, int64_t ahead = 0);

// to[p] = grad[p] where y[p] is positive, else 0; sums as in gradient_sums, with z's distance from `centre`. One pack
// of channels, of which `channels` count; all are written. y: null for no mask; centre: null for no sums. In place is
// allowed.
template <typename T, typename A>
void masked_gradient(const A* grad, int64_t grad_pitch, const A* y, int64_t y_pitch, const T* z, int64_t z_pitch,
                     int64_t pixels, int64_t channels, const A* centre, A* to, int64_t to_pitch, double* sum,
                     double* product);

// One row of a depthwise convolution backwards on one pack of channels: to[x] = depthwise_row() of the rows of dz under
// flipped weights, and taps[i] += sum over x of y[x] * dz[x + i]. y: kPack values a pixel, and zeros behind its end.
// kernel: its columns, which may be others than its rows.
template <typename A>
void depthwise_gradient_row(const A* const* rows, int64_t first, int64_t count, const A* weights, int64_t kernel,
                            int64_t width, const A* y, A* to, A* taps);

// to[p][2 c] = even[p][c], to[p][2 c + 1] = odd[p][c]. `odd` has whole packs.
template <typename T, typename A>
void interleave(const T* even, int64_t even_pitch, const A* odd, int64_t odd_pitch, int64_t pixels, int64_t channels,
                T* to, int64_t to_pitch, bool stream);

// to[p][c] = from[p][c], rounded.
template <typename A, typename T>
void store_rows(const A* from, int64_t pitch, int64_t pixels, int64_t channels, T* to, int64_t to_pitch, bool stream);

// to[p][c] += from[p][c].
template <typename A>
void add_rows(const A* from, int64_t pitch, int64_t pixels, int64_t channels, A* to, int64_t to_pitch);

}  // namespace spos::cpu
