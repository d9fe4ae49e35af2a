// gradient = dz weight, and weight's gradient = dz^T input, block by block. The sums that the BN in front needs are
// taken while a block's gradient and input are in the cache.
#include "csrc/cpu/layers.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

template <typename T>
class PointwiseGradients {
    using A = typename Compute<T>::type;

  public:
    explicit PointwiseGradients(const PointwiseBackward<T>& layer)
        : l_(layer),
          // Distances from the centre, which a large mean does not spoil as it would the normalised values.
          centred_(layer.centre && !layer.input.relu),
          out_pitch_(whole_packs(layer.out)),
          in_pitch_(whole_packs(layer.in)),
          size_(layer.out * in_pitch_),
          // Partial products bound the number of tasks where they are large.
          tasks_(layer.pixels, std::clamp<int64_t>((1 << 21) / size_, 16, kMostTasks)),
          packed_(pack_rows<A>(layer.weight, layer.row, layer.out, layer.in)),
          products_(scratch<A>(tasks_.count * size_)),
          zeros_(std::max({out_pitch_, in_pitch_, kPack * most_panel_packs()})),
          ones_(in_pitch_, A(1)),
          dz_sums_(centred_ && layer.at_centre ? tasks_.count * layer.out : 0),
          dz_squares_(dz_sums_.size()),
          sums_(layer.sums ? tasks_.count * layer.in : 0),
          sum_products_(sums_.size()) {}

    GradientSums run(const ParallelFor& parallel_for) {
        parallel_for(tasks_.count, [&](int64_t begin, int64_t end) {
            const auto dz = scratch<A>(kBlock * out_pitch_), input = scratch<A>(kBlock * in_pitch_);
            const auto buffer = scratch<A>(l_.gradient.inner ? 0 : kBlock * in_pitch_);
            std::fill_n(input.get(), kBlock * in_pitch_, A(0));
            for (int64_t task = begin; task < end; ++task)
                for (int64_t pixel = tasks_.begin(task); pixel < tasks_.end(task); pixel += kBlock)
                    block(task, pixel, std::min(kBlock, tasks_.end(task) - pixel), dz.get(), input.get(), buffer.get());
        });
        A* product = products_.get();
        parallel_for(l_.out, [&](int64_t begin, int64_t end) {
            for (int64_t task = 1; task < tasks_.count; ++task)
                add_rows(product + task * size_ + begin * in_pitch_, 0, 1, (end - begin) * in_pitch_,
                         product + begin * in_pitch_, 0);
        });
        return finish();
    }

  private:
    void block(int64_t task, int64_t pixel, int64_t pixels, A* dz, A* input, A* buffer) {
        l_.output.load(pixel, pixels, 0, l_.out, dz, out_pitch_);
        load_input(pixel, pixels, input);
        if (!dz_sums_.empty())
            gradient_sums(static_cast<const A*>(dz), out_pitch_, static_cast<const A*>(dz), out_pitch_, pixels, l_.out,
                          plain(), dz_sums_.data() + task * l_.out, dz_squares_.data() + task * l_.out);
        const bool in_place = l_.gradient.inner != nullptr;
        A* gradient = in_place ? l_.gradient.inner + pixel * l_.gradient.pitch : buffer;
        const int64_t pitch = in_place ? l_.gradient.pitch : in_pitch_;
        A* product = products_.get() + task * size_;
        const bool first_block = pixel == tasks_.begin(task);
        const int64_t next = pixel + pixels, panels = packed_.panels();
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t packs = packed_.packs_of(panel), first = panel * panel_packs() * kPack;
            prefetch(next + kBlock * panel / panels, next + kBlock * (panel + 1) / panels);
            multiply(Product<A>{dz, out_pitch_, 1, packed_.panel(panel), packs * kPack, pixels, packs, l_.out,
                                zeros_.data(), 0, gradient + first, pitch});
            multiply(Product<A>{dz, 1, out_pitch_, input + first, in_pitch_, l_.out, packs, pixels,
                                first_block ? zeros_.data() : product + first, first_block ? 0 : in_pitch_,
                                product + first, in_pitch_});
        }
        if (centred_ && l_.sums)
            gradient_sums(static_cast<const A*>(gradient), pitch, static_cast<const A*>(input), in_pitch_, pixels,
                          l_.in, plain(), sums_.data() + task * l_.in, sum_products_.data() + task * l_.in);
        if (!centred_ && (l_.input.relu || l_.sums))
            for (int64_t c = 0; c < l_.in; c += kPack) {
                const int64_t width = std::min(kPack, l_.in - c), at = task * l_.in + c;
                masked_sums(pixel, pixels, c, width, gradient + c, pitch, l_.input.relu ? input + c : nullptr, at);
            }
        if (!in_place) l_.gradient.store(pixel, 1, pixels, 0, l_.in, buffer, in_pitch_);
    }

    // Asks for pixels of the next block: they arrive while this one is multiplied.
    void prefetch(int64_t begin, int64_t end) const {
        begin = std::min(begin, l_.pixels), end = std::min(end, l_.pixels);
        const OutputGradient<T>& output = l_.output;
        if (output.inner)
            prefetch_rows<false>(output.inner + begin * output.pitch, output.pitch * sizeof(A), end - begin,
                                 l_.out * sizeof(A));
        else
            prefetch_rows<false>(output.outer + begin * output.pitch, output.pitch * sizeof(T), end - begin,
                                 l_.out * sizeof(T));
        prefetch_rows<false>(output.z + begin * output.z_pitch, output.z_pitch * sizeof(T), end - begin,
                             l_.out * sizeof(T));
        prefetch_rows<false>(l_.input.start + begin * l_.input.pitch, l_.input.pitch * sizeof(T), end - begin,
                             l_.in * l_.input.step * sizeof(T));
    }

    // What the weight's gradient is a product with.
    void load_input(int64_t pixel, int64_t pixels, A* input) const {
        if (!centred_) return l_.input.load(pixel, 1, pixels, 0, l_.in, input, in_pitch_);
        const NormGradient<A> distance{ones_.data(), zeros_.data(), l_.centre, l_.centre, zeros_.data(), false};
        if (l_.input.step == 1) {
            const T* z = l_.input.start + pixel * l_.input.pitch;
            return norm_gradient(z, l_.input.pitch, z, l_.input.pitch, pixels, l_.in, distance, input, in_pitch_);
        }
        copy_channels(l_.input.start + pixel * l_.input.pitch, l_.input.pitch, l_.input.step, pixels, l_.in, input,
                      in_pitch_);
        for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < l_.in; ++c) input[p * in_pitch_ + c] -= l_.centre[c];
    }

    // The mask of a ReLU in front of the layer, and the sums that no product brings.
    void masked_sums(int64_t pixel, int64_t pixels, int64_t channel, int64_t width, A* gradient, int64_t pitch,
                     const A* y, int64_t at) {
        A values[kBlock * kPack];
        const A* centre = l_.sums ? l_.centre + channel : nullptr;
        if (centre)
            copy_channels(l_.input.start + pixel * l_.input.pitch + channel * l_.input.step, l_.input.pitch,
                          l_.input.step, pixels, width, values, kPack);
        masked_gradient(gradient, pitch, y, in_pitch_, values, kPack, pixels, width, centre, gradient, pitch,
                        centre ? sums_.data() + at : nullptr, centre ? sum_products_.data() + at : nullptr);
    }

    GradientSums finish() {
        const int64_t places = tasks_.count;
        add_places(dz_sums_, places, l_.out), add_places(sums_, places, l_.in);
        add_places(sum_products_, places, l_.in);
        // product[o][j] is the sum of dz[o] times what load_input() made.
        std::vector<A> row(in_pitch_);
        for (int64_t o = 0; o < l_.rows; ++o) {
            const int64_t used = o < l_.out ? l_.in : 0;
            const A* product = products_.get() + o * in_pitch_;
            if (centred_ && used) {
                for (int64_t j = 0; j < used; ++j)
                    row[j] = l_.input.scale ? l_.input.scale[j] * product[j] : product[j];
                const A dz_sum = dz_sums_.empty() ? 0 : static_cast<A>(dz_sums_[o]);
                for (int64_t j = 0; j < used && !dz_sums_.empty(); ++j) row[j] += l_.at_centre[j] * dz_sum;
                product = row.data();
            }
            T* to = l_.weight_gradient + o * l_.row;
            store_rows(product, in_pitch_, 1, used, to, l_.row, false);
            std::memset(static_cast<void*>(to + used), 0, (l_.row - used) * sizeof(T));
        }
        return {std::move(sums_), std::move(sum_products_)};
    }

    NormGradient<A> plain() const {
        return {zeros_.data(), zeros_.data(), zeros_.data(), zeros_.data(), zeros_.data(), false};
    }

    const PointwiseBackward<T>& l_;
    bool centred_;
    int64_t out_pitch_, in_pitch_, size_;
    PixelTasks tasks_;
    Packed<A> packed_;
    Scratch<A> products_;
    Lines<A> zeros_, ones_;
    std::vector<double> dz_sums_, dz_squares_, sums_, sum_products_;
};

}  // namespace

template <typename T>
GradientSums pointwise_backward(const PointwiseBackward<T>& layer, const ParallelFor& parallel_for) {
    return PointwiseGradients<T>(layer).run(parallel_for);
}

template <typename T>
GradientSums output_sums(const OutputGradient<T>& output, int64_t pixels, int64_t channels,
                         const ParallelFor& parallel_for) {
    const PixelTasks tasks(pixels, kMostTasks);
    std::vector<double> sums(tasks.count * channels), products(tasks.count * channels);
    parallel_for(tasks.count, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            for (int64_t pixel = tasks.begin(task); pixel < tasks.end(task); pixel += kBlock)
                gradient_sums(output.outer + pixel * output.pitch, output.pitch, output.z + pixel * output.z_pitch,
                              output.z_pitch, std::min(kBlock, tasks.end(task) - pixel), channels, output.norm,
                              sums.data() + task * channels, products.data() + task * channels);
    });
    add_places(sums, tasks.count, channels), add_places(products, tasks.count, channels);
    return {std::move(sums), std::move(products)};
}

#define SPOS_INSTANTIATE(T)                                                                    \
    template GradientSums pointwise_backward(const PointwiseBackward<T>&, const ParallelFor&); \
    template GradientSums output_sums(const OutputGradient<T>&, int64_t, int64_t, const ParallelFor&);
SPOS_INSTANTIATE(float)
SPOS_INSTANTIATE(double)
SPOS_INSTANTIATE(Half)
SPOS_INSTANTIATE(BFloat16)
#undef SPOS_INSTANTIATE

}  // namespace spos::cpu
