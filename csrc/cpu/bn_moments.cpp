// Statistics by tile: a tile fits in the L1 cache, so it is read from memory once and walked twice, first for its mean,
// then for the moments about that mean. Tiles are merged in a fixed order in double by the rule of Chan, Golub and
// LeVeque ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).
#include "csrc/cpu/bn_moments.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "csrc/cpu/moments.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {
namespace {

constexpr int64_t kLanes = 512;     // channels (or pixels times channels) walked side by side, channels last
constexpr int64_t kTile = 8192;     // elements in a channels-last tile: 32 KiB of float
constexpr int64_t kSegment = 2048;  // elements in an NCHW tile
constexpr int64_t kTaskElements = 65536;
constexpr int64_t kMaxChunks = 64;       // partial results a channel: bounds the workspace
constexpr int64_t kChannelsPerTask = 8;  // NCHW

struct Moments {
    double count = 0, mean = 0, m2 = 0;

    void merge(const Moments& other) {
        const double total = count + other.count;
        const double weight = other.count / total;
        const double delta = other.mean - mean;
        mean += delta * weight;
        m2 += other.m2 + delta * delta * count * weight;
        count = total;
    }
};

// Moments about a rounded mean, made exact: with r = sum(x - mean) and q = sum((x - mean)^2), the true mean is
// mean + r/n and the true second moment q - r^2/n.
SPOS_SIMD_INLINE double exact_m2(double residual, double square, double inverse_n) {
    const double m2 = square - residual * residual * inverse_n;
    return m2 < 0 ? 0 : m2;  // rounding only; a NaN stays a NaN
}

// Sums of one tile for a few packs of columns: the mean, and residual and square about it. `kWidth` packs side by side
// keep the adders busy.
template <int kWidth, typename T, typename A>
SPOS_SIMD_INLINE void tile_columns(const T* tile, int64_t pitch, int64_t rows, A* centre, A* residual, A* square) {
    using Pack = decltype(load_pack(tile));
    Pack sum[kWidth] = {}, r[kWidth] = {}, q[kWidth] = {};
    for (int64_t row = 0; row < rows; ++row)
        for (int w = 0; w < kWidth; ++w) sum[w] += load_pack(tile + row * pitch + w * kPack);
    for (int w = 0; w < kWidth; ++w) sum[w] /= static_cast<A>(rows);
    for (int64_t row = 0; row < rows; ++row)
        for (int w = 0; w < kWidth; ++w) {
            const Pack d = load_pack(tile + row * pitch + w * kPack) - sum[w];
            r[w] += d;
            q[w] += d * d;
        }
    std::memcpy(centre, sum, sizeof sum);
    std::memcpy(residual, r, sizeof r);
    std::memcpy(square, q, sizeof q);
}

template <typename T, typename A>
SPOS_SIMD_INLINE void tile_column(const T* tile, int64_t pitch, int64_t rows, A* centre, A* residual, A* square) {
    A sum = 0, r = 0, q = 0;
    for (int64_t row = 0; row < rows; ++row) sum += widen(tile[row * pitch]);
    sum /= static_cast<A>(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const A d = widen(tile[row * pitch]) - sum;
        r += d;
        q += d * d;
    }
    *centre = sum, *residual = r, *square = q;
}

// `rows` rows of `lanes` <= kLanes neighbouring values, `pitch` apart: the moments of each column.
template <typename T>
SPOS_SIMD_INLINE void walk_columns(const T* x, int64_t pitch, int64_t rows, int64_t lanes, double* mean, double* m2) {
    using A = decltype(widen(T{}));
    A centre[kLanes], residual[kLanes], square[kLanes];
    double done = 0;
    const int64_t tile_rows = std::clamp<int64_t>(kTile / lanes, 32, 256);
    for (int64_t first = 0; first < rows; first += tile_rows) {
        const int64_t height = std::min(tile_rows, rows - first);
        const T* tile = x + first * pitch;
        int64_t l = 0;
        for (; l + 2 * kPack <= lanes; l += 2 * kPack)
            tile_columns<2>(tile + l, pitch, height, centre + l, residual + l, square + l);
        for (; l < lanes && lanes >= kPack; l += kPack) {
            l = std::min(l, lanes - kPack);  // the last pack may cover columns again, with the same results
            tile_columns<1>(tile + l, pitch, height, centre + l, residual + l, square + l);
        }
        for (; l < lanes; ++l) tile_column(tile + l, pitch, height, centre + l, residual + l, square + l);

        const double n = static_cast<double>(height), total = done + n, weight = n / total;
        const double inverse = 1.0 / n, cross = done * weight;
        for (l = 0; l < lanes; ++l) {
            const double delta = centre[l] + residual[l] * inverse - mean[l];
            mean[l] += delta * weight;
            m2[l] += exact_m2(residual[l], square[l], inverse) + delta * delta * cross;
        }
        done = total;
    }
}

// One channel of `rows` rows (samples) of `length` values each, `pitch` apart: several short rows make one tile.
template <typename T>
SPOS_SIMD_INLINE Moments walk_rows(const T* x, int64_t pitch, int64_t rows, int64_t length) {
    using A = decltype(widen(T{}));
    using Pack = decltype(load_pack(x));
    Moments result;
    const int64_t segment = std::min(length, kSegment);
    const int64_t rows_in_tile = std::max<int64_t>(1, kSegment / 2 / length);
    for (int64_t first = 0; first < rows; first += rows_in_tile) {
        const int64_t height = std::min(rows_in_tile, rows - first);
        for (int64_t start = 0; start < length; start += segment) {
            const int64_t width = std::min(segment, length - start), rest = width % kPack;
            const T* tile = x + first * pitch + start;
            const double n = static_cast<double>(height * width), inverse = 1.0 / n;

            Pack even = {}, odd = {}, end = {};  // `end` takes what is left of a row behind its last whole pack
            for (int64_t r = 0; r < height; ++r) {
                const T* row = tile + r * pitch;
                int64_t i = 0;
                for (; i + 2 * kPack <= width; i += 2 * kPack)
                    even += load_pack(row + i), odd += load_pack(row + i + kPack);
                if (i + kPack <= width) even += load_pack(row + i), i += kPack;
                if (rest > 0) end += load_partial(row + i, rest);
            }
            const A centre = sum_of<A>(even + odd + end) / static_cast<A>(n);

            Pack residual[2] = {}, square[2] = {}, end_residual = {}, end_square = {};
            for (int64_t r = 0; r < height; ++r) {
                const T* row = tile + r * pitch;
                int64_t i = 0;
                for (; i + 2 * kPack <= width; i += 2 * kPack) {
                    const Pack d = load_pack(row + i) - centre, e = load_pack(row + i + kPack) - centre;
                    residual[0] += d, residual[1] += e;
                    square[0] += d * d, square[1] += e * e;
                }
                if (i + kPack <= width) {
                    const Pack d = load_pack(row + i) - centre;
                    residual[0] += d, square[0] += d * d;
                    i += kPack;
                }
                if (rest > 0) {
                    const Pack d = load_partial(row + i, rest) - centre;
                    end_residual += d, end_square += d * d;
                }
            }
            // Lanes of `end` past the rest hold no data.
            const A r = sum_of<A>(residual[0] + residual[1]) + sum_of<A>(end_residual, rest);
            const A q = sum_of<A>(square[0] + square[1]) + sum_of<A>(end_square, rest);
            result.merge({n, centre + r * inverse, exact_m2(r, q, inverse)});
        }
    }
    return result;
}

// Clones cannot be templates: one named function for each element type.
#define SPOS_WALKS(T)                                                                                                 \
    SPOS_SIMD_CLONES void columns(const T* x, int64_t pitch, int64_t rows, int64_t lanes, double* mean, double* m2) { \
        walk_columns(x, pitch, rows, lanes, mean, m2);                                                                \
    }                                                                                                                 \
    SPOS_SIMD_CLONES Moments row_by_row(const T* x, int64_t pitch, int64_t rows, int64_t length) {                    \
        return walk_rows(x, pitch, rows, length);                                                                     \
    }
SPOS_WALKS(float)
SPOS_WALKS(double)
SPOS_WALKS(Half)
SPOS_WALKS(BFloat16)
#undef SPOS_WALKS

// `rows` pixels of `channels` <= kLanes neighbouring channels. Few packed channels would leave the vectors empty, so
// then several pixels are walked side by side as one long row.
template <typename T>
void column_chunk(const T* x, int64_t pitch, int64_t rows, int64_t channels, Moments* out) {
    int64_t side_by_side = 1;
    if (pitch == channels)
        while (side_by_side * channels < kLanes / 8 || side_by_side * channels % kPack != 0) {
            if (2 * side_by_side * channels > kLanes) break;
            side_by_side *= 2;
        }
    const int64_t long_rows = rows / side_by_side;
    double mean[kLanes] = {}, m2[kLanes] = {};
    if (long_rows > 0) columns(x, pitch * side_by_side, long_rows, channels * side_by_side, mean, m2);
    for (int64_t c = 0; c < channels; ++c) {
        out[c] = {static_cast<double>(long_rows), mean[c], m2[c]};
        if (long_rows == 0) continue;
        for (int64_t k = 1; k < side_by_side; ++k)
            out[c].merge({static_cast<double>(long_rows), mean[k * channels + c], m2[k * channels + c]});
    }
    const int64_t rest = rows - long_rows * side_by_side;
    if (rest == 0) return;
    std::fill_n(mean, channels, 0.0);
    std::fill_n(m2, channels, 0.0);
    columns(x + long_rows * side_by_side * pitch, pitch, rest, channels, mean, m2);
    for (int64_t c = 0; c < channels; ++c) out[c].merge({static_cast<double>(rest), mean[c], m2[c]});
}

template <typename T, typename Out>
void moments(const T* x, const MomentsShape& s, Out* mean, Out* m2, const ParallelFor& parallel_for) {
    // A task is one block of channels over one chunk of rows (pixels or samples) of one group.
    const int64_t rows = s.channels_last ? s.count() : s.samples;
    const int64_t row_length = s.channels_last ? 1 : s.pixels;
    const int64_t block = std::min(s.channels, s.channels_last ? kLanes : kChannelsPerTask);
    const int64_t blocks = divide_up(s.channels, block);
    const int64_t chunk = std::max(divide_up(rows, kMaxChunks), divide_up(kTaskElements, block * row_length));
    const int64_t chunks = divide_up(rows, chunk);

    std::vector<Moments> partial(s.groups * chunks * s.channels);
    parallel_for(s.groups * chunks * blocks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t c = task % blocks * block, k = task / blocks % chunks, g = task / blocks / chunks;
            const int64_t channels = std::min(block, s.channels - c);
            const int64_t height = std::min(chunk, rows - k * chunk);
            const T* start = x + (g * rows + k * chunk) * s.pitch;
            Moments* out = partial.data() + (g * chunks + k) * s.channels + c;
            if (s.channels_last) {
                column_chunk(start + c, s.pitch, height, channels, out);
            } else {
                for (int64_t i = 0; i < channels; ++i)
                    out[i] = row_by_row(start + (c + i) * s.pixels, s.pitch, height, s.pixels);
            }
        }
    });

    for (int64_t g = 0; g < s.groups; ++g) {
        Moments* first = partial.data() + g * chunks * s.channels;
        for (int64_t c = 0; c < s.channels; ++c) {
            for (int64_t k = 1; k < chunks; ++k) first[c].merge(first[k * s.channels + c]);
            mean[g * s.channels + c] = static_cast<Out>(first[c].mean);
            m2[g * s.channels + c] = static_cast<Out>(first[c].m2);
        }
    }
}

}  // namespace

void bn_moments(DType dtype, const void* x, const MomentsShape& shape, void* mean, void* m2,
                const ParallelFor& parallel_for) {
    auto run = [&](auto* typed_x, auto* typed_mean) {
        moments(typed_x, shape, typed_mean, static_cast<decltype(typed_mean)>(m2), parallel_for);
    };
    switch (dtype) {
        case DType::float32:
            return run(static_cast<const float*>(x), static_cast<float*>(mean));
        case DType::float64:
            return run(static_cast<const double*>(x), static_cast<double*>(mean));
        case DType::float16:
            return run(static_cast<const Half*>(x), static_cast<float*>(mean));
        case DType::bfloat16:
            return run(static_cast<const BFloat16*>(x), static_cast<float*>(mean));
    }
}

}  // namespace spos::cpu
