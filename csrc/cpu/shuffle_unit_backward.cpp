// R3 sums over the last BN; B3 through the second 1x1 convolution; B2 through the depthwise one; B1 through the first.
// Each of them ends with the sums that the next BN needs. For BN 2, with a 1x1 convolution and no ReLU behind it, they
// come nearly for free: they are columns of W2 times the sums of dz3 and the gradient of W2.
#include "csrc/cpu/depthwise_rows.h"
#include "csrc/cpu/matrix.h"
#include "csrc/cpu/shuffle_unit.h"
#include "csrc/cpu/unit_gradient_kernels.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kMostTasks = 64;
constexpr int64_t kRowsSummed = 8;

// The coefficients of one BN layer backwards, zeros behind the last channel up to a whole pack.
template <typename A>
struct Norm {
    Affine<A> affine;
    std::vector<A> mean, offset, slope;
    std::vector<double> rstd;
    bool relu;

    Norm(int64_t channels, const A* mean_in, const A* var, const A* gamma, const A* beta, double epsilon, bool relu)
        : affine(channels, mean_in, var, gamma, beta, epsilon),
          mean(whole_packs(channels)),
          offset(whole_packs(channels)),
          slope(whole_packs(channels)),
          rstd(channels),
          relu(relu) {
        std::copy_n(mean_in, channels, mean.begin());
        for (int64_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(double(var[c]) + epsilon);
    }
    // sum: of the gradient; normal: of the gradient times the normalised input.
    void finish(const double* sum, const double* normal, int64_t count) {
        for (size_t c = 0; c < rstd.size(); ++c) {
            offset[c] = static_cast<A>(sum[c] / count);
            slope[c] = static_cast<A>(rstd[c] * normal[c] / count);
        }
    }
    NormGradient<A> from(int64_t channel) const {
        return {affine.scale.data() + channel, affine.shift.data() + channel, mean.data() + channel,
                offset.data() + channel,       slope.data() + channel,        relu};
    }
};

template <typename T>
class Backward {
    using A = typename Compute<T>::type;

  public:
    Backward(const ShuffleUnit& unit, const ShuffleUnitGradients& gradients, const ParallelFor& parallel_for)
        : u_(unit),
          g_(gradients),
          parallel_for_(parallel_for),
          grad_(static_cast<const T*>(gradients.grad)),
          z1_(static_cast<const T*>(gradients.z1)),
          z2_(static_cast<const T*>(gradients.z2)),
          z3_(static_cast<const T*>(gradients.z3)),
          grad_pitch_(unit.half + unit.made),
          mid_pitch_(whole_packs(unit.mid)),
          inner_(scratch<A>(unit.pixels() * mid_pitch_)),
          apart_(scratch<A>(depthwise_in_place(unit) ? 0 : unit.pixels() * mid_pitch_)),
          outer_(depthwise_in_place(unit) ? inner_.get() : apart_.get()) {}

    void run() {
        Norm<A> norm3 = norm(2 * u_.mid, u_.made, true), norm2 = norm(u_.mid, u_.mid, false),
                norm1 = norm(0, u_.mid, true);
        last_sums(norm3);
        second_pointwise(norm3, norm2);
        depthwise(norm2, norm1);
        first_pointwise(norm1);
    }

  private:
    Norm<A> norm(int64_t first, int64_t channels, bool relu) const {
        auto at = [&](const void* data) { return data ? static_cast<const A*>(data) + first : nullptr; };
        return {channels, at(g_.mean), at(g_.var), at(u_.gamma), at(u_.beta), u_.epsilon, relu};
    }

    // The sums of one BN layer are complete: gradients of its gamma and beta, and what dz is made of.
    void finish(Norm<A>& norm, int64_t first, const double* sum, const double* normal) const {
        for (size_t c = 0; c < norm.rstd.size(); ++c) {
            static_cast<A*>(g_.gamma)[first + c] = static_cast<A>(normal[c]);
            static_cast<A*>(g_.beta)[first + c] = static_cast<A>(sum[c]);
        }
        norm.finish(sum, normal, u_.pixels());
    }

    // Sums that places left, added in their order; products with z - mean become those with the normalised input.
    void finish(Norm<A>& norm, int64_t first, int64_t places, std::vector<double>& sums,
                std::vector<double>& products) const {
        const int64_t channels = norm.rstd.size();
        for (int64_t place = 1; place < places; ++place)
            for (int64_t c = 0; c < channels; ++c)
                sums[c] += sums[place * channels + c], products[c] += products[place * channels + c];
        for (int64_t c = 0; c < channels; ++c) products[c] *= norm.rstd[c];
        finish(norm, first, sums.data(), products.data());
    }

    void last_sums(Norm<A>& norm3) {
        const PixelTasks tasks(u_.pixels(), kMostTasks);
        std::vector<double> sums(tasks.count * u_.made), products(tasks.count * u_.made);
        parallel_for_(tasks.count, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task)
                for (int64_t pixel = tasks.begin(task); pixel < tasks.end(task); pixel += kBlock)
                    gradient_sums(grad_ + pixel * grad_pitch_ + u_.half, grad_pitch_, z3_ + pixel * u_.made, u_.made,
                                  std::min(kBlock, tasks.end(task) - pixel), u_.made, norm3.from(0),
                                  sums.data() + task * u_.made, products.data() + task * u_.made);
        });
        finish(norm3, 2 * u_.mid, tasks.count, sums, products);
    }

    // inner = gradient of y2; gradient of W2; sums of BN 2.
    void second_pointwise(const Norm<A>& norm3, Norm<A>& norm2) {
        const T* weights = static_cast<const T*>(u_.pw2);
        const auto packed =
            pack<A>(u_.made, u_.mid, [&](int64_t k, int64_t j) { return widen(weights[k * u_.mid_stored + j]); });
        std::vector<A> rstd(mid_pitch_), zeros(mid_pitch_);
        for (int64_t m = 0; m < u_.mid; ++m) rstd[m] = static_cast<A>(norm2.rstd[m]);
        const A* mean = norm2.mean.data();
        // rstd * (z - mean), which a large mean does not spoil as it would rstd * z - rstd * mean.
        const NormGradient<A> normalise{rstd.data(), zeros.data(), mean, mean, zeros.data(), false};
        std::vector<double> dz_sum(u_.made);
        const auto product = pointwise(
            packed, mid_pitch_, &dz_sum,
            [&](int64_t pixel, int64_t pixels, A* dz, int64_t pitch, A* normal) {
                norm_gradient(grad_ + pixel * grad_pitch_ + u_.half, grad_pitch_, z3_ + pixel * u_.made, u_.made,
                              pixels, u_.made, norm3.from(0), dz, pitch);
                const T* z2 = z2_ + pixel * u_.mid;
                norm_gradient(z2, u_.mid, z2, u_.mid, pixels, u_.mid, normalise, normal, mid_pitch_);
                return inner_.get() + pixel * mid_pitch_;
            },
            [](int64_t, int64_t, const A*) {});

        // product[o][m] is the sum of dz3[o] times the normalised z2[m].
        const A* gamma = u_.gamma ? static_cast<const A*>(u_.gamma) + u_.mid : nullptr;
        const A* beta = u_.beta ? static_cast<const A*>(u_.beta) + u_.mid : nullptr;
        T* to = static_cast<T*>(g_.pw2);
        std::vector<double> sum(u_.mid), normal(u_.mid);
        std::vector<A> row(mid_pitch_);
        for (int64_t o = 0; o < u_.made; ++o) {
            for (int64_t m = 0; m < u_.mid; ++m) {
                row[m] = product[o * mid_pitch_ + m];
                const double weight = widen(weights[o * u_.mid_stored + m]);
                normal[m] += weight * row[m];
                sum[m] += weight * dz_sum[o];
                if (gamma) row[m] *= gamma[m];
                if (beta) row[m] += static_cast<A>(beta[m] * dz_sum[o]);
            }
            store_weights(row.data(), u_.mid, to + o * u_.mid_stored, u_.mid_stored);
        }
        finish(norm2, u_.mid, sum.data(), normal.data());
    }

    // outer = gradient of y1 through its ReLU; gradient of the depthwise weights; sums of BN 1.
    void depthwise(const Norm<A>& norm2, Norm<A>& norm1) {
        const int64_t taps = u_.kernel * u_.kernel;
        const auto weights = pack_depthwise<A>(static_cast<const T*>(u_.dw), u_.mid, u_.kernel, true);
        const BandTasks tasks(u_.samples, u_.height, u_.width, u_.mid);
        const int64_t places = tasks.samples * tasks.bands;
        std::vector<double> sums(places * u_.mid), products(places * u_.mid);
        std::vector<A> gradients(places * mid_pitch_ * taps);
        parallel_for_(tasks.count, [&](int64_t begin, int64_t end) {
            RowWindow<A> window(u_.height, u_.width, u_.kernel, BandTasks::kChunk / kPack);
            std::vector<A> y((u_.width + kSlack) * kPack), result(u_.width * kPack);
            std::vector<A> recent(BandTasks::kChunk * taps);
            for (int64_t index = begin; index < end; ++index) {
                const auto task = tasks[index];
                const int64_t at = task.place * u_.mid + task.channel;
                depthwise_band(task, norm2, norm1, weights.data() + task.channel * taps, window, y.data(),
                               result.data(), recent,
                               gradients.data() + task.place * mid_pitch_ * taps + task.channel * taps,
                               sums.data() + at, products.data() + at);
            }
        });
        finish(norm1, 0, places, sums, products);

        const int64_t size = mid_pitch_ * taps;
        for (int64_t place = 1; place < places; ++place)
            for (int64_t i = 0; i < size; ++i) gradients[i] += gradients[place * size + i];
        std::vector<A> kernel(whole_packs(taps));
        for (int64_t m = 0; m < u_.mid_stored; ++m) {
            for (int64_t t = 0; t < taps && m < u_.mid; ++t)
                kernel[t] = gradients[(m / kPack * taps + taps - 1 - t) * kPack + m % kPack];
            store_weights(kernel.data(), m < u_.mid ? taps : 0, static_cast<T*>(g_.dw) + m * taps, taps);
        }
    }

    void depthwise_band(const BandTasks::Task& task, const Norm<A>& norm2, const Norm<A>& norm1, const A* weights,
                        RowWindow<A>& window, A* y, A* result, std::vector<A>& recent, A* gradients, double* sums,
                        double* products) {
        const int64_t packs = divide_up(task.width, kPack), taps = u_.kernel * u_.kernel;
        const int64_t image = task.sample * u_.height * u_.width;
        window.start(task.top);
        for (int64_t row = task.top; row < task.end; ++row) {
            window.reach(row, packs, [&](int64_t at, int64_t pack, A* to) {
                const int64_t c = task.channel + pack * kPack, pixel = image + at * u_.width;
                norm_gradient(inner_.get() + pixel * mid_pitch_ + c, mid_pitch_, z2_ + pixel * u_.mid + c, u_.mid,
                              u_.width, std::min(kPack, u_.mid - c), norm2.from(c), to, kPack);
            });
            for (int64_t pack = 0; pack < packs; ++pack) {
                const int64_t c = task.channel + pack * kPack, pixel = image + row * u_.width;
                const int64_t channels = std::min(kPack, u_.mid - c);
                const T* z1 = z1_ + pixel * u_.mid + c;
                scale_and_shift(z1, u_.mid, u_.width, channels, norm1.affine.scale.data() + c,
                                norm1.affine.shift.data() + c, true, y, kPack);
                depthwise_gradient_row(window.rows(pack), window.first(), window.count(), weights + pack * taps * kPack,
                                       u_.kernel, u_.width, y, result, recent.data() + pack * taps * kPack);
                masked_gradient(result, y, z1, u_.mid, u_.width, channels, norm1.mean.data() + c,
                                outer_ + pixel * mid_pitch_ + c, mid_pitch_, sums + pack * kPack,
                                products + pack * kPack);
            }
            // In two levels: a long sum in one variable would lose digits.
            if ((row + 1 - task.top) % kRowsSummed != 0 && row + 1 != task.end) continue;
            for (int64_t i = 0; i < packs * taps * kPack; ++i) gradients[i] += recent[i];
            std::fill(recent.begin(), recent.end(), A(0));
        }
    }

    // Gradients of x and of W1.
    void first_pointwise(const Norm<A>& norm1) {
        const T *weights = static_cast<const T*>(u_.pw1), *x = static_cast<const T*>(u_.x);
        T* to = static_cast<T*>(g_.x);
        const int64_t pitch = whole_packs(u_.half);
        const auto packed =
            pack<A>(u_.mid, u_.half, [&](int64_t k, int64_t j) { return widen(weights[k * u_.half + j]); });
        const auto product = pointwise(
            packed, pitch, nullptr,
            [&](int64_t pixel, int64_t pixels, A* dz, int64_t dz_pitch, A* odd) {
                norm_gradient(outer_ + pixel * mid_pitch_, mid_pitch_, z1_ + pixel * u_.mid, u_.mid, pixels, u_.mid,
                              norm1.from(0), dz, dz_pitch);
                odd_channels(x + pixel * 2 * u_.half, pixels, u_.half, odd, pitch);
                return static_cast<A*>(nullptr);
            },
            [&](int64_t pixel, int64_t pixels, const A* gradient) {
                interleave(grad_ + pixel * grad_pitch_, grad_pitch_, gradient, pitch, pixels, u_.half,
                           to + pixel * 2 * u_.half, u_.pixels() * 2 * u_.half * int64_t(sizeof(T)) > kKept);
            });
        T* rows = static_cast<T*>(g_.pw1);
        for (int64_t m = 0; m < u_.mid_stored; ++m)
            store_weights(m < u_.mid ? product.data() + m * pitch : nullptr, m < u_.mid ? u_.half : 0,
                          rows + m * u_.half, u_.half);
    }

    // `used` values of a weight's gradient, and zeros behind them up to `size`.
    void store_weights(const A* from, int64_t used, T* to, int64_t size) const {
        static const std::vector<A> one(kPack, A(1)), zero(kPack);
        for (int64_t i = 0; i < used; i += kPack)
            scale_and_shift(from + i, kPack, 1, std::min(kPack, used - i), one.data(), zero.data(), false, to + i,
                            kPack);
        std::fill_n(reinterpret_cast<char*>(to + used), (size - used) * sizeof(T), 0);
    }

    // A 1x1 convolution backwards: gradient = dz weights (pixels by weights.columns, whole packs of `pitch`) and
    // product = dz^T input (weights.depth by `pitch`). prepare(pixel, pixels, dz, dz_pitch, input) makes a block's dz
    // and input, and returns where the gradient goes, null for a buffer; after(pixel, pixels, gradient) follows each
    // block. dz_sum, if given: the sums of dz over all pixels.
    template <typename Prepare, typename After>
    std::vector<A> pointwise(const Packed<A>& weights, int64_t pitch, std::vector<double>* dz_sum, Prepare prepare,
                             After after) {
        const int64_t depth = weights.depth, dz_pitch = whole_packs(depth), size = depth * pitch;
        // Partial products bound the number of tasks where they are large.
        const PixelTasks tasks(u_.pixels(), std::clamp<int64_t>((1 << 21) / size, 16, kMostTasks));
        std::vector<A> products(tasks.count * size);
        const std::vector<A> zeros(std::max(dz_pitch, kPack * panel_packs()));
        const NormGradient<A> plain{zeros.data(), zeros.data(), zeros.data(), zeros.data(), zeros.data(), false};
        std::vector<double> sums(dz_sum ? tasks.count * depth : 0), squares(sums.size());
        parallel_for_(tasks.count, [&](int64_t begin, int64_t end) {
            std::vector<A> dz(kBlock * dz_pitch), input(kBlock * pitch), buffer(kBlock * pitch);
            for (int64_t task = begin; task < end; ++task)
                for (int64_t pixel = tasks.begin(task); pixel < tasks.end(task); pixel += kBlock) {
                    const int64_t pixels = std::min(kBlock, tasks.end(task) - pixel);
                    A* place = prepare(pixel, pixels, dz.data(), dz_pitch, input.data());
                    A* gradient = place ? place : buffer.data();
                    if (dz_sum)
                        gradient_sums(dz.data(), dz_pitch, dz.data(), dz_pitch, pixels, depth, plain,
                                      sums.data() + task * depth, squares.data() + task * depth);
                    A* product = products.data() + task * size;
                    for (int64_t panel = 0; panel < weights.panels(); ++panel) {
                        const int64_t packs = weights.packs_of(panel), first = panel * panel_packs() * kPack;
                        multiply(Product<A>{dz.data(), dz_pitch, 1, weights.panel(panel), packs * kPack, pixels, packs,
                                            depth, zeros.data(), 0, gradient + first, pitch});
                        multiply(Product<A>{dz.data(), 1, dz_pitch, input.data() + first, pitch, depth, packs, pixels,
                                            product + first, pitch, product + first, pitch});
                    }
                    after(pixel, pixels, gradient);
                }
        });
        for (size_t i = 0; i < sums.size(); ++i) (*dz_sum)[i % depth] += sums[i];
        parallel_for_(depth, [&](int64_t begin, int64_t end) {
            for (int64_t task = 1; task < tasks.count; ++task)
                for (int64_t i = begin * pitch; i < end * pitch; ++i) products[i] += products[task * size + i];
        });
        products.resize(size);
        return products;
    }

    const ShuffleUnit& u_;
    const ShuffleUnitGradients& g_;
    const ParallelFor& parallel_for_;
    const T *grad_, *z1_, *z2_, *z3_;
    int64_t grad_pitch_, mid_pitch_;
    // Gradients between the convolutions: of y2, and of y1 through its ReLU, over it where the depthwise pass allows.
    std::unique_ptr<A[]> inner_, apart_;
    A* outer_;
};

}  // namespace

void shuffle_unit_backward(const ShuffleUnit& unit, const ShuffleUnitGradients& gradients,
                           const ParallelFor& parallel_for) {
    switch (unit.dtype) {
        case DType::float32:
            return Backward<float>(unit, gradients, parallel_for).run();
        case DType::float64:
            return Backward<double>(unit, gradients, parallel_for).run();
        case DType::float16:
            return Backward<Half>(unit, gradients, parallel_for).run();
        case DType::bfloat16:
            return Backward<BFloat16>(unit, gradients, parallel_for).run();
    }
}

}  // namespace spos::cpu
