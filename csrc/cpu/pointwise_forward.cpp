#include "csrc/cpu/deviations.h"
#include "csrc/cpu/layers.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/unit_infer_kernels.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kStep = 28;      // pixels between two rounds of prefetching in a matrix product
constexpr int64_t kTileRows = 14;  // of these, in one tile

template <typename T>
class PointwiseForward {
    using A = typename Compute<T>::type;

  public:
    explicit PointwiseForward(const Pointwise<T>& layer)
        : l_(layer),
          folded_(layer.input.scale && !layer.input.relu),
          // A block that will be written over before its last panel is read is copied first.
          copied_(!std::is_same_v<T, A> || layer.input.relu || layer.input.start == layer.z) {}

    Moments run(const ParallelFor& parallel_for) {
        pack_weights(parallel_for);
        const PixelTasks tasks(l_.pixels, kMostTasks);
        Statistics statistics(tasks.count, l_.out);
        parallel_for(tasks.count, [&](int64_t begin, int64_t end) {
            const auto buffer = scratch<A>(copied_ ? kBlock * l_.in : 0);
            const auto results = scratch<A>(kStep * most_panel_packs() * kPack);
            Deviations<A> deviations(packed_.packs());
            each_task(begin, end, l_.backwards, [&](int64_t task, int64_t next) {
                deviations.start();
                for (int64_t pixel = tasks.begin(task); pixel < tasks.end(task); pixel += kBlock) {
                    const int64_t behind = pixel + kBlock;
                    block(pixel, std::min(kBlock, tasks.end(task) - pixel),
                          behind < tasks.end(task) ? behind : tasks.begin(next), buffer.get(), results.get(),
                          deviations, pixel == tasks.begin(task));
                    deviations.settle();
                }
                statistics.counts[task] = tasks.end(task) - tasks.begin(task);
                deviations.moments(statistics.counts[task], l_.out, statistics.mean(task), statistics.m2(task));
            });
        });
        return statistics.merged();
    }

  private:
    // Without a ReLU between, the input's scale goes into the weights and its shift into the sums' start.
    void pack_weights(const ParallelFor& parallel_for) {
        packed_.reserve(l_.in, l_.out);
        start_.assign(packed_.packs() * kPack, A(0));
        parallel_for(packed_.panels(), [&](int64_t begin, int64_t end) {
            for (int64_t panel = begin; panel < end; ++panel)
                pack_pointwise(l_.weight, l_.weight_pitch, PackScale<A>{nullptr, folded_ ? l_.input.scale : nullptr},
                               panel, Panels<A>{packed_.values.data(), packed_.depth, packed_.columns});
            const int64_t width = panel_packs() * kPack, last = end == packed_.panels() ? l_.out : end * width;
            for (int64_t j = begin * width; folded_ && j < last; ++j)
                start_[j] = static_cast<A>(dot(l_.weight + j * l_.weight_pitch, l_.input.shift, l_.in));
        });
    }

    // next: where the block behind this one begins.
    void block(int64_t pixel, int64_t pixels, int64_t next, A* buffer, A* results, Deviations<A>& deviations,
               bool fresh) const {
        // Copying reads in one stream, which no matrix product does: the product finds x in the cache.
        l_.passing.copy(pixel, pixels, 0, l_.in);
        const A* input = buffer;
        int64_t pixel_step = l_.in, channel_step = 1;
        if constexpr (std::is_same_v<T, A>)
            if (!copied_) {  // every other value of x is an odd channel: no need to gather them
                input = l_.input.start + pixel * l_.input.pitch;
                pixel_step = l_.input.pitch, channel_step = l_.input.step;
            }
        if (copied_) {
            Input<T> from = l_.input;
            if (folded_) from.scale = nullptr;
            from.load(pixel, 1, pixels, 0, l_.in, buffer, l_.in);
        }
        const int64_t rounds = packed_.panels() * divide_up(pixels, kStep);
        int64_t round = 0;
        for (int64_t panel = 0; panel < packed_.panels(); ++panel) {
            const int64_t packs = packed_.packs_of(panel), width = packs * kPack;
            const int64_t first = panel * panel_packs() * kPack, used = std::min(width, l_.out - first);
            A* columns = deviations.of(panel * panel_packs());
            for (int64_t row = 0; row < pixels; row += kStep, ++round) {
                const int64_t rows = std::min(kStep, pixels - row);
                T* to = l_.z + (pixel + row) * l_.z_pitch + first;
                // The processor fetches what comes next while it multiplies.
                prefetch_rows<true>(to, l_.z_pitch * sizeof(T), rows, used * sizeof(T));
                const int64_t soon = std::min(l_.pixels, next + kBlock * round / rounds);
                const int64_t later = std::min(l_.pixels, next + kBlock * (round + 1) / rounds);
                const int64_t bytes = (later - soon) * l_.input.pitch * int64_t(sizeof(T));
                const int64_t steps = divide_up(rows, kTileRows) * l_.in;
                Product<A> product{input + row * pixel_step,
                                   pixel_step,
                                   channel_step,
                                   packed_.panel(panel),
                                   width,
                                   rows,
                                   packs,
                                   l_.in,
                                   start_.data() + first,
                                   0,
                                   results,
                                   width,
                                   reinterpret_cast<const char*>(l_.input.start + soon * l_.input.pitch),
                                   std::min<int64_t>(bytes / steps, 128),
                                   columns,
                                   fresh && row == 0};
                if constexpr (std::is_same_v<T, A>)
                    if (used == width) {
                        product.c = to, product.c_pitch = l_.z_pitch;
                        multiply(product);
                        continue;
                    }
                multiply(product);
                store_rows(static_cast<const A*>(results), width, rows, used, to, l_.z_pitch, false);
            }
        }
    }

    const Pointwise<T>& l_;
    bool folded_, copied_;
    Packed<A> packed_;
    Lines<A> start_;
};

}  // namespace

template <typename T>
Moments pointwise_forward(const Pointwise<T>& layer, const ParallelFor& parallel_for) {
    return PointwiseForward<T>(layer).run(parallel_for);
}

template <typename T>
void activate(const Input<T>& z, int64_t pixels, int64_t channels, T* out, int64_t out_pitch, bool stream,
              bool backwards, const ParallelFor& parallel_for) {
    const PixelTasks tasks(pixels, kMostTasks);
    parallel_for(tasks.count, [&](int64_t begin, int64_t end) {
        each_task(begin, end, backwards, [&](int64_t task, int64_t) {
            const int64_t pixel = tasks.begin(task);
            scale_and_shift(z.start + pixel * z.pitch, z.pitch, tasks.end(task) - pixel, channels, z.scale, z.shift,
                            z.relu, out + pixel * out_pitch, out_pitch, stream);
        });
    });
}

template <typename T>
void pass_on(const Passing<T>& passing, int64_t pixels, int64_t channels, const ParallelFor& parallel_for) {
    const PixelTasks tasks(pixels, kMostTasks);
    parallel_for(tasks.count, [&](int64_t begin, int64_t end) {
        passing.copy(tasks.begin(begin), tasks.end(end - 1) - tasks.begin(begin), 0, channels);
    });
}

#define SPOS_INSTANTIATE(T)                                                                                 \
    template Moments pointwise_forward(const Pointwise<T>&, const ParallelFor&);                            \
    template void activate(const Input<T>&, int64_t, int64_t, T*, int64_t, bool, bool, const ParallelFor&); \
    template void pass_on(const Passing<T>&, int64_t, int64_t, const ParallelFor&);
SPOS_INSTANTIATE(float)
SPOS_INSTANTIATE(double)
SPOS_INSTANTIATE(Half)
SPOS_INSTANTIATE(BFloat16)
#undef SPOS_INSTANTIATE

}  // namespace spos::cpu
