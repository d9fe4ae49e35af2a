// Rows in pieces. The maximum is found on |w| and its tanh taken by the same vector code as the others', so that the
// greatest weight is the one that is at the end of the scale.
#include "csrc/cpu/quantize_weights.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/cpu/moments.h"
#include "csrc/cpu/tanh.h"
#include "csrc/cpu/unit_kernels.h"

namespace spos::cpu {
namespace {

constexpr int64_t kTaskElements = 32768;
constexpr int64_t kBlock = 64 * kPack;  // values whose sums are taken in the type of the computation

// Calls body(i, whole, lanes) for packs of `size` values; `whole` is a compile-time boolean.
template <typename Body>
SPOS_SIMD_INLINE void each_pack(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + kPack <= size; i += kPack) body(i, std::true_type{}, kPack);
    if (i < size) body(i, std::false_type{}, size - i);
}

template <typename Pack>
SPOS_SIMD_INLINE Pack magnitude_of(const Pack& x) {
    return x < 0 ? -x : x;
}

Extent merged(const Extent& a, const Extent& b) {
    const Extent& top = a.greatest < b.greatest ? b : a;
    const double count = a.greatest == b.greatest ? a.count + b.count : top.count;
    return {top.greatest, a.magnitude + b.magnitude, count, a.products + b.products};
}

// Of a block; a NaN shows in the magnitude only. grad: null: count and products are not wanted.
template <bool kGrad, typename T>
SPOS_SIMD_INLINE Extent extent_of(const T* grad, const T* weights, int64_t size) {
    using Pack = decltype(load_pack(weights));
    Pack greatest{}, count{}, sum{}, products{};
    each_pack(size, [&](int64_t i, auto whole, int64_t lanes) __attribute__((always_inline)) {
        const Pack a = magnitude_of(load_lanes<whole>(weights + i, lanes));
        sum += a;
        if constexpr (kGrad) {
            const Pack more = a == greatest ? count + 1 : count;
            count = a > greatest ? Pack{} + 1 : more;
        }
        greatest = a > greatest ? a : greatest;
    });
    Extent result{};
    for (int64_t lane = 0; lane < kPack; ++lane)
        result = merged(result, Extent{greatest[lane], sum[lane], count[lane], 0});
    if constexpr (kGrad) {
        auto add = [&](auto tanh) __attribute__((always_inline)) {
            each_pack(size, [&](int64_t i, auto whole, int64_t lanes) __attribute__((always_inline)) {
                products += load_lanes<whole>(grad + i, lanes) * tanh(load_lanes<whole>(weights + i, lanes));
            });
        };
        if (result.greatest < kSmallTanh)
            add([](const Pack& x) __attribute__((always_inline)) { return small_tanh(x); });
        else
            add([](const Pack& x) __attribute__((always_inline)) { return any_tanh(x); });
        result.products = sum_of<double>(products);
    }
    return result;
}

// What a row's maximum means for its weights.
template <typename A>
struct Scale {
    A maximum;   // m
    A greatest;  // the |w| through which a gradient goes; NaN: none
    A share;     // what it gets of the sum of g t, by m
    bool small;  // whether all magnitudes are small
};

// Codes of one bit or of more.
template <bool kSingle, bool kSmall, typename Pack, typename A>
SPOS_SIMD_INLINE Pack dorefa_code(const Pack& w, A maximum, A n) {
    if constexpr (kSingle) return code_of<true>(w, A(-1), A(1));
    const Pack t = kSmall ? small_tanh(w) : any_tanh(w);
    const Pack level = n * (t / (2 * maximum) + A(0.5));
    return 2 * ((level + rounder(A())) - rounder(A())) - n;
}

template <typename T, typename A, typename Write>
SPOS_SIMD_INLINE void dorefa_run(const T* weights, int64_t size, const Scale<A>& scale, int64_t bits, Write write) {
    const A n = A((int64_t(1) << bits) - 1);
    auto walk = [&](auto single, auto small) __attribute__((always_inline)) {
        each_pack(size, [&](int64_t i, auto whole, int64_t lanes) __attribute__((always_inline)) {
            write(i, dorefa_code<single, small>(load_lanes<whole>(weights + i, lanes), scale.maximum, n), whole, lanes);
        });
    };
    if (bits == 1)
        walk(std::true_type{}, std::true_type{});
    else if (scale.small)
        walk(std::false_type{}, std::true_type{});
    else
        walk(std::false_type{}, std::false_type{});
}

// Writes whole codes as bytes, 0 for NaN.
template <typename A, bool kWhole, typename Pack>
SPOS_SIMD_INLINE void store_codes(int8_t* to, const Pack& code, int64_t lanes, Pack& bad) {
    const Pack zero{};
    bad += code * 0;  // codes are finite or NaN
    const BytePack bytes = bytes_of(code == code ? code : zero);
    std::memcpy(to, &bytes, kWhole ? kPack : lanes);
}

// Clones cannot be templates: named functions for each element type.
#define SPOS_WEIGHTS(T, A)                                                                                             \
    SPOS_SIMD_CLONES Extent block_extent(const T* grad, const T* weights, int64_t size) {                              \
        return grad ? extent_of<true>(grad, weights, size) : extent_of<false>(grad, weights, size);                    \
    }                                                                                                                  \
    SPOS_SIMD_CLONES A tanh_of(A value, const T*) {                                                                    \
        return any_tanh(decltype(load_pack(&value)){} + value)[0];                                                     \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void level_run(const T* weights, int64_t size, const Scale<A>& scale, int64_t bits, A unit,       \
                                    T* out) {                                                                          \
        dorefa_run(weights, size, scale, bits,                                                                         \
                   [&](int64_t i, const auto& code, auto whole, int64_t lanes)                                         \
                       __attribute__((always_inline)) { store_lanes<whole>(out + i, code * unit, lanes); });           \
    }                                                                                                                  \
    SPOS_SIMD_CLONES bool code_run(const T* weights, int64_t size, const Scale<A>& scale, int64_t bits, int8_t* out) { \
        decltype(load_pack(weights)) bad{};                                                                            \
        const A factor = bits == 8 ? A(0.5) : A(1), less = bits == 8 ? A(0.5) : A(0);                                  \
        dorefa_run(weights, size, scale, bits,                                                                         \
                   [&](int64_t i, const auto& code, auto whole, int64_t lanes) __attribute__((always_inline)) {        \
                       store_codes<A, whole>(out + i, code * factor - less, lanes, bad);                               \
                   });                                                                                                 \
        const A sum = sum_of<A>(bad);                                                                                  \
        return sum == sum;                                                                                             \
    }                                                                                                                  \
    SPOS_SIMD_CLONES bool step_run(const T* weights, int64_t size, const Quantizer& quantizer, A step, int8_t* out) {  \
        return step_codes_of(weights, size, quantizer, step, out);                                                     \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void gradient_run(const T* grad, const T* weights, int64_t size, const Scale<A>& scale, T* out) { \
        pass_run_back(grad, weights, size, scale, out);                                                                \
    }

template <typename T, typename A>
SPOS_SIMD_INLINE bool step_codes_of(const T* weights, int64_t size, const Quantizer& quantizer, A step, int8_t* out) {
    const A low = quantizer.low, high = quantizer.high;
    decltype(load_pack(weights)) bad{};
    with_quantizer(quantizer, [&](auto single, auto) __attribute__((always_inline)) {
        each_pack(size, [&](int64_t i, auto whole, int64_t lanes) __attribute__((always_inline)) {
            store_codes<A, whole>(out + i, code_of<single>(load_lanes<whole>(weights + i, lanes) / step, low, high),
                                  lanes, bad);
        });
    });
    const A sum = sum_of<A>(bad);
    return sum == sum;
}

template <typename T, typename A>
SPOS_SIMD_INLINE void pass_run_back(const T* grad, const T* weights, int64_t size, const Scale<A>& scale, T* out) {
    using Pack = decltype(load_pack(weights));
    auto walk = [&](auto small) __attribute__((always_inline)) {
        each_pack(size, [&](int64_t i, auto whole, int64_t lanes) __attribute__((always_inline)) {
            const Pack w = load_lanes<whole>(weights + i, lanes), g = load_lanes<whole>(grad + i, lanes);
            const Pack t = small ? small_tanh(w) : any_tanh(w), slope = (1 - t * t) / scale.maximum;
            const Pack share = Pack{} + scale.share, signed_share = w < 0 ? -share : share;
            const Pack taken = magnitude_of(w) == scale.greatest ? signed_share : Pack{};
            store_lanes<whole>(out + i, (g - taken) * slope, lanes);
        });
    };
    if (scale.small)
        walk(std::true_type{});
    else
        walk(std::false_type{});
}

SPOS_WEIGHTS(float, float)
SPOS_WEIGHTS(double, double)
SPOS_WEIGHTS(Half, float)
SPOS_WEIGHTS(BFloat16, float)
#undef SPOS_WEIGHTS

// Rows in pieces, and those in tasks, by the shape alone.
struct Pieces {
    int64_t rows, columns, per_row, per_task, count, tasks;

    explicit Pieces(const WeightShape& s)
        : rows(s.rows),
          columns(s.columns),
          per_row(divide_up(s.columns, kTaskElements)),
          per_task(std::max<int64_t>(1, kTaskElements / s.columns)),
          count(s.rows * per_row),
          tasks(divide_up(count, per_task)) {}

    // Calls body(piece, row, at, size) for all of them.
    template <typename Body>
    void each(const ParallelFor& parallel_for, Body body) const {
        parallel_for(tasks, [&](int64_t begin, int64_t end) {
            for (int64_t piece = begin * per_task; piece < std::min(count, end * per_task); ++piece) {
                const int64_t row = piece / per_row, first = piece % per_row * kTaskElements;
                body(piece, row, row * columns + first, std::min(kTaskElements, columns - first));
            }
        });
    }
};

template <typename T>
std::vector<Extent> extents_of(const void* grad, const void* weights, const WeightShape& shape, bool per_row,
                               const ParallelFor& parallel_for) {
    const Pieces pieces(per_row ? shape : WeightShape{1, shape.rows * shape.columns});
    std::vector<Extent> found(pieces.count);
    pieces.each(parallel_for, [&](int64_t piece, int64_t, int64_t at, int64_t size) {
        for (int64_t i = 0; i < size; i += kBlock)
            found[piece] =
                merged(found[piece], block_extent(grad ? static_cast<const T*>(grad) + at + i : nullptr,
                                                  static_cast<const T*>(weights) + at + i, std::min(kBlock, size - i)));
    });
    std::vector<Extent> result(pieces.rows);
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
        Extent& own = result[piece / pieces.per_row];
        own = merged(own, found[piece]);
    }
    for (Extent& extent : result)
        if (extent.magnitude != extent.magnitude) extent.greatest = extent.magnitude;
    return result;
}

template <typename T>
Scale<typename Compute<T>::type> scale_of(const Extent& extent, bool detach_max) {
    using A = typename Compute<T>::type;
    const A m = tanh_of(A(extent.greatest), static_cast<const T*>(nullptr));
    const bool constant = m < std::numeric_limits<A>::min(), none = constant || detach_max;
    Scale<A> scale{};
    scale.maximum = constant ? 1 : m;
    scale.greatest = none ? std::numeric_limits<A>::quiet_NaN() : A(extent.greatest);
    scale.share = none ? 0 : A(extent.products / m / extent.count);
    scale.small = extent.greatest < kSmallTanh;
    return scale;
}

template <typename T>
std::vector<Scale<typename Compute<T>::type>> scales_of(const std::vector<Extent>& extents, bool detach_max) {
    std::vector<Scale<typename Compute<T>::type>> scales;
    for (const Extent& extent : extents) scales.push_back(scale_of<T>(extent, detach_max));
    return scales;
}

template <typename T>
void levels(const void* weights, const WeightShape& shape, const std::vector<Extent>& extents, DType dtype,
            int64_t bits, void* out, const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const auto scales = scales_of<T>(extents, true);
    const bool per_row = extents.size() > 1;
    std::vector<A> units;
    const int64_t shared = per_row ? shape.columns : shape.rows * shape.columns;
    for (const Extent& extent : extents) units.push_back(A(dorefa_scale(dtype, extent, shared, bits)));
    Pieces(shape).each(parallel_for, [&](int64_t, int64_t row, int64_t at, int64_t size) {
        const int64_t own = per_row ? row : 0;
        level_run(static_cast<const T*>(weights) + at, size, scales[own], bits, units[own], static_cast<T*>(out) + at);
    });
}

template <typename T>
void backward(const void* grad, const void* weights, const WeightShape& shape, bool per_row, bool detach_max,
              void* grad_weights, const ParallelFor& parallel_for) {
    const auto extents = extents_of<T>(detach_max ? nullptr : grad, weights, shape, per_row, parallel_for);
    const auto scales = scales_of<T>(extents, detach_max);
    Pieces(shape).each(parallel_for, [&](int64_t, int64_t row, int64_t at, int64_t size) {
        gradient_run(static_cast<const T*>(grad) + at, static_cast<const T*>(weights) + at, size,
                     scales[per_row ? row : 0], static_cast<T*>(grad_weights) + at);
    });
}

// Runs code(row, at, size) on all pieces; it says whether all were numbers.
template <typename Code>
void codes_of(const WeightShape& shape, bool* numbers, const ParallelFor& parallel_for, Code code) {
    const Pieces pieces(shape);
    std::vector<char> good(pieces.count);
    pieces.each(parallel_for,
                [&](int64_t piece, int64_t row, int64_t at, int64_t size) { good[piece] = code(row, at, size); });
    for (int64_t row = 0; row < shape.rows; ++row)
        numbers[row] = std::all_of(&good[row * pieces.per_row], &good[row * pieces.per_row] + pieces.per_row,
                                   [](char value) { return value; });
}

// Calls run(T*) for the element type, as a null pointer.
template <typename Run>
auto with_type(DType dtype, Run run) {
    switch (dtype) {
        case DType::float64:
            return run(static_cast<double*>(nullptr));
        case DType::float16:
            return run(static_cast<Half*>(nullptr));
        case DType::bfloat16:
            return run(static_cast<BFloat16*>(nullptr));
        default:
            return run(static_cast<float*>(nullptr));
    }
}

}  // namespace

std::vector<Extent> weight_extents(DType dtype, const void* weights, const WeightShape& shape, bool per_row,
                                   const ParallelFor& parallel_for) {
    return with_type(dtype, [&](auto* type) {
        return extents_of<std::remove_pointer_t<decltype(type)>>(nullptr, weights, shape, per_row, parallel_for);
    });
}

double dorefa_scale(DType dtype, const Extent& extent, int64_t columns, int64_t bits) {
    if (bits == 1) return extent.magnitude / columns;
    const int64_t n = (int64_t(1) << bits) - 1;
    return dtype == DType::float64 ? 1.0 / n : 1.0f / n;
}

void dorefa(DType dtype, const void* weights, const WeightShape& shape, const std::vector<Extent>& extents,
            int64_t bits, void* out, const ParallelFor& parallel_for) {
    with_type(dtype, [&](auto* type) {
        levels<std::remove_pointer_t<decltype(type)>>(weights, shape, extents, dtype, bits, out, parallel_for);
    });
}

void dorefa_backward(DType dtype, const void* grad, const void* weights, const WeightShape& shape, bool per_row,
                     bool detach_max, void* grad_weights, const ParallelFor& parallel_for) {
    with_type(dtype, [&](auto* type) {
        backward<std::remove_pointer_t<decltype(type)>>(grad, weights, shape, per_row, detach_max, grad_weights,
                                                        parallel_for);
    });
}

void dorefa_codes(DType dtype, const void* weights, const WeightShape& shape, const std::vector<Extent>& extents,
                  int64_t bits, int8_t* codes, bool* numbers, const ParallelFor& parallel_for) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto scales = scales_of<T>(extents, true);
        codes_of(shape, numbers, parallel_for, [&](int64_t row, int64_t at, int64_t size) {
            return code_run(static_cast<const T*>(weights) + at, size, scales[extents.size() > 1 ? row : 0], bits,
                            codes + at);
        });
    });
}

void step_codes(DType dtype, const void* weights, const WeightShape& shape, const Quantizer& quantizer,
                const void* steps, bool per_row, int8_t* codes, bool* numbers, const ParallelFor& parallel_for) {
    with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = typename Compute<T>::type;
        codes_of(shape, numbers, parallel_for, [&](int64_t row, int64_t at, int64_t size) {
            return step_run(static_cast<const T*>(weights) + at, size, quantizer,
                            static_cast<const A*>(steps)[per_row ? row : 0], codes + at);
        });
    });
}

}  // namespace spos::cpu
