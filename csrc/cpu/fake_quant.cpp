// A strip is sixteen lanes wide and goes through memory in equal strides: along a run of values that share a step, or,
// where channels are neighbours, down the pixels of sixteen channels. The same code serves both.
#include "csrc/cpu/fake_quant.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/unit_kernels.h"
#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kTaskElements = 65536;
constexpr int64_t kExact = 64;  // packs whose sum is taken in the type of the computation, before it goes to double

struct Strip {
    int64_t count, stride;  // packs, and elements from one to the next
    int64_t lanes;          // of each pack that are values
};

template <typename T, typename A>
SPOS_SIMD_INLINE void quantize_strip(const T* from, const Strip& strip, const Quantizer& quantizer, const A* steps,
                                     const A* offsets, T* to) {
    const A low = quantizer.low, high = quantizer.high;
    const auto step = load_pack(steps), offset = load_pack(offsets);
    auto walk = [&](auto single, auto whole) __attribute__((always_inline)) {
        for (int64_t i = 0; i < strip.count; ++i) {
            const auto v = (load_lanes<whole>(from + i * strip.stride, strip.lanes) - offset) / step;
            store_lanes<whole>(to + i * strip.stride, code_of<single>(v, low, high) * step + offset, strip.lanes);
        }
    };
    with_quantizer(quantizer, [&](auto single, auto) __attribute__((always_inline)) {
        if (strip.lanes == kPack)
            walk(single, std::true_type{});
        else
            walk(single, std::false_type{});
    });
}

template <typename T, typename A>
SPOS_SIMD_INLINE void pass_strip_back(const T* grad, const T* x, const Strip& strip, const Quantizer& quantizer,
                                      const A* steps, const A* offsets, T* to, double* step_sums, double* offset_sums) {
    const Inside<A> bounds(quantizer);
    const auto step = load_pack(steps), offset = load_pack(offsets);
    using Pack = std::remove_const_t<decltype(step)>;
    DoublePack step_total = load_pack(step_sums), offset_total = load_pack(offset_sums);
    auto walk = [&](auto single, auto residual, auto whole) __attribute__((always_inline)) {
        for (int64_t first = 0; first < strip.count; first += kExact) {
            Pack step_sum{}, offset_sum{};
            for (int64_t i = first; i < std::min(first + kExact, strip.count); ++i) {
                const Pack g = load_lanes<whole>(grad + i * strip.stride, strip.lanes);
                const Pack v = (load_lanes<whole>(x + i * strip.stride, strip.lanes) - offset) / step;
                const auto passed = pass_back<single, residual>(g, v, bounds);
                store_lanes<whole>(to + i * strip.stride, passed.inside, strip.lanes);
                step_sum += passed.step;
                offset_sum += g - passed.inside;
            }
            step_total += in_double(step_sum), offset_total += in_double(offset_sum);
        }
    };
    with_quantizer(quantizer, [&](auto single, auto residual) __attribute__((always_inline)) {
        if (strip.lanes == kPack)
            walk(single, residual, std::true_type{});
        else
            walk(single, residual, std::false_type{});
    });
    store_pack(step_sums, step_total), store_pack(offset_sums, offset_total);
}

// Clones cannot be templates: named functions for each element type.
#define SPOS_STRIPS(T, A)                                                                                              \
    SPOS_SIMD_CLONES void forward_strip(const T* from, const Strip& strip, const Quantizer& quantizer, const A* steps, \
                                        const A* offsets, T* to) {                                                     \
        quantize_strip(from, strip, quantizer, steps, offsets, to);                                                    \
    }                                                                                                                  \
    SPOS_SIMD_CLONES void backward_strip(const T* grad, const T* x, const Strip& strip, const Quantizer& quantizer,    \
                                         const A* steps, const A* offsets, T* to, double* step_sums,                   \
                                         double* offset_sums) {                                                        \
        pass_strip_back(grad, x, strip, quantizer, steps, offsets, to, step_sums, offset_sums);                        \
    }
SPOS_STRIPS(float, float)
SPOS_STRIPS(double, double)
SPOS_STRIPS(Half, float)
SPOS_STRIPS(BFloat16, float)
#undef SPOS_STRIPS

// How a tensor becomes tasks, by its shape alone. Rows of `columns` elements; where runs are short, the rows are what
// lies side by side (outer times [channels * inner]), else the runs, in pieces.
struct Rows {
    bool side_by_side;
    int64_t rows, columns;
    int64_t pieces, piece;    // of a run, and elements of each but the last
    int64_t per_task, tasks;  // rows or pieces

    explicit Rows(const ChannelShape& s) : side_by_side(s.channels > 1 && s.inner < kPack) {
        rows = side_by_side ? s.outer : s.outer * s.channels;
        columns = side_by_side ? s.channels * s.inner : s.inner;
        pieces = side_by_side ? 1 : divide_up(columns, kTaskElements);
        piece = side_by_side ? columns : kTaskElements;
        per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(columns, 1));
        tasks = divide_up(rows * pieces, per_task);
    }
};

// Sixteen times the same, as strips along a run read it.
template <typename A>
struct Repeated {
    A values[kPack];
    explicit Repeated(A value) { std::fill_n(values, kPack, value); }
};

// Per-channel values for every column of rows that hold all channels, up to whole packs.
template <typename A>
Lines<A> per_column(const A* values, const ChannelShape& s, A behind) {
    Lines<A> columns(whole_packs(s.channels * s.inner), behind);
    for (int64_t c = 0; c < s.channels; ++c) std::fill_n(columns.begin() + c * s.inner, s.inner, values[c]);
    return columns;
}

// Calls strip(at, strip, first) for the strips of rows begin to end, `first` the first column of each.
template <typename Body>
void strips_of_rows(const Rows& rows, int64_t begin, int64_t end, Body body) {
    for (int64_t column = 0; column < rows.columns; column += kPack)
        body(begin * rows.columns + column, Strip{end - begin, rows.columns, std::min(kPack, rows.columns - column)},
             column);
}

// Calls body(at, strip) for the strips of a piece: its whole packs, and what is left.
template <typename Body>
void strips_of_piece(const Rows& rows, int64_t piece, Body body) {
    const int64_t first = piece % rows.pieces * rows.piece, at = piece / rows.pieces * rows.columns + first;
    const int64_t size = std::min(rows.piece, rows.columns - first), packs = size / kPack;
    if (packs) body(at, Strip{packs, kPack, kPack});
    if (size % kPack) body(at + packs * kPack, Strip{1, kPack, size % kPack});
}

template <typename T>
void forward(const void* x, const ChannelShape& s, const Quantizer& quantizer, const void* steps, const void* offsets,
             void* out, const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const T* from = static_cast<const T*>(x);
    const A *step = static_cast<const A*>(steps), *offset = static_cast<const A*>(offsets);
    T* to = static_cast<T*>(out);
    const Rows rows(s);
    if (rows.side_by_side) {
        const Lines<A> column_steps = per_column(step, s, A(1)), column_offsets = per_column(offset, s, A(0));
        return parallel_for(rows.tasks, [&](int64_t begin, int64_t end) {
            strips_of_rows(rows, begin * rows.per_task, std::min(rows.rows, end * rows.per_task),
                           [&](int64_t at, const Strip& strip, int64_t column) {
                               forward_strip(from + at, strip, quantizer, &column_steps[column],
                                             &column_offsets[column], to + at);
                           });
        });
    }
    parallel_for(rows.tasks, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(rows.rows * rows.pieces, end * rows.per_task);
        for (int64_t piece = begin * rows.per_task; piece < last; ++piece) {
            const int64_t c = piece / rows.pieces % s.channels;
            const Repeated<A> own_step(step[c]), own_offset(offset[c]);
            strips_of_piece(rows, piece, [&](int64_t at, const Strip& strip) {
                forward_strip(from + at, strip, quantizer, own_step.values, own_offset.values, to + at);
            });
        }
    });
}

template <typename T>
void backward(const void* grad, const void* x, const ChannelShape& s, const Quantizer& quantizer, const void* steps,
              const void* offsets, void* grad_x, double* step_sums, double* offset_sums,
              const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const T *g = static_cast<const T*>(grad), *from = static_cast<const T*>(x);
    const A *step = static_cast<const A*>(steps), *offset = static_cast<const A*>(offsets);
    T* to = static_cast<T*>(grad_x);
    const Rows rows(s);
    std::fill_n(step_sums, s.channels, 0.0), std::fill_n(offset_sums, s.channels, 0.0);
    if (rows.side_by_side) {
        const Lines<A> column_steps = per_column(step, s, A(1)), column_offsets = per_column(offset, s, A(0));
        const int64_t packed = column_steps.size();
        std::vector<double> sums(2 * rows.tasks * packed);
        parallel_for(rows.tasks, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task)
                strips_of_rows(rows, task * rows.per_task, std::min(rows.rows, (task + 1) * rows.per_task),
                               [&](int64_t at, const Strip& strip, int64_t column) {
                                   double* own = &sums[2 * task * packed + column];
                                   backward_strip(g + at, from + at, strip, quantizer, &column_steps[column],
                                                  &column_offsets[column], to + at, own, own + packed);
                               });
        });
        for (int64_t task = 0; task < rows.tasks; ++task)
            for (int64_t column = 0; column < rows.columns; ++column) {
                step_sums[column / s.inner] += sums[2 * task * packed + column];
                offset_sums[column / s.inner] += sums[(2 * task + 1) * packed + column];
            }
        return;
    }
    const int64_t pieces = rows.rows * rows.pieces;
    std::vector<double> sums(2 * pieces);
    parallel_for(rows.tasks, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin * rows.per_task; piece < std::min(pieces, end * rows.per_task); ++piece) {
            const int64_t c = piece / rows.pieces % s.channels;
            const Repeated<A> own_step(step[c]), own_offset(offset[c]);
            Repeated<double> step_lanes(0), offset_lanes(0);
            strips_of_piece(rows, piece, [&](int64_t at, const Strip& strip) {
                backward_strip(g + at, from + at, strip, quantizer, own_step.values, own_offset.values, to + at,
                               step_lanes.values, offset_lanes.values);
            });
            for (int64_t lane = 0; lane < kPack; ++lane) {
                sums[2 * piece] += step_lanes.values[lane];
                sums[2 * piece + 1] += offset_lanes.values[lane];
            }
        }
    });
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t c = piece / rows.pieces % s.channels;
        step_sums[c] += sums[2 * piece], offset_sums[c] += sums[2 * piece + 1];
    }
}

}  // namespace

void fake_quant(DType dtype, const void* x, const ChannelShape& shape, const Quantizer& quantizer, const void* steps,
                const void* offsets, void* out, const ParallelFor& parallel_for) {
    switch (dtype) {
        case DType::float32:
            return forward<float>(x, shape, quantizer, steps, offsets, out, parallel_for);
        case DType::float64:
            return forward<double>(x, shape, quantizer, steps, offsets, out, parallel_for);
        case DType::float16:
            return forward<Half>(x, shape, quantizer, steps, offsets, out, parallel_for);
        case DType::bfloat16:
            return forward<BFloat16>(x, shape, quantizer, steps, offsets, out, parallel_for);
    }
}

void fake_quant_backward(DType dtype, const void* grad, const void* x, const ChannelShape& shape,
                         const Quantizer& quantizer, const void* steps, const void* offsets, void* grad_x,
                         double* step_sums, double* offset_sums, const ParallelFor& parallel_for) {
    switch (dtype) {
        case DType::float32:
            return backward<float>(grad, x, shape, quantizer, steps, offsets, grad_x, step_sums, offset_sums,
                                   parallel_for);
        case DType::float64:
            return backward<double>(grad, x, shape, quantizer, steps, offsets, grad_x, step_sums, offset_sums,
                                    parallel_for);
        case DType::float16:
            return backward<Half>(grad, x, shape, quantizer, steps, offsets, grad_x, step_sums, offset_sums,
                                  parallel_for);
        case DType::bfloat16:
            return backward<BFloat16>(grad, x, shape, quantizer, steps, offsets, grad_x, step_sums, offset_sums,
                                      parallel_for);
    }
}

}  // namespace spos::cpu
