// Quantizers and their formulas in double precision, for tests of CUDA sources.
#pragma once

#include "device_values.h"
#include "kernels/cuda/quantizer.h"

namespace spos::test {

using cuda::QuantMode;

// Three bit-widths of which one is chosen, with random steps of both signs, and offsets.
struct Quantizers {
    std::vector<int32_t> bits;
    int64_t index;
    int32_t short_index;
    bool wide_index, with_offset, with_signs;
    int channels;
    QuantMode mode;
    Values step, offset;

    Quantizers(DType dtype, int chosen_bits, QuantMode mode, bool with_signs, bool with_offset, int channels)
        : bits{3, chosen_bits, 8},
          index(1),
          short_index(1),
          wide_index(channels % 2 == 1),
          with_offset(with_offset),
          with_signs(with_signs),
          channels(channels),
          mode(mode),
          step(statistics_of(dtype), 3 * channels),
          offset(statistics_of(dtype), 3 * channels) {
        std::mt19937 random(chosen_bits);
        std::uniform_real_distribution<double> uniform(0.5, 1.0);
        for (int64_t i = 0; i < step.size(); ++i) {
            // Values of about 1 in size reach both ends.
            const double reach = mode == QuantMode::lsq ? uniform(random) / (high() + 1) : uniform(random);
            step.set(i, i % 3 == 1 ? -reach : reach);
            offset.set(i, uniform(random) - 0.9);
        }
    }

    cuda::StepChoice choice() const {
        const void* which = wide_index ? static_cast<const void*>(&index) : &short_index;
        return {{bits.data(), which, wide_index, 3},
                step.data(),
                with_offset ? offset.data() : nullptr,
                channels,
                mode,
                with_signs};
    }

    int k() const { return bits[1]; }
    double low() const { return with_signs ? -(1 << (k() - 1)) : 0; }
    double high() const { return !with_signs ? (1 << k()) - 1 : k() == 1 ? 1 : (1 << (k() - 1)) - 1; }
    int64_t at(int channel) const { return index * channels + channel; }
    double size(int channel) const {
        const double length = std::fabs(step[at(channel)]);
        return std::max(mode == QuantMode::lsq ? length : length / high(), std::ldexp(1.0, -24));
    }
    double beta(int channel) const { return with_offset ? offset[at(channel)] : 0; }
    double position(double x, int channel) const { return (x - beta(channel)) / size(channel); }
    double code(double v) const {
        if (with_signs && k() == 1) return v < 0 ? -1 : 1;
        return std::nearbyint(std::clamp(v, low(), high()));
    }
    bool inside(double v) const { return v > low() && v < high(); }
    double share(double v) const {
        if (!inside(v)) return v >= high() ? high() : low();
        return mode == QuantMode::pact ? 0 : code(v) - v;
    }
    double factor(double values) const { return mode == QuantMode::lsq ? 1 / std::sqrt(values * high()) : 1 / high(); }

    // Whether float and double may disagree about the code, or about what is inside.
    bool undecided(double v) const {
        const double near = 1e-5 * (std::fabs(v) + 1);
        const double tie = std::fabs(std::fabs(v - std::floor(v)) - 0.5);
        return tie < near || std::fabs(v - low()) < near || std::fabs(v - high()) < near || std::fabs(v) < near;
    }
};

// Calls run(quantizers) for every mode, sign and some bit-widths.
template <typename Run>
void for_each_quantizer(DType dtype, int channels, bool offsets, Run run) {
    for (const int bits : {1, 2, 4, 8})
        for (const QuantMode mode : {QuantMode::pact, QuantMode::pact_residual, QuantMode::lsq})
            for (const bool with_signs : {false, true}) {
                if (with_signs && mode != QuantMode::lsq) continue;
                run(Quantizers(dtype, bits, mode, with_signs, offsets && mode == QuantMode::lsq, channels));
            }
}

}  // namespace spos::test
