// A task is a band of a sample's output rows. It quantizes the input rows that these need, with a border of zeros, into
// memory that stays in the second-level cache. A tile is some pixels of a row by 32 output channels: with VNNI its sums
// stay in registers while four input channels at a time go by.
#include "csrc/cpu/integer_conv.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <type_traits>
#include <utility>

#include "csrc/cpu/deviations.h"
#include "csrc/cpu/memory.h"
#include "csrc/cpu/quant_codes.h"
#include "csrc/cpu/unit_passes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace spos::cpu {
namespace {

constexpr int kPixels = 14;   // with two vectors of channels each: 28 of the 32 registers
constexpr int64_t kQuad = 4;  // input channels that one instruction multiplies and adds
constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kLeastTasks = 16;
constexpr int64_t kBlockPixels = 112;  // whose moments are added up in single precision

// What the sums of a tile are made of.
struct Taps {
    const uint8_t* codes;      // under the first tap of the first pixel
    int64_t row, pixel, next;  // bytes between a tap and the one below it; the one beside it; a pixel and the next
    int64_t height, width, quads;
    const int8_t* weights;
    int64_t vector;  // bytes of the weights of 16 output channels
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(SPOS_FIXED_TARGET)
#define SPOS_SIMD_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

// sums: [kCount][kVectors][16].
template <int kCount, int kVectors>
SPOS_SIMD_VNNI void tile_sums(const Taps& taps, int32_t* sums) {
    __m512i sum[kCount][kVectors];
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_si512();
    const int8_t* weights = taps.weights;
    const int64_t next = taps.next;
    for (int64_t ky = 0; ky < taps.height; ++ky)
        for (int64_t kx = 0; kx < taps.width; ++kx) {
            // Addresses of three pixels each differ by what one instruction can add.
            const uint8_t* from[(kCount + 2) / 3];
#pragma GCC unroll 8
            for (int i = 0; i < (kCount + 2) / 3; ++i)
                from[i] = taps.codes + ky * taps.row + kx * taps.pixel + 3 * i * next;
            for (int64_t quad = 0; quad < taps.quads; ++quad, weights += kPack * kQuad) {
                __m512i weight[kVectors];
#pragma GCC unroll 2
                for (int j = 0; j < kVectors; ++j) weight[j] = _mm512_loadu_si512(weights + j * taps.vector);
#pragma GCC unroll 16
                for (int i = 0; i < kCount; ++i) {
                    int32_t four;
                    std::memcpy(&four, from[i / 3] + (i % 3) * next + quad * kQuad, sizeof four);
                    const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                    for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], codes, weight[j]);
                }
            }
        }
    for (int i = 0; i < kCount; ++i)
        for (int j = 0; j < kVectors; ++j) _mm512_storeu_si512(sums + (i * kVectors + j) * kPack, sum[i][j]);
}

template <int kVectors, int... kCounts>
constexpr auto tiles(std::integer_sequence<int, kCounts...>) {
    return std::array<void (*)(const Taps&, int32_t*), sizeof...(kCounts)>{tile_sums<kCounts + 1, kVectors>...};
}

bool has_vnni() {
    static const bool has = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    return has;
}
#endif

// The same for machines without VNNI, one pixel and four channels after the other.
void plain_sums(const Taps& taps, int64_t pixels, int64_t vectors, int32_t* sums) {
    std::fill_n(sums, pixels * vectors * kPack, 0);
    for (int64_t i = 0; i < pixels; ++i)
        for (int64_t j = 0; j < vectors; ++j) {
            const int8_t* weights = taps.weights + j * taps.vector;
            int32_t* const sum = sums + (i * vectors + j) * kPack;
            for (int64_t ky = 0; ky < taps.height; ++ky)
                for (int64_t kx = 0; kx < taps.width; ++kx) {
                    const uint8_t* codes = taps.codes + ky * taps.row + kx * taps.pixel + i * taps.next;
                    for (int64_t quad = 0; quad < taps.quads; ++quad, codes += kQuad)
                        for (int64_t lane = 0; lane < kPack; ++lane)
                            for (int64_t c = 0; c < kQuad; ++c) sum[lane] += codes[c] * *weights++;
                }
        }
}

void sums_of(const Taps& taps, int64_t pixels, int64_t vectors, int32_t* sums) {
#ifdef SPOS_SIMD_VNNI
    static constexpr auto kOne = tiles<1>(std::make_integer_sequence<int, kPixels>());
    static constexpr auto kTwo = tiles<2>(std::make_integer_sequence<int, kPixels>());
    if (has_vnni()) return (vectors == 1 ? kOne : kTwo)[pixels - 1](taps, sums);
#endif
    plain_sums(taps, pixels, vectors, sums);
}

// Of a tile: from its first pixel and channel on.
template <typename T>
struct Place {
    const float *scale, *shift;
    bool relu;
    T* out;
    int64_t pitch;
    float* deviations;  // of the first pack, or null
    bool fresh;
};

typedef int32_t IntegerPack __attribute__((vector_size(kPack * sizeof(int32_t))));

SPOS_SIMD_INLINE FloatPack in_floats(const int32_t* from) {
    IntegerPack pack;
    std::memcpy(&pack, from, sizeof pack);
    return __builtin_convertvector(pack, FloatPack);
}

// Clones cannot be templates, nor can one function be for two instruction sets: a named one for each element type, and
// one that stores past the caches. What narrow types hold is what counts for the moments.
#define SPOS_FINISH(ATTRIBUTE, NAME, T, STORE)                                                                \
    ATTRIBUTE void NAME(const int32_t* sums, int64_t pixels, int64_t vectors, const Place<T>& to) {           \
        for (int64_t j = 0; j < vectors; ++j) {                                                               \
            const FloatPack scale = load_pack(to.scale + j * kPack), shift = load_pack(to.shift + j * kPack); \
            FloatPack values[kPixels];                                                                        \
            for (int64_t i = 0; i < pixels; ++i) {                                                            \
                values[i] = in_floats(sums + (i * vectors + j) * kPack) * scale + shift;                      \
                if (to.relu) values[i] = values[i] < 0 ? FloatPack{} : values[i];                             \
                STORE(to.out + i * to.pitch + j * kPack, values[i]);                                          \
                if (!std::is_same_v<T, float>) values[i] = load_pack(to.out + i * to.pitch + j * kPack);      \
            }                                                                                                 \
            if (to.deviations) add_deviations(values, pixels, 1, to.deviations + j * kDeviations, to.fresh);  \
        }                                                                                                     \
    }
SPOS_FINISH(SPOS_SIMD_CLONES, finish, float, store_pack)
SPOS_FINISH(SPOS_SIMD_CLONES, finish, Half, store_pack)
SPOS_FINISH(SPOS_SIMD_CLONES, finish, BFloat16, store_pack)
SPOS_FINISH(SPOS_SIMD_WIDE, finish_streaming, float, stream_pack)
#undef SPOS_FINISH

SPOS_SIMD_WIDE void end_streaming() {
    end_of_stream();
}

// Bands of output rows of a sample, by the shape alone.
struct Bands {
    int64_t of_sample, rows, count;

    explicit Bands(const IntegerConvShape& s) {
        const int64_t bytes = s.height * s.width * s.in_channels;
        const int64_t wanted = std::max(divide_up(kLeastTasks, s.samples), divide_up(bytes, kTaskBytes));
        rows = divide_up(s.out_height, std::min(wanted, s.out_height));
        of_sample = divide_up(s.out_height, rows);
        count = s.samples * of_sample;
    }
};

template <typename T>
class Convolution {
  public:
    Convolution(const IntegerConvShape& s, const ToQuantize& in, const int8_t* weights, const ScaledSums& result)
        : s_(s),
          in_(in),
          weights_(weights),
          result_(result),
          prologue_(s.in_channels, in.scale, in.shift),
          bands_(s),
          pitch_((s.width + 2 * s.horizontal_padding) * s.in_channels),
          streams_(std::is_same_v<T, float> && machine_is_wide() &&
                   s.samples * s.out_height * s.out_width * s.out_channels * int64_t(sizeof(T)) > kKept &&
                   streamable(static_cast<const T*>(result.out), s.out_channels, s.out_channels)),
          most_rows_((bands_.rows - 1) * s.vertical_stride + s.kernel_height) {}

    bool run(const ParallelFor& parallel_for) {
        const bool moments = result_.mean != nullptr;
        Statistics statistics(moments ? bands_.count : 0, s_.out_channels);
        std::atomic<bool> numbers{true};
        parallel_for(bands_.count, [&](int64_t begin, int64_t end) {
            Lines<uint8_t> padded(most_rows_ * pitch_), unread(s_.width * s_.in_channels);
            Deviations<float> deviations(moments ? s_.out_channels / kPack : 0);
            for (int64_t task = begin; task < end; ++task) {
                const int64_t top = task % bands_.of_sample * bands_.rows;
                const Band band{task / bands_.of_sample, top, std::min(bands_.rows, s_.out_height - top), padded.data(),
                                unread.data()};
                if (moments) deviations.start();
                if (!convolve(band, moments ? &deviations : nullptr)) numbers = false;
                if (!moments) continue;
                statistics.counts[task] = band.rows * s_.out_width;
                deviations.moments(statistics.counts[task], s_.out_channels, statistics.mean(task),
                                   statistics.m2(task));
            }
            if (streams_) end_streaming();
        });
        if (moments) {
            const Moments all = statistics.merged();
            std::copy(all.mean.begin(), all.mean.end(), result_.mean);
            std::copy(all.m2.begin(), all.m2.end(), result_.m2);
        }
        return numbers;
    }

  private:
    // Output rows of a sample, and memory for the codes that they are made of.
    struct Band {
        int64_t sample, top, rows;
        uint8_t *padded, *unread;
    };

    // Some output rows at a time: the input rows that they read, whose values were asked for a while ago, then the
    // sums.
    bool convolve(const Band& band, Deviations<float>* deviations) const {
        const int64_t together = std::max<int64_t>(1, kBlockPixels / s_.out_width);
        const int64_t first = band.top * s_.vertical_stride - s_.vertical_padding;
        // Each input row belongs to one band, which keeps its codes; those that nobody reads are quantized too, for a
        // NaN there shows as everywhere else.
        const int64_t own = band.top * s_.height / s_.out_height;
        const int64_t own_end = (band.top + band.rows) * s_.height / s_.out_height;
        int64_t loaded = std::min(first, own);
        bool numbers = true;
        for (int64_t begin = 0; begin < band.rows; begin += together) {
            const int64_t end = std::min(band.rows, begin + together);
            const int64_t behind = first + (end - 1) * s_.vertical_stride + s_.kernel_height;
            const int64_t until = end == band.rows ? std::max(behind, own_end) : behind;
            for (; loaded < until; ++loaded)
                numbers &= load(band, loaded, loaded - first, loaded >= own && loaded < own_end);
            ask_for(band.sample, until, std::min(until + together * s_.vertical_stride, own_end));
            multiply(band, begin, end, begin == 0, deviations);
        }
        return numbers;
    }

    void ask_for(int64_t sample, int64_t begin, int64_t end) const {
        const int64_t row = s_.width * s_.in_channels;
        if (begin < end)
            prefetch_rows<false>(static_cast<const T*>(in_.x) + (sample * s_.height + begin) * row, 0, 1,
                                 (end - begin) * row * int64_t(sizeof(T)));
    }

    // Codes of an input row, the `place`th that the band reads, with zeros beside it; a row of zeros where there is
    // none.
    bool load(const Band& band, int64_t row, int64_t place, bool owned) const {
        const int64_t bytes = s_.width * s_.in_channels, border = s_.horizontal_padding * s_.in_channels;
        const bool inside = row >= 0 && row < s_.height;
        const bool read = place >= 0 && place < (band.rows - 1) * s_.vertical_stride + s_.kernel_height;
        uint8_t* const to = read ? band.padded + place * pitch_ + border : band.unread;
        if (read && !inside) std::fill_n(to - border, pitch_, uint8_t(0));
        if (!inside) return true;
        if (read) std::fill_n(to - border, border, uint8_t(0)), std::fill_n(to + bytes, border, uint8_t(0));
        const int64_t at = (band.sample * s_.height + row) * bytes;
        const bool numbers =
            quantize_pixels(static_cast<const T*>(in_.x) + at, s_.width, prologue_, in_.quantizer, in_.step, to);
        if (owned && in_.codes) std::copy_n(to, bytes, in_.codes + at);
        return numbers;
    }

    // Output rows from `begin` to `end` of a band.
    void multiply(const Band& band, int64_t begin, int64_t end, bool first, Deviations<float>* deviations) const {
        const int64_t quads = s_.in_channels / kQuad, next = s_.horizontal_stride * s_.in_channels;
        const int64_t vector = s_.kernel_height * s_.kernel_width * quads * kQuad * kPack;
        const int64_t tiles = divide_up(s_.out_width, kPixels);
        alignas(64) int32_t sums[kPixels * 2 * kPack];
        for (int64_t c = 0; c < s_.out_channels; c += 2 * kPack) {
            const int64_t vectors = std::min<int64_t>(2, (s_.out_channels - c) / kPack);
            int64_t unsettled = 0;
            for (int64_t row = begin; row < end; ++row)
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t x = tile * s_.out_width / tiles, pixels = (tile + 1) * s_.out_width / tiles - x;
                    sums_of({band.padded + row * s_.vertical_stride * pitch_ + x * next, pitch_, s_.in_channels, next,
                             s_.kernel_height, s_.kernel_width, quads, weights_ + c / kPack * vector, vector},
                            pixels, vectors, sums);
                    const int64_t pixel = (band.sample * s_.out_height + band.top + row) * s_.out_width + x;
                    const Place<T> to{result_.scale + c,
                                      result_.shift + c,
                                      result_.relu,
                                      static_cast<T*>(result_.out) + pixel * s_.out_channels + c,
                                      s_.out_channels,
                                      deviations ? deviations->of(c / kPack) : nullptr,
                                      first && row == begin && tile == 0};
                    if constexpr (std::is_same_v<T, float>)
                        streams_ ? finish_streaming(sums, pixels, vectors, to) : finish(sums, pixels, vectors, to);
                    else
                        finish(sums, pixels, vectors, to);
                    unsettled += pixels;
                    const bool last = row + 1 == end && tile + 1 == tiles;
                    if (deviations && (unsettled + kPixels > kBlockPixels || last))
                        deviations->settle(c / kPack, vectors), unsettled = 0;
                }
        }
    }

    const IntegerConvShape& s_;
    const ToQuantize& in_;
    const int8_t* weights_;
    const ScaledSums& result_;
    const Prologue<float> prologue_;
    const Bands bands_;
    const int64_t pitch_;  // bytes of a padded row
    const bool streams_;
    const int64_t most_rows_;
};

}  // namespace

void pack_codes(const int8_t* codes, int64_t out_channels, int64_t in_channels, int64_t taps, int8_t* to,
                const ParallelFor& parallel_for) {
    const int64_t filter = in_channels * taps, quads = in_channels / kQuad;
    parallel_for(out_channels / kPack, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            int8_t* at = to + block * kPack * filter;
            for (int64_t tap = 0; tap < taps; ++tap)
                for (int64_t quad = 0; quad < quads; ++quad)
                    for (int64_t lane = 0; lane < kPack; ++lane) {
                        const int8_t* from = codes + (block * kPack + lane) * filter + quad * kQuad * taps + tap;
                        for (int64_t c = 0; c < kQuad; ++c) *at++ = from[c * taps];
                    }
        }
    });
}

bool integer_conv(const IntegerConvShape& shape, const ToQuantize& in, const int8_t* weights, const ScaledSums& result,
                  const ParallelFor& parallel_for) {
    switch (in.dtype) {
        case DType::float32:
            return Convolution<float>(shape, in, weights, result).run(parallel_for);
        case DType::float16:
            return Convolution<Half>(shape, in, weights, result).run(parallel_for);
        case DType::bfloat16:
            return Convolution<BFloat16>(shape, in, weights, result).run(parallel_for);
        case DType::float64:
            break;
    }
    return false;
}

}  // namespace spos::cpu
