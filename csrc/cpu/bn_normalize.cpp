// Channels last, on the routine that the fused units normalise with. NCHW, plane by plane: a plane has one scale.
#include "csrc/cpu/bn_normalize.h"

#include <algorithm>
#include <limits>

#include "csrc/cpu/simd.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kTaskElements = 65536;

// to[i] = max(scale * from[i] + shift, floor), or NaN where that is NaN.
template <typename T, typename A>
SPOS_SIMD_INLINE void walk_plane(const T* from, int64_t size, A scale, A shift, A floor, T* to) {
    using Pack = decltype(load_pack(from));
    auto result = [=](const Pack& value) __attribute__((always_inline)) {
        const Pack y = scale * value + shift, least = Pack{} + floor;
        return y < least ? least : y;
    };
    if (size < kPack) return store_partial(to, result(load_partial(from, size)), size);
    for (int64_t i = 0; i < size; i += kPack) {
        i = std::min(i, size - kPack);  // the last pack may cover values again, with the same results
        store_pack(to + i, result(load_pack(from + i)));
    }
}

// Clones cannot be templates: one named function for each element type.
#define SPOS_PLANE(T, A)                                                                                   \
    SPOS_SIMD_CLONES void normalize_plane(const T* from, int64_t size, A scale, A shift, A floor, T* to) { \
        walk_plane(from, size, scale, shift, floor, to);                                                   \
    }
SPOS_PLANE(float, float)
SPOS_PLANE(double, double)
SPOS_PLANE(Half, float)
SPOS_PLANE(BFloat16, float)
#undef SPOS_PLANE

template <typename T, typename A>
void normalize_columns(const T* x, const MomentsShape& s, const A* scale, const A* shift, bool relu, T* out,
                       const ParallelFor& parallel_for) {
    const bool stream = s.groups * s.count() * s.channels * int64_t(sizeof(T)) > kKept;
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
void normalize_planes(const T* x, const MomentsShape& s, const A* scale, const A* shift, bool relu, T* out,
                      const ParallelFor& parallel_for) {
    const int64_t planes = s.groups * s.samples * s.channels;
    const int64_t per_task = std::max<int64_t>(1, kTaskElements / s.pixels);
    const A floor = relu ? 0 : -std::numeric_limits<A>::infinity();
    parallel_for(divide_up(planes, per_task), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin * per_task; plane < std::min(planes, end * per_task); ++plane) {
            const int64_t sample = plane / s.channels, c = plane % s.channels;
            const int64_t at = sample / s.samples * s.channels + c;
            normalize_plane(x + sample * s.pitch + c * s.pixels, s.pixels, scale[at], shift[at], floor,
                            out + plane * s.pixels);
        }
    });
}

template <typename T>
void normalize(const void* x, const MomentsShape& s, const void* scale, const void* shift, bool relu, void* out,
               const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const auto run = s.channels_last ? normalize_columns<T, A> : normalize_planes<T, A>;
    run(static_cast<const T*>(x), s, static_cast<const A*>(scale), static_cast<const A*>(shift), relu,
        static_cast<T*>(out), parallel_for);
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
