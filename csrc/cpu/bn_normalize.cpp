// Both layouts run on the routine that the fused units normalise with. It takes rows of channels that each have a scale
// and a shift: channels last they are pixels; NCHW a plane is cut into rows of one pack, all lanes of which have the
// plane's.
#include "csrc/cpu/bn_normalize.h"

#include <algorithm>

#include "csrc/cpu/simd.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kTaskElements = 65536;

template <typename T, typename A>
void normalize_columns(const T* x, const MomentsShape& s, const A* scale, const A* shift, bool relu, T* out,
                       bool stream, const ParallelFor& parallel_for) {
    // What lies behind a group's last channel must be readable.
    const int64_t packed = whole_packs(s.channels);
    Lines<A> scales(s.groups * packed), shifts(s.groups * packed);
    for (int64_t g = 0; g < s.groups; ++g) {
        std::copy_n(scale + g * s.channels, s.channels, scales.data() + g * packed);
        std::copy_n(shift + g * s.channels, s.channels, shifts.data() + g * packed);
    }
    const int64_t rows = s.count(), block = std::min(rows, std::max<int64_t>(1, kTaskElements / s.channels));
    const int64_t blocks = divide_up(rows, block);
    parallel_for(s.groups * blocks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t g = task / blocks, first = task % blocks * block, pixel = g * rows + first;
            scale_and_shift(x + pixel * s.pitch, s.pitch, std::min(block, rows - first), s.channels,
                            scales.data() + g * packed, shifts.data() + g * packed, relu, out + pixel * s.channels,
                            s.channels, stream);
        }
    });
}

template <typename T, typename A>
void normalize_planes(const T* x, const MomentsShape& s, const A* scale, const A* shift, bool relu, T* out, bool stream,
                      const ParallelFor& parallel_for) {
    const int64_t planes = s.groups * s.samples * s.channels, whole = s.pixels / kPack, rest = s.pixels % kPack;
    const int64_t per_task = std::max<int64_t>(1, kTaskElements / s.pixels);
    parallel_for(divide_up(planes, per_task), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin * per_task; plane < std::min(planes, end * per_task); ++plane) {
            const int64_t sample = plane / s.channels, c = plane % s.channels;
            const int64_t at = sample / s.samples * s.channels + c;
            A scales[kPack], shifts[kPack];
            std::fill_n(scales, kPack, scale[at]);
            std::fill_n(shifts, kPack, shift[at]);
            const T* from = x + sample * s.pitch + c * s.pixels;
            T* to = out + plane * s.pixels;
            scale_and_shift(from, kPack, whole, kPack, scales, shifts, relu, to, kPack, stream);
            if (rest > 0)
                scale_and_shift(from + whole * kPack, rest, 1, rest, scales, shifts, relu, to + whole * kPack, rest);
        }
    });
}

template <typename T>
void normalize(const void* x, const MomentsShape& s, const void* scale, const void* shift, bool relu, void* out,
               const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const bool stream = s.groups * s.count() * s.channels * int64_t(sizeof(T)) > kKept;
    const auto run = s.channels_last ? normalize_columns<T, A> : normalize_planes<T, A>;
    run(static_cast<const T*>(x), s, static_cast<const A*>(scale), static_cast<const A*>(shift), relu,
        static_cast<T*>(out), stream, parallel_for);
}

}  // namespace

void bn_normalize(DType dtype, const void* x, const MomentsShape& shape, const void* scale, const void* shift,
                  bool relu, void* out, const ParallelFor& parallel_for) {
    switch (dtype) {
        case DType::float32:
            return normalize<float>(x, shape, scale, shift, relu, out, parallel_for);
        case DType::float64:
            return normalize<double>(x, shape, scale, shift, relu, out, parallel_for);
        case DType::float16:
            return normalize<Half>(x, shape, scale, shift, relu, out, parallel_for);
        case DType::bfloat16:
            return normalize<BFloat16>(x, shape, scale, shift, relu, out, parallel_for);
    }
}

}  // namespace spos::cpu
