#include "csrc/cpu/layers.h"
#include "csrc/cpu/unit.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

template <typename T>
class Forward {
    using A = typename Compute<T>::type;

  public:
    Forward(const Unit& unit, const UnitOutputs& outputs, const ParallelFor& parallel_for)
        : u_(unit),
          parallel_for_(parallel_for),
          x_(static_cast<const T*>(unit.x)),
          saved_(static_cast<T*>(outputs.saved)),
          mean_(static_cast<A*>(outputs.mean)),
          var_(static_cast<A*>(outputs.var)),
          out_(static_cast<T*>(outputs.out)),
          out_pitch_(unit.out_channels()),
          stream_(unit.samples * unit.out_height() * unit.out_width() * out_pitch_ * int64_t(sizeof(T)) > kKept) {}

    void run() {
        chain(u_.main, u_.passing());
        if (!u_.projection.empty()) chain(u_.projection, 0);
    }

  private:
    // All layers of a chain; its result goes to `out` from the channel `first` on.
    void chain(const std::vector<Layer>& layers, int64_t first) {
        const bool splits = u_.projection.empty();
        Input<T> input{splits ? x_ + 1 : x_, u_.channels, splits ? 2 : 1};
        Passing<T> passing;
        if (splits) passing = {x_, u_.channels, out_, out_pitch_, stream_};
        int64_t pitch = 0, height = u_.height, width = u_.width;
        for (const Layer& layer : layers) pitch = std::max(pitch, layer.laid_out);
        std::vector<Affine<A>> norms;
        norms.reserve(layers.size());
        for (size_t i = 0; i < layers.size(); ++i) {
            const Layer& layer = layers[i];
            const T* weight = static_cast<const T*>(layer.weight);
            const Window window{u_.samples, height, width, layer.in, layer.kernel, layer.stride};
            const int64_t pixels = u_.pixels_behind(layers, i);
            const bool in_place = i > 0 && (!layer.depthwise || works_in_place(window));
            T* z = saved_ ? saved_ : inner(in_place, pixels * pitch, input.start);
            const int64_t z_pitch = saved_ ? layer.laid_out : pitch;
            if (saved_) saved_ += pixels * layer.laid_out;
            const bool backwards = i % 2 == 1;
            const Moments moments =
                layer.depthwise ? depthwise_forward(Depthwise<T>{input, window, weight, z, z_pitch, passing, backwards},
                                                    parallel_for_)
                                : pointwise_forward(Pointwise<T>{input, pixels, layer.in, layer.out, weight, layer.row,
                                                                 z, z_pitch, passing, backwards},
                                                    parallel_for_);
            norms.push_back(normalisation(layer, moments, pixels));
            input = {z, z_pitch, 1, norms.back().scale.data(), norms.back().shift.data(), !layer.depthwise};
            passing = {};
            height = window.out_height(), width = window.out_width();
        }
        activate(input, u_.samples * height * width, layers.back().out, out_ + first, out_pitch_, stream_,
                 layers.size() % 2 == 1, parallel_for_);
    }

    // Memory for a layer's output that nobody will need: where its input lies, or else in one of two buffers.
    T* inner(bool in_place, int64_t size, const T* input) {
        if (in_place) return const_cast<T*>(input);
        const int which = input == buffers_[0].get() ? 1 : 0;
        if (sizes_[which] < size) buffers_[which] = scratch<T>(size), sizes_[which] = size;
        return buffers_[which].get();
    }

    // Stores a layer's statistics, and returns its BN.
    Affine<A> normalisation(const Layer& layer, const Moments& moments, int64_t count) {
        for (int64_t c = 0; c < layer.laid_out; ++c) {
            mean_[c] = c < layer.out ? static_cast<A>(moments.mean[c]) : 0;
            var_[c] = c < layer.out ? static_cast<A>(moments.m2[c] / count) : 0;
        }
        const A *gamma = static_cast<const A*>(u_.gamma), *beta = static_cast<const A*>(u_.beta);
        Affine<A> affine(layer.out, mean_, var_, gamma ? gamma + norm_ : nullptr, beta ? beta + norm_ : nullptr,
                         u_.epsilon);
        mean_ += layer.laid_out, var_ += layer.laid_out, norm_ += layer.laid_out;
        return affine;
    }

    const Unit& u_;
    const ParallelFor& parallel_for_;
    const T* x_;
    T* saved_;        // of the next layer
    A *mean_, *var_;  // likewise
    int64_t norm_ = 0;
    T* out_;
    int64_t out_pitch_;
    bool stream_;  // `out` is written past the caches
    Scratch<T> buffers_[2];
    int64_t sizes_[2] = {};
};

}  // namespace

void unit_forward(const Unit& unit, const UnitOutputs& outputs, const ParallelFor& parallel_for) {
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
