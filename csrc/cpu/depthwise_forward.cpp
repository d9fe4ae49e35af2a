#include <type_traits>

#include "csrc/cpu/depthwise_rows.h"
#include "csrc/cpu/deviations.h"
#include "csrc/cpu/layers.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

template <typename T>
class DepthwiseForward {
    using A = typename Compute<T>::type;
    using Task = BandTasks::Task;

  public:
    explicit DepthwiseForward(const Depthwise<T>& layer)
        : l_(layer),
          w_(layer.window),
          out_height_(w_.out_height()),
          out_width_(w_.out_width()),
          tasks_(w_.samples, out_height_, out_width_, w_.channels),
          rows_at_once_(divide_up(kBlock / 2, out_width_)),
          weights_(pack_depthwise<A>(layer.weight, w_.channels, w_.kernel, false)) {}

    Moments run(const ParallelFor& parallel_for) {
        Statistics statistics(tasks_.samples * tasks_.bands, w_.channels);
        for (int64_t place = 0; place < statistics.places; ++place) {
            const auto task = tasks_[place * tasks_.chunks];
            statistics.counts[place] = (task.end - task.top) * out_width_;
        }
        parallel_for(tasks_.count, [&](int64_t begin, int64_t end) {
            RowWindow<A> window(w_.height, w_.width, w_.kernel, tasks_.chunk / kPack);
            const auto results = scratch<A>(out_width_ * kPack);
            Deviations<A> deviations(tasks_.chunk / kPack);
            each_task(begin, end, l_.backwards, [&](int64_t index, int64_t next) {
                const Task task = tasks_[index];
                deviations.start();
                band(task, tasks_[next], window, results.get(), deviations);
                deviations.moments(statistics.counts[task.place], task.width,
                                   statistics.mean(task.place) + task.channel,
                                   statistics.m2(task.place) + task.channel);
            });
        });
        return statistics.merged();
    }

  private:
    int64_t pixel(const Task& task, int64_t row) const { return (task.sample * w_.height + row) * w_.width; }
    int64_t out_pixel(const Task& task, int64_t row) const { return (task.sample * out_height_ + row) * out_width_; }

    void band(const Task& task, const Task& next, RowWindow<A>& window, A* results, Deviations<A>& deviations) const {
        const int64_t packs = divide_up(task.width, kPack), halo = w_.kernel / 2;
        const int64_t limit = std::min(w_.height, (task.end - 1) * w_.stride + halo + 1);
        window.start();
        for (int64_t y = task.top; y < task.end; ++y) {
            const int64_t centre = y * w_.stride;
            window.cover(centre - halo, centre - halo + w_.kernel, packs, [&](int64_t row, int64_t pack, A* to) {
                const int64_t c = pack * kPack;
                const T* soon = ahead(task, next, row + kRowsAhead, limit, c);
                // A row of x is read once, by the copy: what is taken out of it next is in the cache.
                if (pack == 0 && l_.passing.x && row >= task.top && row < task.end)
                    l_.passing.copy(pixel(task, row), w_.width, task.channel, task.width, soon);
                l_.input.load(pixel(task, row), 1, w_.width, task.channel + c, std::min(kPack, task.width - c), to,
                              kPack, soon);
            });
            for (int64_t pack = 0; pack < packs; ++pack) output(task, y, pack, window, results, deviations.of(pack));
            if ((y - task.top + 1) % rows_at_once_ == 0 || y + 1 == task.end) deviations.settle();
        }
    }

    void output(const Task& task, int64_t y, int64_t pack, RowWindow<A>& window, A* results, A* deviations) const {
        const int64_t channel = task.channel + pack * kPack, used = std::min(kPack, w_.channels - channel);
        T* z = l_.z + out_pixel(task, y) * l_.z_pitch + channel;
        PixelPacks<A> out{results, kPack, deviations, y == task.top};
        if constexpr (std::is_same_v<T, A>)
            if (used == kPack) out.to = z, out.pitch = l_.z_pitch;
        depthwise_row(window.rows(pack), window.first(), window.count(),
                      weights_.data() + channel / kPack * w_.kernel * w_.kernel * kPack, w_.kernel, out_width_, out,
                      w_.stride);
        if (out.to == results)
            store_rows(static_cast<const A*>(results), kPack, out_width_, used, z, l_.z_pitch, false);
    }

    // Where the input's row lies of one pack of channels of the task or, behind its last row, of the next task.
    const T* ahead(const Task& task, const Task& next, int64_t row, int64_t limit, int64_t channel) const {
        const Task& which = row < limit ? task : next;
        if (row >= limit)
            row = std::min(row - limit + std::max<int64_t>(0, next.top * w_.stride - w_.kernel / 2), w_.height - 1);
        channel = std::min(channel, (which.width - 1) / kPack * kPack);
        return l_.input.start + pixel(which, row) * l_.input.pitch + (which.channel + channel) * l_.input.step;
    }

    const Depthwise<T>& l_;
    const Window& w_;
    int64_t out_height_, out_width_;
    BandTasks tasks_;
    int64_t rows_at_once_;
    Lines<A> weights_;
};

}  // namespace

bool works_in_place(const Window& window) {
    // A band reads rows that belong to the next one.
    return window.stride == 1 && BandTasks(window.samples, window.height, window.width, window.channels).bands == 1;
}

template <typename T>
Moments depthwise_forward(const Depthwise<T>& layer, const ParallelFor& parallel_for) {
    return DepthwiseForward<T>(layer).run(parallel_for);
}

template Moments depthwise_forward(const Depthwise<float>&, const ParallelFor&);
template Moments depthwise_forward(const Depthwise<double>&, const ParallelFor&);
template Moments depthwise_forward(const Depthwise<Half>&, const ParallelFor&);
template Moments depthwise_forward(const Depthwise<BFloat16>&, const ParallelFor&);

}  // namespace spos::cpu
