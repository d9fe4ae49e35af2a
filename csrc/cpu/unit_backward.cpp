// The last BN's sums first; then layer by layer from the back, each pass ending with the sums that the next BN needs.
#include "csrc/cpu/layers.h"
#include "csrc/cpu/unit.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

// The coefficients of one BN layer backwards, zeros behind the last channel up to a whole pack.
template <typename A>
struct Norm {
    Affine<A> affine;
    Lines<A> mean, offset, slope, beta;
    std::vector<double> rstd;
    bool relu;

    Norm(int64_t channels, const A* mean_in, const A* var, const A* gamma, const A* beta_in, double epsilon, bool relu)
        : affine(channels, mean_in, var, gamma, beta_in, epsilon),
          mean(whole_packs(channels)),
          offset(whole_packs(channels)),
          slope(whole_packs(channels)),
          beta(beta_in ? whole_packs(channels) : 0),
          rstd(channels),
          relu(relu) {
        std::copy_n(mean_in, channels, mean.begin());
        if (beta_in) std::copy_n(beta_in, channels, beta.begin());
        for (int64_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(double(var[c]) + epsilon);
    }
    NormGradient<A> gradient() const {
        return {affine.scale.data(), affine.shift.data(), mean.data(), offset.data(), slope.data(), relu};
    }
};

// A chain's layer with where its output lies and how it is normalised.
template <typename T>
struct Step {
    const Layer* layer;
    Norm<typename Compute<T>::type> norm;
    int64_t normalised;  // first of its channels in mean and var
    const T* z;
    int64_t height, width;  // of its input
    int64_t pixels;         // of its output
    T* weight_gradient;
};

template <typename T>
class Backward {
    using A = typename Compute<T>::type;

  public:
    Backward(const Unit& unit, const UnitGradients& gradients, const ParallelFor& parallel_for)
        : u_(unit),
          g_(gradients),
          parallel_for_(parallel_for),
          grad_(static_cast<const T*>(gradients.grad)),
          grad_pitch_(unit.out_channels()),
          saved_(static_cast<const T*>(gradients.saved)) {}

    void run() {
        const int64_t pixels = u_.samples * u_.height * u_.width;
        auto main = steps(u_.main), projection = steps(u_.projection);
        InputGradient<T> x;
        x.to = static_cast<T*>(g_.x);
        x.pitch = u_.channels;
        x.stream = pixels * u_.channels * int64_t(sizeof(T)) > kKept;
        Scratch<A> other;
        if (projection.empty()) {
            x.even = grad_, x.even_pitch = grad_pitch_;
        } else {
            const int64_t pitch = whole_packs(u_.channels);
            other = scratch<A>(pixels * pitch);
            chain(projection, 0, {other.get(), pitch});
            x.other = other.get(), x.other_pitch = pitch;
        }
        chain(main, u_.passing(), x);
    }

  private:
    std::vector<Step<T>> steps(const std::vector<Layer>& layers) {
        std::vector<Step<T>> found;
        int64_t height = u_.height, width = u_.width;
        for (size_t i = 0; i < layers.size(); ++i) {
            const Layer& layer = layers[i];
            auto at = [&](const void* data) { return data ? static_cast<const A*>(data) + normalised_ : nullptr; };
            const int64_t pixels = u_.pixels_behind(layers, i);
            found.push_back({&layer,
                             Norm<A>(layer.out, at(g_.mean), at(g_.var), at(u_.gamma), at(u_.beta), u_.epsilon,
                                     !layer.depthwise),
                             normalised_, saved_, height, width, pixels, static_cast<T*>(g_.weights[weights_++])});
            normalised_ += layer.laid_out, saved_ += pixels * layer.laid_out;
            height = (height - 1) / layer.stride + 1, width = (width - 1) / layer.stride + 1;
        }
        return found;
    }

    // From the gradient of the output's channels from `first` on to that of the chain's input.
    void chain(std::vector<Step<T>>& steps, int64_t first, const InputGradient<T>& x) {
        const bool splits = u_.projection.empty();
        OutputGradient<T> output{grad_ + first, nullptr, grad_pitch_, steps.back().z, steps.back().layer->laid_out,
                                 steps.back().norm.gradient()};
        finish(steps.back(), output_sums(output, steps.back().pixels, steps.back().layer->out, parallel_for_));
        int64_t pitch = 0;
        for (size_t i = 1; i < steps.size(); ++i) pitch = std::max(pitch, whole_packs(steps[i].layer->in));
        Scratch<A> buffers[2];
        int64_t sizes[2] = {}, now = 0;
        for (size_t i = steps.size(); i-- > 0;) {
            const Step<T>& step = steps[i];
            const Layer& layer = *step.layer;
            const Window window{u_.samples, step.height, step.width, layer.in, layer.kernel, layer.stride};
            Input<T> input{static_cast<const T*>(u_.x) + splits, u_.channels, 1 + splits};
            InputGradient<T> gradient = x;
            const A *centre = nullptr, *at_centre = nullptr;
            if (i > 0) {
                const Norm<A>& norm = steps[i - 1].norm;
                input = {steps[i - 1].z, steps[i - 1].layer->laid_out, 1, norm.affine.scale.data(),
                         norm.affine.shift.data(), norm.relu};
                centre = norm.mean.data(), at_centre = norm.beta.empty() ? nullptr : norm.beta.data();
                const bool in_place = output.inner && (!layer.depthwise || works_in_place(window));
                if (!in_place) now = 1 - now;
                const int64_t size = steps[i - 1].pixels * pitch;
                if (sizes[now] < size) buffers[now] = scratch<A>(size), sizes[now] = size;
                gradient = {buffers[now].get(), pitch};
            }
            const T* weight = static_cast<const T*>(layer.weight);
            const GradientSums sums =
                layer.depthwise
                    ? depthwise_backward(DepthwiseBackward<T>{output, input, centre, window, weight,
                                                              step.weight_gradient, layer.rows, gradient},
                                         parallel_for_)
                    : pointwise_backward(
                          PointwiseBackward<T>{output, input, centre, at_centre, i > 0, step.pixels, layer.in,
                                               layer.out, weight, step.weight_gradient, layer.rows, layer.row,
                                               gradient},
                          parallel_for_);
            if (i == 0) return;
            finish(steps[i - 1], sums);
            output = {nullptr, buffers[now].get(), pitch, steps[i - 1].z, steps[i - 1].layer->laid_out,
                      steps[i - 1].norm.gradient()};
        }
    }

    // The sums of a BN layer are complete: gradients of its gamma and beta, and what dz is made of.
    void finish(Step<T>& step, const GradientSums& sums) const {
        Norm<A>& norm = step.norm;
        A *gamma = static_cast<A*>(g_.gamma) + step.normalised, *beta = static_cast<A*>(g_.beta) + step.normalised;
        std::fill_n(gamma, step.layer->laid_out, A(0)), std::fill_n(beta, step.layer->laid_out, A(0));
        for (int64_t c = 0; c < step.layer->out; ++c) {
            const double normal = sums.product[c] * norm.rstd[c];
            gamma[c] = static_cast<A>(normal);
            beta[c] = static_cast<A>(sums.sum[c]);
            norm.offset[c] = static_cast<A>(sums.sum[c] / step.pixels);
            norm.slope[c] = static_cast<A>(norm.rstd[c] * normal / step.pixels);
        }
    }

    const Unit& u_;
    const UnitGradients& g_;
    const ParallelFor& parallel_for_;
    const T* grad_;
    int64_t grad_pitch_;
    const T* saved_;  // of the next layer, as the two below
    int64_t normalised_ = 0;
    size_t weights_ = 0;
};

}  // namespace

void unit_backward(const Unit& unit, const UnitGradients& gradients, const ParallelFor& parallel_for) {
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
