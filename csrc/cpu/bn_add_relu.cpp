#include "csrc/cpu/bn_add_relu.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "csrc/cpu/unit_passes.h"

namespace spos::cpu {
namespace {

constexpr int64_t kTaskElements = 65536;
constexpr int64_t kRowsOfSums = 64;  // that are added up in single precision

// Some rows of a group, and the values of its channels.
template <typename T, typename A>
struct Rows {
    int64_t rows, channels;
    const T *x, *residual;
    const A *scale, *shift, *residual_scale, *residual_shift;
};

template <bool kProjected, typename T, typename A>
SPOS_SIMD_INLINE void add_relu_rows(const Rows<T, A>& r, T* out) {
    using Pack = decltype(load_pack(r.x));
    for (int64_t row = 0; row < r.rows; ++row) {
        const int64_t at = row * r.channels;
        auto result = [&](const Pack& x, const Pack& residual, int64_t c, auto load) __attribute__((always_inline)) {
            Pack y = load(r.scale + c) * x + load(r.shift + c);
            if (kProjected)
                y += load(r.residual_scale + c) * residual + load(r.residual_shift + c);
            else
                y += residual;
            return y < 0 ? Pack{} : y;
        };
        int64_t c = 0;
        for (; c + kPack <= r.channels; c += kPack)
            store_pack(out + at + c, result(load_pack(r.x + at + c), load_pack(r.residual + at + c), c,
                                            [](const A* from) { return load_pack(from); }));
        const int64_t left = r.channels - c;
        if (left > 0)
            store_partial(out + at + c,
                          result(load_partial(r.x + at + c, left), load_partial(r.residual + at + c, left), c,
                                 [=](const A* from) { return load_partial(from, left); }),
                          left);
    }
}

// Where the gradients of a run of rows go; sums: [3, channels], of x * g, g and residual * g, added to.
template <typename T, typename A>
struct Gradients {
    const T *grad, *out;
    T *grad_x, *grad_residual;
    A* sums;
};

template <bool kProjected, typename T, typename A>
SPOS_SIMD_INLINE void gradient_rows(const Rows<T, A>& r, const Gradients<T, A>& g) {
    using Pack = decltype(load_pack(r.x));
    for (int64_t row = 0; row < r.rows; ++row) {
        const int64_t at = row * r.channels;
        auto through = [&](int64_t c, auto load, auto load_values, auto store) __attribute__((always_inline)) {
            const Pack grad = load(g.grad + at + c), out = load(g.out + at + c), x = load(r.x + at + c);
            const Pack passed = out <= 0 ? Pack{} : grad;
            store(g.grad_x + at + c, load_values(r.scale + c) * passed);
            store(g.sums + c, load_values(g.sums + c) + x * passed);
            store(g.sums + r.channels + c, load_values(g.sums + r.channels + c) + passed);
            if (kProjected) {
                store(g.grad_residual + at + c, load_values(r.residual_scale + c) * passed);
                A* const sums = g.sums + 2 * r.channels + c;
                store(sums, load_values(sums) + load(r.residual + at + c) * passed);
            } else {
                store(g.grad_residual + at + c, passed);
            }
        };
        int64_t c = 0;
        for (; c + kPack <= r.channels; c += kPack)
            through(
                c, [](const T* from) { return load_pack(from); }, [](const A* from) { return load_pack(from); },
                [](auto* to, const Pack& value) { store_pack(to, value); });
        const int64_t left = r.channels - c;
        if (left > 0)
            through(
                c, [=](const T* from) { return load_partial(from, left); },
                [=](const A* from) { return load_partial(from, left); },
                [=](auto* to, const Pack& value) { store_partial(to, value, left); });
    }
}

// Clones cannot be templates: named functions for each element type.
#define SPOS_ADD_RELU(T, A)                                                             \
    SPOS_SIMD_CLONES void run_rows(const Rows<T, A>& r, T* out) {                       \
        if (r.residual_scale)                                                           \
            add_relu_rows<true>(r, out);                                                \
        else                                                                            \
            add_relu_rows<false>(r, out);                                               \
    }                                                                                   \
    SPOS_SIMD_CLONES void run_gradient(const Rows<T, A>& r, const Gradients<T, A>& g) { \
        if (r.residual_scale)                                                           \
            gradient_rows<true>(r, g);                                                  \
        else                                                                            \
            gradient_rows<false>(r, g);                                                 \
    }
SPOS_ADD_RELU(float, float)
SPOS_ADD_RELU(double, double)
SPOS_ADD_RELU(Half, float)
SPOS_ADD_RELU(BFloat16, float)
#undef SPOS_ADD_RELU

// Runs of rows that never cross two groups.
struct Tasks {
    int64_t block, of_group, count;

    explicit Tasks(const AddReluShape& s)
        : block(std::min(s.rows, std::max<int64_t>(1, kTaskElements / s.channels))),
          of_group(divide_up(s.rows, block)),
          count(s.groups * of_group) {}
};

template <typename T>
struct Given {
    using A = typename Compute<T>::type;
    const AddReluShape& shape;
    const Tasks tasks;
    const T *x, *residual;
    const A *scale, *shift, *residual_scale, *residual_shift;

    // First element of a task, and its rows.
    std::pair<int64_t, Rows<T, A>> operator[](int64_t task) const {
        const int64_t group = task / tasks.of_group, first = task % tasks.of_group * tasks.block;
        const int64_t at = (group * shape.rows + first) * shape.channels, values = group * shape.channels;
        auto moved = [=](const A* start) { return start ? start + values : nullptr; };
        return {at,
                {std::min(tasks.block, shape.rows - first), shape.channels, x + at, residual + at, moved(scale),
                 moved(shift), moved(residual_scale), moved(residual_shift)}};
    }
};

template <typename T>
void forward(const Given<T>& given, T* out, const ParallelFor& parallel_for) {
    parallel_for(given.tasks.count, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const auto [at, rows] = given[task];
            run_rows(rows, out + at);
        }
    });
}

template <typename T>
void backward(const Given<T>& given, const T* grad, const T* out, T* grad_x, T* grad_residual,
              typename Compute<T>::type* const (&sums)[3], const ParallelFor& parallel_for) {
    using A = typename Compute<T>::type;
    const int64_t channels = given.shape.channels, values = 3 * channels;
    std::vector<double> partial(given.tasks.count * values);
    parallel_for(given.tasks.count, [&](int64_t begin, int64_t end) {
        Lines<A> few(values);
        for (int64_t task = begin; task < end; ++task) {
            auto [at, rows] = given[task];
            double* const total = partial.data() + task * values;
            const int64_t all = rows.rows;
            for (int64_t row = 0; row < all; row += kRowsOfSums) {
                std::fill(few.begin(), few.end(), A(0));
                rows.rows = std::min(kRowsOfSums, all - row);
                run_gradient(rows, Gradients<T, A>{grad + at, out + at, grad_x + at, grad_residual + at, few.data()});
                for (int64_t i = 0; i < values; ++i) total[i] += few[i];
                const int64_t step = rows.rows * channels;
                at += step, rows.x += step, rows.residual += step;
            }
        }
    });
    for (int64_t group = 0; group < given.shape.groups; ++group)
        for (int64_t which = 0; which < 3; ++which)
            for (int64_t c = 0; c < channels && sums[which]; ++c) {
                double sum = 0;
                for (int64_t task = group * given.tasks.of_group; task < (group + 1) * given.tasks.of_group; ++task)
                    sum += partial[task * values + which * channels + c];
                sums[which][group * channels + c] = static_cast<A>(sum);
            }
}

template <typename T>
Given<T> given_of(const AddReluShape& shape, const void* x, const void* scale, const void* shift, const void* residual,
                  const void* residual_scale, const void* residual_shift) {
    using A = typename Compute<T>::type;
    auto values = [](const void* start) { return static_cast<const A*>(start); };
    return {shape,         Tasks(shape),  static_cast<const T*>(x), static_cast<const T*>(residual),
            values(scale), values(shift), values(residual_scale),   values(residual_shift)};
}

template <typename Run>
void with_type(DType dtype, Run run) {
    switch (dtype) {
        case DType::float32:
            return run(float());
        case DType::float64:
            return run(double());
        case DType::float16:
            return run(Half());
        case DType::bfloat16:
            return run(BFloat16());
    }
}

}  // namespace

void bn_add_relu(DType dtype, const AddReluShape& shape, const void* x, const void* scale, const void* shift,
                 const void* residual, const void* residual_scale, const void* residual_shift, void* out,
                 const ParallelFor& parallel_for) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        forward(given_of<T>(shape, x, scale, shift, residual, residual_scale, residual_shift), static_cast<T*>(out),
                parallel_for);
    });
}

void bn_add_relu_backward(DType dtype, const AddReluShape& shape, const void* grad, const void* out, const void* x,
                          const void* scale, const void* residual, const void* residual_scale, void* grad_x,
                          void* grad_residual, void* grad_scale, void* grad_shift, void* grad_residual_scale,
                          const ParallelFor& parallel_for) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        using A = typename Compute<T>::type;
        A* const sums[3] = {static_cast<A*>(grad_scale), static_cast<A*>(grad_shift),
                            static_cast<A*>(grad_residual_scale)};
        backward(given_of<T>(shape, x, scale, nullptr, residual, residual_scale, nullptr), static_cast<const T*>(grad),
                 static_cast<const T*>(out), static_cast<T*>(grad_x), static_cast<T*>(grad_residual), sums,
                 parallel_for);
    });
}

}  // namespace spos::cpu
