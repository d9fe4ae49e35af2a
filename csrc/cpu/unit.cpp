#include "csrc/cpu/unit.h"

namespace spos::cpu {

int64_t Unit::stride() const {
    int64_t stride = 1;
    for (const Layer& layer : main) stride *= layer.stride;
    return stride;
}

int64_t Unit::passing() const {
    return projection.empty() ? channels / 2 : projection.back().out;
}

int64_t Unit::out_channels() const {
    return passing() + main.back().out;
}

std::vector<const Layer*> Unit::layers() const {
    std::vector<const Layer*> all;
    for (const auto* chain : {&main, &projection})
        for (const Layer& layer : *chain) all.push_back(&layer);
    return all;
}

int64_t Unit::normalised() const {
    int64_t sum = 0;
    for (const Layer* layer : layers()) sum += layer->laid_out;
    return sum;
}

int64_t Unit::pixels_behind(const std::vector<Layer>& chain, size_t layer) const {
    int64_t h = height, w = width;
    for (size_t i = 0; i <= layer; ++i) h = (h - 1) / chain[i].stride + 1, w = (w - 1) / chain[i].stride + 1;
    return samples * h * w;
}

int64_t Unit::saved_size() const {
    int64_t sum = 0;
    for (const auto* chain : {&main, &projection})
        for (size_t i = 0; i < chain->size(); ++i) sum += pixels_behind(*chain, i) * (*chain)[i].laid_out;
    return sum;
}

Unit unit_of(const UnitShape& shape, const std::vector<Weight>& weights) {
    struct Width {
        int64_t used, laid, stored;
    };
    const int64_t before = shape.projects ? shape.channels : shape.channels / 2;
    const Width outer{before, before, before}, inner{shape.used, shape.mid, shape.stored};
    const Width made{shape.made, shape.made, shape.made};
    size_t next = 0;
    auto depthwise = [&](const Width& width, int64_t stride) {
        const auto& [data, kernel] = weights[next++];
        return Layer{true, width.used, width.used, width.laid, kernel, stride, data, width.stored, kernel * kernel};
    };
    auto pointwise = [&](const Width& in, const Width& out) {
        return Layer{false, in.used, out.used, out.laid, 1, 1, weights[next++].data, out.stored, in.stored};
    };
    Unit unit{shape.dtype, shape.samples, shape.height, shape.width, shape.channels, nullptr, {}, {}, nullptr,
              nullptr,     1e-5};
    auto& main = unit.main;
    if (shape.kind == UnitKind::shuffle) {
        main.push_back(pointwise(outer, inner));
        main.push_back(depthwise(inner, shape.stride));
        main.push_back(pointwise(inner, made));
    } else {
        const Width* widths[] = {&outer, &inner, &inner, &made};
        for (int i = 0; i < 3; ++i) {
            main.push_back(depthwise(*widths[i], i == 0 ? shape.stride : 1));
            main.push_back(pointwise(*widths[i], *widths[i + 1]));
        }
    }
    if (shape.projects) {
        unit.projection.push_back(depthwise(outer, shape.stride));
        unit.projection.push_back(pointwise(outer, outer));
    }
    return unit;
}

}  // namespace spos::cpu
