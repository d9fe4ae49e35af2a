// A row of the input's gradient is a depthwise convolution of rows of dz, and meets the same rows in the weight's
// gradient. With a stride, input pixels fall into phases: a pixel of phase f sees every stride-th row and column of the
// kernel only, and those of one phase are together a convolution of stride 1 with a smaller kernel.
#include "csrc/cpu/depthwise_rows.h"
#include "csrc/cpu/layers.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kRowsSummed = 8;

// Rows or columns of the kernel that input rows or columns of one phase see, flipped: kernel place first + stride *
// (count - 1 - i) for i < count, of which the 0th lies over dz at `begin` places behind input place / stride.
struct Phase {
    int64_t first, count, begin;

    Phase(int64_t phase, int64_t kernel, int64_t stride)
        : first((phase + kernel / 2) % stride),
          count((kernel - first + stride - 1) / stride),
          begin((phase + kernel / 2 - first) / stride - (count - 1)) {}
};

template <typename T>
class DepthwiseGradients {
    using A = typename Compute<T>::type;
    using Task = BandTasks::Task;

  public:
    explicit DepthwiseGradients(const DepthwiseBackward<T>& layer)
        : l_(layer),
          w_(layer.window),
          taps_(w_.kernel * w_.kernel),
          pitch_(whole_packs(w_.channels)),
          tasks_(w_.samples, w_.height, w_.width, w_.channels, w_.stride),
          places_(tasks_.samples * tasks_.bands),
          sums_(layer.centre ? places_ * w_.channels : 0),
          products_(sums_.size()),
          gradients_(places_ * pitch_ * taps_) {
        int64_t at = 0;
        for (int64_t phase = 0; phase < w_.stride; ++phase) phases_.emplace_back(phase, w_.kernel, w_.stride);
        for (const Phase& rows : phases_)
            for (const Phase& columns : phases_) starts_.push_back(at), at += rows.count * columns.count;
        pack_weights();
    }

    GradientSums run(const ParallelFor& parallel_for) {
        parallel_for(tasks_.count, [&](int64_t begin, int64_t end) {
            RowWindow<A> window(w_.out_height(), w_.out_width(), w_.kernel, tasks_.chunk / kPack);
            Lines<A> y((w_.width + kSlack) * kPack), result(w_.width * kPack), recent(tasks_.chunk * taps_);
            for (int64_t index = begin; index < end; ++index)
                band(tasks_[index], window, y.data(), result.data(), recent);
        });
        if (l_.centre) add_places(sums_, places_, w_.channels), add_places(products_, places_, w_.channels);
        add_places(gradients_, places_, pitch_ * taps_);
        store_weight_gradient();
        return {std::move(sums_), std::move(products_)};
    }

  private:
    // Kernel place of tap i of a pair of phases, and where the pair starts.
    template <typename Do>
    void each_tap(Do act) const {
        for (int64_t a = 0; a < w_.stride; ++a)
            for (int64_t b = 0; b < w_.stride; ++b) {
                const Phase &rows = phases_[a], &columns = phases_[b];
                int64_t at = starts_[a * w_.stride + b];
                for (int64_t i = rows.count - 1; i >= 0; --i)
                    for (int64_t j = columns.count - 1; j >= 0; --j)
                        act(at++, (rows.first + w_.stride * i) * w_.kernel + columns.first + w_.stride * j);
            }
    }

    void pack_weights() {
        weights_.assign(pitch_ * taps_, A(0));
        each_tap([&](int64_t at, int64_t place) {
            for (int64_t c = 0; c < w_.channels; ++c)
                weights_[(c / kPack * taps_ + at) * kPack + c % kPack] = widen(l_.weight[c * taps_ + place]);
        });
    }

    void store_weight_gradient() const {
        Lines<A> kernel(whole_packs(taps_));
        for (int64_t c = 0; c < l_.rows; ++c) {
            T* to = l_.weight_gradient + c * taps_;
            if (c >= w_.channels) {
                std::memset(static_cast<void*>(to), 0, taps_ * sizeof(T));
                continue;
            }
            each_tap([&](int64_t at, int64_t place) {
                kernel[place] = gradients_[(c / kPack * taps_ + at) * kPack + c % kPack];
            });
            store_rows(static_cast<const A*>(kernel.data()), 0, 1, taps_, to, 0, false);
        }
    }

    void band(const Task& task, RowWindow<A>& window, A* y, A* result, Lines<A>& recent) {
        const int64_t out_height = w_.out_height(), out_width = w_.out_width(), out_rows = w_.samples * out_height;
        const int64_t packs = divide_up(task.width, kPack), out_image = task.sample * out_height * out_width;
        A* gradients = gradients_.data() + task.place * pitch_ * taps_ + task.channel * taps_;
        window.start();
        for (int64_t row = task.top; row < task.end; ++row) {
            const int64_t phase = row % w_.stride, top = row / w_.stride + phases_[phase].begin;
            window.cover(top, top + phases_[phase].count, packs, [&](int64_t at, int64_t pack, A* to) {
                const int64_t c = task.channel + pack * kPack;
                l_.output.load(out_image + at * out_width, out_width, c, std::min(kPack, w_.channels - c), to, kPack,
                               std::min(kRowsAhead, out_rows - 1 - (task.sample * out_height + at)) * out_width);
            });
            for (int64_t pack = 0; pack < packs; ++pack)
                for (int64_t column = 0; column < std::min(w_.stride, w_.width); ++column)
                    pixels(task, row, phase, column, pack, window, y, result, recent.data() + pack * taps_ * kPack);
            // In two levels: a long sum in one variable would lose digits.
            if ((row + 1 - task.top) % kRowsSummed != 0 && row + 1 != task.end) continue;
            add_rows(static_cast<const A*>(recent.data()), 0, 1, packs * taps_ * kPack, gradients, 0);
            std::fill(recent.begin(), recent.end(), A(0));
        }
    }

    // Every stride-th pixel of a row, from `column` on.
    void pixels(const Task& task, int64_t row, int64_t row_phase, int64_t column, int64_t pack, RowWindow<A>& window,
                A* y, A* result, A* taps) {
        const int64_t c = task.channel + pack * kPack, channels = std::min(kPack, w_.channels - c);
        const int64_t pixel = (task.sample * w_.height + row) * w_.width + column;
        const int64_t count = divide_up(w_.width - column, w_.stride);
        const Phase& phase = phases_[column];
        const int64_t start = starts_[row_phase * w_.stride + column] * kPack;
        // Tasks go forwards here, so the rows behind an image's last one are soon wanted too.
        const int64_t rows_left = (w_.samples - task.sample) * w_.height - 1 - row;
        const T* ahead = l_.input.start + (pixel + std::min(kRowsAhead, rows_left) * w_.width) * l_.input.pitch;
        l_.input.load(pixel, w_.stride, count, c, channels, y, kPack, ahead + c * l_.input.step);
        std::fill_n(y + count * kPack, kPack, A(0));  // another phase may have one more pixel
        depthwise_gradient_row(window.rows(pack, w_.kernel / 2 + phase.begin), window.first(), window.count(),
                               weights_.data() + c * taps_ + start, phase.count, count, y, result, taps + start);
        const A* mask = l_.input.relu ? y : nullptr;
        const A* centre = l_.centre ? l_.centre + c : nullptr;
        const T* z = l_.input.start + pixel * l_.input.pitch + c * l_.input.step;
        const int64_t at = task.place * w_.channels + c;
        double *sum = centre ? sums_.data() + at : nullptr, *product = centre ? products_.data() + at : nullptr;
        const auto& to = l_.gradient;
        if (to.inner) {
            masked_gradient(result, kPack, mask, kPack, z, l_.input.pitch * w_.stride, count, channels, centre,
                            to.inner + pixel * to.pitch + c, to.pitch * w_.stride, sum, product);
            return;
        }
        if (mask || centre)
            masked_gradient(result, kPack, mask, kPack, z, l_.input.pitch * w_.stride, count, channels, centre, result,
                            kPack, sum, product);
        to.store(pixel, w_.stride, count, c, channels, result, kPack);
    }

    const DepthwiseBackward<T>& l_;
    const Window& w_;
    int64_t taps_, pitch_;
    BandTasks tasks_;
    int64_t places_;
    std::vector<double> sums_, products_;
    Lines<A> gradients_, weights_;
    std::vector<Phase> phases_;
    std::vector<int64_t> starts_;  // of each pair of phases among the taps
};

}  // namespace

template <typename T>
GradientSums depthwise_backward(const DepthwiseBackward<T>& layer, const ParallelFor& parallel_for) {
    return DepthwiseGradients<T>(layer).run(parallel_for);
}

template GradientSums depthwise_backward(const DepthwiseBackward<float>&, const ParallelFor&);
template GradientSums depthwise_backward(const DepthwiseBackward<double>&, const ParallelFor&);
template GradientSums depthwise_backward(const DepthwiseBackward<Half>&, const ParallelFor&);
template GradientSums depthwise_backward(const DepthwiseBackward<BFloat16>&, const ParallelFor&);

}  // namespace spos::cpu
