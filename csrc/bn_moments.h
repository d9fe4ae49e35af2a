// The shape that every bn_moments kernel is given: how [N, C, H, W] lies in memory, split in groups of samples.
#pragma once

#include <cstdint>

namespace spos {

struct MomentsShape {
    int64_t groups;
    int64_t samples;  // per group
    int64_t channels;
    int64_t pixels;  // H * W
    bool channels_last;
    // Distance in elements from one sample to the next (NCHW), or from one pixel to the next (channels last). Larger
    // than the packed distance where x is a slice of channels: such a slice is read where it lies.
    int64_t pitch;

    int64_t count() const { return samples * pixels; }  // values behind each output
};

}  // namespace spos
