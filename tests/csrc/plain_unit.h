// The fused units in plain loops and double: what the kernels are measured against.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "csrc/cpu/unit.h"

namespace spos::test {

using Values = std::vector<double>;

// A convolution with BN and perhaps ReLU; z, y and the statistics are what forward() leaves for backward().
struct PlainLayer {
    cpu::Layer layer;
    int64_t samples, height, width;  // of the input
    Values weight, gamma, beta;      // weight: of the channels that are used, no gaps
    double epsilon;
    Values x, z, y, mean, var, weight_gradient, gamma_gradient, beta_gradient;

    int64_t out_height() const { return (height - 1) / layer.stride + 1; }
    int64_t out_width() const { return (width - 1) / layer.stride + 1; }
    int64_t out_pixels() const { return samples * out_height() * out_width(); }

    // act(output place, input place, weight place) for every product of the convolution.
    template <typename Act>
    void each_product(Act act) const {
        const int64_t halo = layer.kernel / 2;
        for (int64_t n = 0; n < samples; ++n)
            for (int64_t oy = 0; oy < out_height(); ++oy)
                for (int64_t ox = 0; ox < out_width(); ++ox)
                    for (int64_t ky = 0; ky < layer.kernel; ++ky)
                        for (int64_t kx = 0; kx < layer.kernel; ++kx) {
                            const int64_t y = oy * layer.stride + ky - halo, x = ox * layer.stride + kx - halo;
                            if (y < 0 || y >= height || x < 0 || x >= width) continue;
                            const int64_t from = ((n * height + y) * width + x) * layer.in;
                            const int64_t to = ((n * out_height() + oy) * out_width() + ox) * layer.out;
                            for (int64_t o = 0; o < layer.out; ++o) {
                                if (layer.depthwise)
                                    act(to + o, from + o, (o * layer.kernel + ky) * layer.kernel + kx);
                                else
                                    for (int64_t i = 0; i < layer.in; ++i) act(to + o, from + i, o * layer.in + i);
                            }
                        }
    }

    const Values& forward(const Values& input) {
        x = input;
        z.assign(out_pixels() * layer.out, 0);
        each_product([&](int64_t to, int64_t from, int64_t at) { z[to] += weight[at] * x[from]; });
        mean.assign(layer.out, 0), var.assign(layer.out, 0), y = z;
        const double count = double(out_pixels());
        for (size_t i = 0; i < z.size(); ++i) mean[i % layer.out] += z[i] / count;
        for (size_t i = 0; i < z.size(); ++i) var[i % layer.out] += std::pow(z[i] - mean[i % layer.out], 2) / count;
        for (size_t i = 0; i < z.size(); ++i) {
            const int64_t c = i % layer.out;
            y[i] = (z[i] - mean[c]) / std::sqrt(var[c] + epsilon) * gamma[c] + beta[c];
            if (!layer.depthwise && y[i] < 0) y[i] = 0;
        }
        return y;
    }

    Values backward(Values grad) {
        gamma_gradient.assign(layer.out, 0), beta_gradient.assign(layer.out, 0);
        auto normal = [&](size_t i) {
            return (z[i] - mean[i % layer.out]) / std::sqrt(var[i % layer.out] + epsilon);
        };
        for (size_t i = 0; i < grad.size(); ++i) {
            const int64_t c = i % layer.out;
            if (!layer.depthwise && !(y[i] > 0)) grad[i] = 0;
            gamma_gradient[c] += grad[i] * normal(i), beta_gradient[c] += grad[i];
        }
        const double count = double(out_pixels());
        for (size_t i = 0; i < grad.size(); ++i) {
            const int64_t c = i % layer.out;
            grad[i] = gamma[c] / std::sqrt(var[c] + epsilon) *
                      (grad[i] - beta_gradient[c] / count - normal(i) * gamma_gradient[c] / count);
        }
        Values result(x.size());
        weight_gradient.assign(weight.size(), 0);
        each_product([&](int64_t to, int64_t from, int64_t at) {
            result[from] += weight[at] * grad[to];
            weight_gradient[at] += x[from] * grad[to];
        });
        return result;
    }
};

// The whole unit; statistics and gradients of gamma and beta lie as the kernels lay them.
struct PlainUnit {
    cpu::Unit unit;
    std::vector<PlainLayer> main, projection;
    Values out, mean, var, x_gradient, gamma_gradient, beta_gradient;

    // value(weights, index) of the stored weights of unit.layers(); gamma and beta as the unit has them.
    template <typename Value>
    PlainUnit(const cpu::Unit& unit, const Values& gamma, const Values& beta, Value value) : unit(unit) {
        int64_t index = 0, first = 0;
        for (auto [from, to] : {std::pair{&unit.main, &main}, std::pair{&unit.projection, &projection}}) {
            int64_t height = unit.height, width = unit.width;
            for (const cpu::Layer& layer : *from) {
                PlainLayer plain{layer, unit.samples, height, width, {}, {}, {}, unit.epsilon, {}, {}, {}, {}, {}, {}, {}, {}};
                const int64_t columns = layer.depthwise ? layer.row : layer.in;
                for (int64_t o = 0; o < layer.out; ++o)
                    for (int64_t i = 0; i < columns; ++i) plain.weight.push_back(value(index, o * layer.row + i));
                for (int64_t o = 0; o < layer.out; ++o) {
                    plain.gamma.push_back(gamma.empty() ? 1 : gamma[first + o]);
                    plain.beta.push_back(beta.empty() ? 0 : beta[first + o]);
                }
                height = plain.out_height(), width = plain.out_width();
                to->push_back(plain);
                ++index, first += layer.laid_out;
            }
        }
    }

    void run(const Values& x, const Values& grad) {
        const int64_t passing = unit.passing(), channels = unit.out_channels();
        const int64_t pixels = unit.samples * unit.out_height() * unit.out_width();
        const bool splits = unit.projection.empty();
        auto channels_of = [](const Values& values, int64_t pitch, int64_t first, int64_t step, int64_t count) {
            Values result;
            for (size_t p = 0; p < values.size() / pitch; ++p)
                for (int64_t c = 0; c < count; ++c) result.push_back(values[p * pitch + first + step * c]);
            return result;
        };
        Values main_out = splits ? channels_of(x, unit.channels, 1, 2, passing) : x, front;
        for (PlainLayer& layer : main) main_out = layer.forward(main_out);
        if (splits) front = channels_of(x, unit.channels, 0, 2, passing);
        Values projected = x;
        for (PlainLayer& layer : projection) front = projected = layer.forward(projected);
        out.clear();
        for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < channels; ++c)
                out.push_back(c < passing ? front[p * passing + c]
                                          : main_out[p * (channels - passing) + c - passing]);

        Values main_grad = channels_of(grad, channels, passing, 1, channels - passing);
        Values front_grad = channels_of(grad, channels, 0, 1, passing);
        for (size_t i = main.size(); i-- > 0;) main_grad = main[i].backward(main_grad);
        for (size_t i = projection.size(); i-- > 0;) front_grad = projection[i].backward(front_grad);
        x_gradient.assign(x.size(), 0);
        for (size_t i = 0; i < x.size(); ++i)
            x_gradient[i] = !splits    ? main_grad[i] + front_grad[i]
                            : i % 2    ? main_grad[i / 2]
                                       : front_grad[i / 2];
        for (auto* chain : {&main, &projection})
            for (const PlainLayer& layer : *chain)
                for (int64_t c = 0; c < layer.layer.laid_out; ++c) {
                    const bool used = c < layer.layer.out;
                    mean.push_back(used ? layer.mean[c] : 0), var.push_back(used ? layer.var[c] : 0);
                    gamma_gradient.push_back(used ? layer.gamma_gradient[c] : 0);
                    beta_gradient.push_back(used ? layer.beta_gradient[c] : 0);
                }
    }
};

}  // namespace spos::test
