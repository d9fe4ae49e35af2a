// Values [outer, channels, inner] where a channel's are runs: how blocks share them, channel by channel.
#pragma once

#include <algorithm>

#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/quantizer.h"

namespace spos::cuda {

// Vectors of a channel that a block takes, and how many blocks a channel has. Depends on the shape alone, so that every
// GPU gives the same bits.
struct RunPlan {
    int64_t per_chunk, chunks;
};

inline RunPlan plan_runs(int threads, const QuantShape& shape, int vector, int64_t blocks, int64_t least) {
    const int64_t vectors = shape.per_channel() / vector;
    const int64_t wanted = std::max<int64_t>(1, blocks / shape.channels);
    const int64_t per_chunk = std::max(threads * least, divide_up(vectors, wanted));
    return {per_chunk, divide_up(vectors, per_chunk)};
}

// The vectors of one block: [begin, end) of its channel's.
struct Runs {
    int64_t begin, end;

    __device__ Runs(const QuantShape& shape, int vector, int64_t channel, int64_t chunk, int64_t per_chunk)
        : begin(chunk * per_chunk),
          run_(shape.inner / vector),
          start_(channel * shape.inner),
          distance_(shape.channels * shape.inner),
          vector_(vector),
          one_run_(shape.outer == 1) {
        const int64_t all = shape.outer * run_;
        end = begin + per_chunk < all ? begin + per_chunk : all;
    }

    // Where a vector begins.
    __device__ int64_t offset(int64_t vector) const {
        if (one_run_) return start_ + vector * vector_;
        const int64_t run = vector / run_;
        return start_ + run * distance_ + (vector - run * run_) * vector_;
    }

  private:
    int64_t run_, start_, distance_;
    int vector_;
    bool one_run_;
};

}  // namespace spos::cuda
