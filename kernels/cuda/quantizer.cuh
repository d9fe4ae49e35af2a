// Rounding to codes on the device, and the gradients of what it depends on.
#pragma once

#include <cmath>

#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/quantizer.h"

namespace spos::cuda {

constexpr float kLeastStep = 1.0f / (1 << 24);

// To nearest, ties to even, and a NaN to itself.
__device__ inline float round_to_even(float value) {
    return rintf(value);
}
__device__ inline double round_to_even(double value) {
    return rint(value);
}

// An index out of range is not reported, but nothing outside of the vectors is read.
__device__ inline int chosen(const BitChoice& choice) {
    const int64_t index =
        choice.wide_index ? *static_cast<const int64_t*>(choice.index) : *static_cast<const int32_t*>(choice.index);
    return index < 0 ? 0 : index < choice.choices ? static_cast<int>(index) : choice.choices - 1;
}

// For V channels from `channel` on; codes, positions and steps are in the dtype that sums are made in.
template <int V, typename A>
struct Quantizer {
    A low, high, size[V], offset[V];
    QuantMode mode;
    bool sign_only;  // a single signed bit: its codes are -1 and 1

    __device__ Quantizer(const StepChoice& choice, int channel) {
        const int64_t row = static_cast<int64_t>(set_range(choice)) * choice.channels;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const bool inside = channel + v < choice.channels;
            set_step(choice, inside ? row + channel + v : row, v);
        }
    }

    // One channel's in all places.
    __device__ static Quantizer same(const StepChoice& choice, int channel) {
        Quantizer made;
        const int64_t row = static_cast<int64_t>(made.set_range(choice)) * choice.channels;
        made.set_step(choice, row + channel, 0);
#pragma unroll
        for (int v = 1; v < V; ++v) made.size[v] = made.size[0], made.offset[v] = made.offset[0];
        return made;
    }

    // The value in units of the step.
    __device__ A position(A value, int v) const { return (value - offset[v]) / size[v]; }

    __device__ A code(A position) const {
        if (sign_only) return position >= 0 ? A(1) : position < 0 ? A(-1) : position;
        return round_to_even(position < low ? low : position > high ? high : position);
    }

    __device__ A value(A code, int v) const { return code * size[v] + offset[v]; }

    __device__ A operator()(A x, int v) const { return value(code(position(x, v)), v); }

    // Whether the gradient passes; a NaN is outside.
    __device__ bool inside(A position) const { return position > low && position < high; }

    // What the gradient is multiplied by in the parameter's sum, but for `factor`. Outside that is the code: a bound,
    // or NaN, which so shows in the gradient of the parameter.
    __device__ A share(A position) const {
        if (!inside(position)) return position >= high ? high : position <= low ? low : position;
        return mode == QuantMode::pact ? A(0) : code(position) - position;
    }

    // What the sum is multiplied by, `values` being the number of those that share the step.
    __device__ double factor(double values) const {
        return mode == QuantMode::lsq ? 1 / sqrt(values * high) : 1 / static_cast<double>(high);
    }

  private:
    __device__ Quantizer() {}

    __device__ int set_range(const StepChoice& choice) {
        const int which = chosen(choice.bits), bits = choice.bits.bits[which];
        mode = choice.mode;
        sign_only = choice.signed_codes && bits == 1;
        const int half = 1 << (bits - 1);
        low = choice.signed_codes ? static_cast<A>(-half) : A(0);
        high = static_cast<A>(sign_only ? 1 : choice.signed_codes ? half - 1 : 2 * half - 1);
        return which;
    }

    __device__ void set_step(const StepChoice& choice, int64_t at, int v) {
        const A step = static_cast<const A*>(choice.step)[at], length = step < 0 ? -step : step;
        const A found = mode == QuantMode::lsq ? length : length / high;
        size[v] = found < A(kLeastStep) ? A(kLeastStep) : found;
        offset[v] = choice.offset == nullptr ? A(0) : static_cast<const A*>(choice.offset)[at];
    }
};

// Where finish_sums writes the gradients of step (part 0) and offset (part 1), [choices, channels]: zero but for the
// choice that was made.
template <typename A>
struct StepGradients {
    StepChoice choice;
    double values;  // that share a step
    A *step, *offset;

    __device__ void set(int part, int channel, double sum) const {
        const Quantizer<1, A> quantizer = Quantizer<1, A>::same(choice, channel);
        const int which = chosen(choice.bits);
        sum *= quantizer.factor(values);
        if (part == 0) {
            // The step is the magnitude of the parameter.
            if (static_cast<const A*>(choice.step)[static_cast<int64_t>(which) * choice.channels + channel] < 0)
                sum = -sum;
        } else if (choice.offset == nullptr) {
            sum = 0;
        }
        A* to = part == 0 ? step : offset;
        for (int k = 0; k < choice.bits.choices; ++k)
            to[static_cast<int64_t>(k) * choice.channels + channel] = k == which ? static_cast<A>(sum) : A(0);
    }
};

}  // namespace spos::cuda
