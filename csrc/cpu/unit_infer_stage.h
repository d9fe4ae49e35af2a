// A stage of fused inference: a 1x1 convolution (or nothing, where a branch begins with a depthwise one) and the
// depthwise convolution behind it (none at a branch's end). What lies between the two never leaves the L1 cache or,
// where a band of rows passes through, the L2.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "csrc/cpu/unit_infer.h"
#include "csrc/cpu/unit_infer_kernels.h"
#include "csrc/cpu/unit_kernels.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {

// Memory on a boundary of cache lines, so that no pack lies across two.
struct AlignedDelete {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <typename A>
using AlignedScratch = std::unique_ptr<A[], AlignedDelete>;
template <typename A>
AlignedScratch<A> aligned_scratch(int64_t size) {
    return AlignedScratch<A>(static_cast<A*>(::operator new(size * sizeof(A), std::align_val_t(64))));
}

// Parts of one piece of memory: laid out once to learn its size, and again when it is there. One piece, because the
// system gives many large ones back, and fresh ones page by page, at every call.
template <typename A>
struct Layout {
    A* start = nullptr;
    int64_t size = 0;

    A* take(int64_t count) {
        const int64_t place = size;
        size += whole_packs(count);
        return start ? start + place : nullptr;
    }
};

struct RowRange {
    int64_t begin, end;

    int64_t size() const { return end - begin; }
};

template <typename A>
struct Stage {
    bool pointwise = false;
    Panels<A> weights;
    std::vector<A> pointwise_shift;
    int64_t channels = 0;  // behind the 1x1 convolution, and behind the depthwise one
    int64_t kernel = 0;    // 0: no depthwise convolution
    int64_t stride = 1;
    std::vector<A> taps, depthwise_shift;
    int64_t height = 0, width = 0, out_width = 0;  // before and behind the depthwise convolution

    // What plan() decides: rows that are made at a time, before and behind the depthwise convolution, and the windows
    // of `images` images between.
    int64_t images = 1, rows = 0, out_rows = 0;
    WindowShape window{0, 0};
    std::vector<int64_t> places;  // of the pixels of all slots in a window, twice round

    int64_t pitch() const { return whole_packs(channels); }  // of what the stage makes
    int64_t window_size() const {                            // of one pack
        return images * window.slots * window.length + (kernel / 2 + kWindowSlack) * kPack;
    }
    int64_t packs() const { return divide_up(channels, kPack); }
    int64_t panels() const { return panels_of(packs()); }

    // Input rows of the depthwise convolution under these output rows; under the last one all that are left.
    RowRange reach(RowRange out) const {
        if (!kernel) return out;
        const int64_t end = (out.end - 1) * stride + std::max(kernel / 2 + 1, stride);
        return {std::max<int64_t>(0, out.begin * stride - kernel / 2), std::min(height, end)};
    }

    // For at most `most` rows at a time of `group` images. Returns the same for the stage before.
    int64_t plan(int64_t most, int64_t group) {
        out_rows = most, images = group;
        rows = kernel ? std::min(height, (most - 1) * stride + std::max(kernel, kernel / 2 + stride)) : most;
        window = {rows, (width + kernel / 2) * kPack};
        if (kernel) {
            places.resize((images + 1) * window.slots * width);
            for (int64_t row = 0, i = 0; row < (images + 1) * window.slots; ++row) {
                const int64_t start = row % (images * window.slots) * window.length + kernel / 2 * kPack;
                for (int64_t x = 0; x < width; ++x, ++i) places[i] = start + x * kPack;
            }
        }
        return rows;
    }
};

template <typename A>
std::vector<A> padded(const A* from, int64_t size) {
    std::vector<A> result(whole_packs(size), A(0));
    std::copy_n(from, size, result.begin());
    return result;
}

// [pack][kernel * kernel][kPack], with the scale in it.
template <typename A, typename T>
std::vector<A> pack_taps(const T* weights, int64_t channels, int64_t kernel, const A* scale) {
    const int64_t taps = kernel * kernel;
    std::vector<A> packed(whole_packs(channels) * taps, A(0));
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t)
            packed[(c / kPack * taps + t) * kPack + c % kPack] = widen(weights[c * taps + t]) * (scale ? scale[c] : 1);
    return packed;
}

// A branch's stages, still without the weights of the 1x1 convolutions: pack_stages() makes those.
template <typename A, typename T>
std::vector<Stage<A>> make_stages(const UnitInference& unit, const std::vector<InferLayer>& layers) {
    const A *scale = static_cast<const A*>(unit.scale), *shift = static_cast<const A*>(unit.shift);
    std::vector<Stage<A>> stages;
    int64_t channels = unit.split ? unit.channels / 2 : unit.channels, stride = unit.stride;
    int64_t height = unit.height, width = unit.width;
    for (const InferLayer& layer : layers) {
        if (stages.empty() || layer.kernel == 0) {
            stages.emplace_back();
            stages.back().height = height, stages.back().width = stages.back().out_width = width;
        }
        Stage<A>& stage = stages.back();
        stage.channels = layer.channels;
        if (layer.kernel == 0) {
            stage.pointwise = true;
            stage.weights.depth = channels, stage.weights.columns = layer.channels;
            stage.pointwise_shift = padded(shift + layer.first, layer.channels);
        } else {
            stage.kernel = layer.kernel, stage.stride = stride;
            stage.taps = pack_taps(static_cast<const T*>(layer.weights), layer.channels, layer.kernel,
                                   scale ? scale + layer.first : nullptr);
            stage.depthwise_shift = padded(shift + layer.first, layer.channels);
            height = (height - 1) / stride + 1, width = (width - 1) / stride + 1, stride = 1;
            stage.out_width = width;
        }
        channels = layer.channels;
    }
    return stages;
}

}  // namespace spos::cpu
