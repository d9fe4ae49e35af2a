// What the passes of the fused units have in common: how pixels become tasks, statistics that tasks leave behind, and
// batch normalisation as one multiplication and one addition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "csrc/cpu/layers.h"
#include "csrc/cpu/memory.h"
#include "csrc/cpu/moments.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {

inline int64_t whole_packs(int64_t channels) {
    return divide_up(channels, kPack) * kPack;
}

// Bytes of output that the second-level caches may keep for the next unit; more is written past them. Measured on units
// that feed each other: the third-level cache is no reason to keep it.
constexpr int64_t kKept = 2 << 20;

constexpr int64_t kMostTasks = 64;  // of one pass: bounds the partial sums

// Pixels in runs of whole blocks. A block's rows fit in the caches with a panel of weights; 112 is a multiple of the
// rows of every tile.
constexpr int64_t kBlock = 112;
struct PixelTasks {
    int64_t pixels, per_task, count;

    PixelTasks(int64_t pixels, int64_t most)
        : pixels(pixels),
          per_task(divide_up(divide_up(pixels, kBlock), most) * kBlock),
          count(divide_up(pixels, per_task)) {}
    int64_t begin(int64_t task) const { return task * per_task; }
    int64_t end(int64_t task) const { return std::min(pixels, begin(task) + per_task); }
};

// A sample's rows in bands, channels in chunks: tasks of a depthwise convolution.
struct BandTasks {
    int64_t samples, height, band, bands, channels;
    int64_t chunks;  // of channels: the fewer pixels a row has, the more channels of each, or memory is read in crumbs
    int64_t chunk;   // channels of a task; as even as whole packs allow
    int64_t count;

    // Bands begin at multiples of `step` rows.
    BandTasks(int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t step = 1)
        : samples(samples),
          height(height),
          band(std::min(height, divide_up(divide_up(4096, width), step) * step)),
          bands(divide_up(height, band)),
          channels(channels),
          chunks(divide_up(channels, kPack * (width > 28   ? 2
                                              : width > 14 ? 4
                                                           : 8))),
          chunk(divide_up(divide_up(channels, kPack), chunks) * kPack),
          count(samples * bands * chunks) {}
    struct Task {
        int64_t place;             // which of samples * bands
        int64_t sample, top, end;  // rows from top to end
        int64_t channel, width;    // first channel, and how many
    };
    // Neighbouring tasks are neighbouring channels of the same rows: they share pages, and lines of the last chunk.
    Task operator[](int64_t index) const {
        const int64_t place = index / chunks, channel = index % chunks * chunk, top = place % bands * band;
        return {place, place / bands, top, std::min(height, top + band), channel, std::min(chunk, channels - channel)};
    }
};

// What `places` tasks left, `size` values each, added in their order; the sum stays.
template <typename Values>
void add_places(Values& values, int64_t places, int64_t size) {
    for (int64_t place = 1; place < places; ++place)
        for (int64_t i = 0; i < size && !values.empty(); ++i) values[i] += values[place * size + i];
    if (!values.empty()) values.resize(size);
}

// The tasks of one thread, in either direction: body(task, the one after it, or itself at the end).
template <typename Body>
void each_task(int64_t begin, int64_t end, bool backwards, Body body) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t task = backwards ? begin + end - 1 - i : i;
        body(task, i + 1 == end ? task : backwards ? task - 1 : task + 1);
    }
}

// Moments of each channel from tasks that each saw some of the pixels.
struct Statistics {
    int64_t places, channels;
    std::vector<int64_t> counts;
    std::vector<double> means, m2s;

    Statistics(int64_t places, int64_t channels)
        : places(places), channels(channels), counts(places), means(places * channels), m2s(places * channels) {}
    double* mean(int64_t place) { return means.data() + place * channels; }
    double* m2(int64_t place) { return m2s.data() + place * channels; }

    // Of all, in the order of the places.
    Moments merged() {
        int64_t count = counts[0];
        for (int64_t place = 1; place < places; ++place) {
            merge_moments(count, mean(0), m2(0), counts[place], mean(place), m2(place), channels);
            count += counts[place];
        }
        means.resize(channels), m2s.resize(channels);
        return {std::move(means), std::move(m2s)};
    }
};

// Sum of products of stored values with others: in double, in sixteen chains that vector code adds side by side.
template <typename T, typename A>
double dot(const T* values, const A* others, int64_t size) {
    double sum[kPack] = {};
    int64_t i = 0;
    for (; i + kPack <= size; i += kPack)
        for (int64_t j = 0; j < kPack; ++j) sum[j] += double(widen(values[i + j])) * others[i + j];
    for (; i < size; ++i) sum[i % kPack] += double(widen(values[i])) * others[i];
    for (int64_t j = 1; j < kPack; ++j) sum[0] += sum[j];
    return sum[0];
}

// Batch normalisation as y = scale * z + shift; zeros behind the last channel up to a whole pack.
template <typename A>
struct Affine {
    Lines<A> scale, shift;

    Affine(int64_t channels, const A* mean, const A* var, const A* gamma, const A* beta, double epsilon)
        : scale(whole_packs(channels)), shift(whole_packs(channels)) {
        for (int64_t c = 0; c < channels; ++c) {
            const double a = (gamma ? gamma[c] : 1) / std::sqrt(double(var[c]) + epsilon);
            scale[c] = static_cast<A>(a);
            shift[c] = static_cast<A>((beta ? beta[c] : 0) - mean[c] * a);
        }
    }
};

}  // namespace spos::cpu
