#include "csrc/cpu/depthwise_rows.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/shuffle_unit.h"
#include "csrc/cpu/unit_kernels.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kMostTasks = 64;  // of one pass: bounds the partial statistics
constexpr int64_t kRowsAhead = 4;   // how early the depthwise pass asks for its input
constexpr int64_t kStep = 28;       // pixels between two rounds of prefetching in a matrix product

// What each pixel has somewhere in memory.
struct Nearby {
    const void* start = nullptr;
    int64_t pitch = 0, bytes = 0;

    template <bool kWrite>
    void prefetch(int64_t begin, int64_t end) const {
        prefetch_rows<kWrite>(static_cast<const char*>(start) + begin * pitch, pitch, end - begin, bytes);
    }
};

template <typename T>
class Forward {
    using A = typename Compute<T>::type;

  public:
    Forward(const ShuffleUnit& unit, const ShuffleUnitOutputs& outputs, const ParallelFor& parallel_for)
        : u_(unit),
          o_(outputs),
          parallel_for_(parallel_for),
          mean_(static_cast<A*>(outputs.mean)),
          var_(static_cast<A*>(outputs.var)),
          gamma_(static_cast<const A*>(unit.gamma)),
          beta_(static_cast<const A*>(unit.beta)),
          out_(static_cast<T*>(outputs.out)),
          out_pitch_(unit.half + unit.made),
          stream_(unit.pixels() * out_pitch_ * int64_t(sizeof(T)) > kKept) {}

    void run() {
        first_pointwise();
        depthwise();
        second_pointwise();
        last_activation();
    }

  private:
    // z1 = x_odd W1^T; the even channels are copied.
    void first_pointwise() {
        const T* weights = static_cast<const T*>(u_.pw1);
        const auto packed =
            pack<A>(u_.half, u_.mid, [&](int64_t k, int64_t j) { return widen(weights[j * u_.half + k]); });
        const T* x = static_cast<const T*>(u_.x);
        const int64_t row = 2 * u_.half;
        pointwise(packed, std::vector<A>(whole_packs(u_.mid)), Nearby{}, static_cast<T*>(o_.z1), o_.pitch[0], 0,
                  [&](int64_t pixel, int64_t pixels, A* buffer) {
                      // Copying reads in one stream, which no matrix product does: the product finds x in the cache.
                      copy_even_channels(x + pixel * row, row, pixels, u_.half, out_ + pixel * out_pitch_, out_pitch_,
                                         stream_);
                      // Where they lie, every other value is an odd channel: no need to gather them.
                      if constexpr (std::is_same_v<T, A>) return Rows{x + pixel * row + 1, row, 2};
                      for (int64_t i = 0; i < pixels * u_.half; ++i) buffer[i] = widen(x[pixel * row + 2 * i + 1]);
                      return Rows{buffer, u_.half, 1};
                  });
    }

    // z2 = depthwise of relu(bn1(z1)).
    void depthwise() {
        const Affine<A> norm = affine(0, u_.mid);
        const auto weights = pack_depthwise<A>(static_cast<const T*>(u_.dw), u_.mid, u_.kernel, false);
        const BandTasks tasks(u_.samples, u_.height, u_.width, u_.mid);
        Statistics statistics(tasks.samples * tasks.bands, u_.mid);
        for (int64_t place = 0; place < statistics.places; ++place) {
            const auto task = tasks[place * tasks.chunks];
            statistics.counts[place] = (task.end - task.top) * u_.width;
        }
        parallel_for_(tasks.count, [&](int64_t begin, int64_t end) {
            RowWindow<A> window(u_.height, u_.width, u_.kernel, BandTasks::kChunk / kPack);
            const int64_t rows_at_once = divide_up(kBlock / 2, u_.width);
            const auto results = scratch<A>(rows_at_once * u_.width * BandTasks::kChunk);
            for (int64_t index = begin; index < end; ++index)
                depthwise_band(tasks[index], tasks[std::min(index + 1, end - 1)], norm, weights.data(), rows_at_once,
                               window, results.get(), statistics);
        });
        statistics.finish(mean_ + u_.mid, var_ + u_.mid);
    }

    void depthwise_band(const BandTasks::Task& task, const BandTasks::Task& next, const Affine<A>& norm,
                        const A* weights, int64_t rows_at_once, RowWindow<A>& window, A* results,
                        Statistics& statistics) {
        const int64_t packs = divide_up(task.width, kPack), pitch = packs * kPack;
        const Band z1 = image(o_.z1, o_.pitch[0], task), z2 = image(o_.z2, o_.pitch[1], task);
        const Band next_z1 = image(o_.z1, o_.pitch[0], next);
        const int64_t halo = u_.kernel / 2, limit = std::min(u_.height, task.end + halo);
        const int64_t next_top = std::max<int64_t>(0, next.top - halo);
        window.start(task.top);
        int64_t done = 0;
        for (int64_t top = task.top; top < task.end; top += rows_at_once) {
            const int64_t rows = std::min(rows_at_once, task.end - top);
            for (int64_t y = top; y < top + rows; ++y) {
                const int64_t ahead = y + halo + kRowsAhead, beyond = next_top + ahead - limit;
                if (ahead < limit)
                    prefetch_rows<false>(z1.row(ahead), z1.pitch * sizeof(T), u_.width, task.width * sizeof(T));
                else if (beyond < u_.height)
                    prefetch_rows<false>(next_z1.row(beyond), z1.pitch * sizeof(T), u_.width, next.width * sizeof(T));
                prefetch_rows<true>(z2.row(y), z2.pitch * sizeof(T), u_.width, task.width * sizeof(T));
                window.reach(y, packs, [&](int64_t row, int64_t pack, A* to) {
                    const int64_t c = pack * kPack, width = std::min(kPack, task.width - c);
                    scale_and_shift(z1.row(row) + c, z1.pitch, u_.width, width, norm.scale.data() + task.channel + c,
                                    norm.shift.data() + task.channel + c, true, to, kPack);
                });
                for (int64_t pack = 0; pack < packs; ++pack)
                    depthwise_row(window.rows(pack), window.first(), window.count(),
                                  weights + (task.channel / kPack + pack) * u_.kernel * u_.kernel * kPack, u_.kernel,
                                  u_.width, results + (y - top) * u_.width * pitch + pack * kPack, pitch);
            }
            store_with_moments(results, pitch, rows * u_.width, task.width, z2.row(top), z2.pitch, done,
                               statistics.mean(task.place) + task.channel, statistics.m2(task.place) + task.channel);
            done += rows * u_.width;
        }
    }

    // The rows of a task's image, from its first channel on.
    struct Band {
        T* start;
        int64_t width, pitch;  // pixels in a row, and values from one pixel to the next

        T* row(int64_t y) const { return start + y * width * pitch; }
    };
    Band image(void* data, int64_t pitch, const BandTasks::Task& task) const {
        return {static_cast<T*>(data) + task.sample * u_.height * u_.width * pitch + task.channel, u_.width, pitch};
    }

    // z3 = bn2(z2) W2^T. No ReLU lies between: the scale goes into the weights, the shift into the sums' start.
    void second_pointwise() {
        const Affine<A> norm = affine(u_.mid, u_.mid);
        const T* weights = static_cast<const T*>(u_.pw2);
        const auto packed = pack<A>(u_.mid, u_.made, [&](int64_t k, int64_t j) {
            return static_cast<A>(widen(weights[j * u_.mid_stored + k]) * norm.scale[k]);
        });
        std::vector<A> start(whole_packs(u_.made));
        for (int64_t j = 0; j < u_.made; ++j) {
            double sum[4] = {};  // one chain of additions would wait for itself
            for (int64_t k = 0; k < u_.mid; ++k)
                sum[k % 4] += double(widen(weights[j * u_.mid_stored + k])) * norm.shift[k];
            start[j] = static_cast<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
        }
        const T* z2 = static_cast<const T*>(o_.z2);
        const int64_t pitch = o_.pitch[1];
        // A block that will be written over before its last panel is read, or has gaps, is copied.
        const bool copied = o_.z2 == o_.z3 || pitch != u_.mid;
        const int64_t size = sizeof(T);
        pointwise(packed, start, Nearby{z2, pitch * size, u_.mid * size}, static_cast<T*>(o_.z3), o_.pitch[2],
                  2 * u_.mid, [&](int64_t pixel, int64_t pixels, A* buffer) {
                      if (!copied) return Rows{widened(z2 + pixel * pitch, pixels * u_.mid, buffer), u_.mid, 1};
                      for (int64_t p = 0; p < pixels; ++p) {
                          const T* row = z2 + (pixel + p) * pitch;
                          std::copy_n(widened(row, u_.mid, buffer + p * u_.mid), u_.mid, buffer + p * u_.mid);
                      }
                      return Rows{buffer, u_.mid, 1};
                  });
    }

    void last_activation() {
        const Affine<A> norm = affine(2 * u_.mid, u_.made);
        const T* z3 = static_cast<const T*>(o_.z3);
        const PixelTasks tasks(u_.pixels(), kMostTasks);
        parallel_for_(tasks.count, [&](int64_t begin, int64_t end) {
            for (int64_t pixel = tasks.begin(begin); pixel < tasks.end(end - 1); pixel += kBlock)
                scale_and_shift(z3 + pixel * o_.pitch[2], o_.pitch[2], std::min(kBlock, u_.pixels() - pixel), u_.made,
                                norm.scale.data(), norm.shift.data(), true, out_ + pixel * out_pitch_ + u_.half,
                                out_pitch_, stream_);
        });
    }

    // Input of a matrix product: values from one pixel to the next, and from one channel to the next.
    struct Rows {
        const A* start;
        int64_t pixel_step, channel_step;
    };

    // z = start + input weights for all pixels, with statistics to `normalised` on in mean and var. read(pixel, pixels,
    // buffer) returns a block's input, in the buffer or where it lies; `source` is what it is made of.
    template <typename Read>
    void pointwise(const Packed<A>& weights, const std::vector<A>& start, const Nearby& source, T* z, int64_t pitch,
                   int64_t normalised, Read read) {
        const PixelTasks tasks(u_.pixels(), kMostTasks);
        Statistics statistics(tasks.count, weights.columns);
        parallel_for_(tasks.count, [&](int64_t begin, int64_t end) {
            const auto buffer = scratch<A>(kBlock * weights.depth);
            const auto results = scratch<A>(kBlock * panel_packs() * kPack);
            for (int64_t task = begin; task < end; ++task) {
                for (int64_t pixel = tasks.begin(task); pixel < tasks.end(task); pixel += kBlock) {
                    const int64_t pixels = std::min(kBlock, tasks.end(task) - pixel);
                    const Rows input = read(pixel, pixels, buffer.get());
                    const int64_t rounds = weights.panels() * divide_up(pixels, kStep);
                    int64_t round = 0;
                    for (int64_t panel = 0; panel < weights.panels(); ++panel) {
                        const int64_t packs = weights.packs_of(panel), width = packs * kPack;
                        const int64_t first = panel * panel_packs() * kPack;
                        const int64_t used = std::min(width, weights.columns - first);
                        T* to = z + pixel * pitch + first;
                        const Nearby place{to, pitch * int64_t(sizeof(T)), used * int64_t(sizeof(T))};
                        for (int64_t row = 0; row < pixels; row += kStep, ++round) {
                            const int64_t rows = std::min(kStep, pixels - row);
                            // The processor fetches what comes next while it multiplies.
                            place.template prefetch<true>(row, row + rows);
                            const int64_t soon = pixel + pixels + kBlock * round / rounds;
                            const int64_t later = pixel + pixels + kBlock * (round + 1) / rounds;
                            source.template prefetch<false>(std::min(soon, u_.pixels()), std::min(later, u_.pixels()));
                            multiply(Product<A>{input.start + row * input.pixel_step, input.pixel_step,
                                                input.channel_step, weights.panel(panel), width, rows, packs,
                                                weights.depth, start.data() + first, 0, results.get() + row * width,
                                                width});
                        }
                        store_with_moments(results.get(), width, pixels, used, to, pitch, pixel - tasks.begin(task),
                                           statistics.mean(task) + first, statistics.m2(task) + first);
                    }
                }
                statistics.counts[task] = tasks.end(task) - tasks.begin(task);
            }
        });
        statistics.finish(mean_ + normalised, var_ + normalised);
    }

    Affine<A> affine(int64_t normalised, int64_t channels) const {
        return {channels,
                mean_ + normalised,
                var_ + normalised,
                gamma_ ? gamma_ + normalised : nullptr,
                beta_ ? beta_ + normalised : nullptr,
                u_.epsilon};
    }

    const ShuffleUnit& u_;
    const ShuffleUnitOutputs& o_;
    const ParallelFor& parallel_for_;
    A *mean_, *var_;
    const A *gamma_, *beta_;
    T* out_;
    int64_t out_pitch_;
    bool stream_;  // `out` is written past the caches
};

}  // namespace

bool depthwise_in_place(const ShuffleUnit& unit) {
    // A band reads rows that belong to the next one.
    return BandTasks(unit.samples, unit.height, unit.width, unit.mid).bands == 1;
}

void shuffle_unit_forward(const ShuffleUnit& unit, const ShuffleUnitOutputs& outputs, const ParallelFor& parallel_for) {
    switch (unit.dtype) {
        case DType::float32:
            return Forward<float>(unit, outputs, parallel_for).run();
        case DType::float64:
            return Forward<double>(unit, outputs, parallel_for).run();
        case DType::float16:
            return Forward<Half>(unit, outputs, parallel_for).run();
        case DType::bfloat16:
            return Forward<BFloat16>(unit, outputs, parallel_for).run();
    }
}

}  // namespace spos::cpu
