// Small matrix products, the 1x1 convolutions: C = start + A B, one tile of C in registers at a time.
#pragma once

#include <cstdint>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {

// Packs (of kPack columns) in a panel of B: as many as a tile has. A machine's registers decide.
int64_t panel_packs();

// B in panels of panel_packs() packs, zeros behind the last column: what multiply() reads.
template <typename A>
struct Packed {
    Lines<A> values;
    int64_t depth = 0, columns = 0;

    void reserve(int64_t rows, int64_t width) {
        depth = rows, columns = width;
        values.resize(packs() * kPack * depth);
    }
    int64_t packs() const { return (columns + kPack - 1) / kPack; }
    int64_t panels() const { return (packs() + panel_packs() - 1) / panel_packs(); }
    // Packs in one panel; the last may be narrower, and so is its pitch.
    int64_t packs_of(int64_t panel) const {
        const int64_t left = packs() - panel * panel_packs();
        return left < panel_packs() ? left : panel_packs();
    }
    A* panel(int64_t index) { return values.data() + index * panel_packs() * kPack * depth; }
    const A* panel(int64_t index) const { return values.data() + index * panel_packs() * kPack * depth; }
};

// Rows [depth, columns] `pitch` apart.
template <typename A, typename T>
Packed<A> pack_rows(const T* rows, int64_t pitch, int64_t depth, int64_t columns) {
    Packed<A> packed;
    packed.reserve(depth, columns);
    A* to = packed.values.data();
    for (int64_t panel = 0; panel < packed.panels(); ++panel) {
        const int64_t width = packed.packs_of(panel) * kPack, first = panel * panel_packs() * kPack;
        const int64_t used = width < columns - first ? width : columns - first;
        for (int64_t k = 0; k < depth; ++k, to += width) {
            const T* row = rows + k * pitch + first;
            for (int64_t j = 0; j < used; ++j) to[j] = widen(row[j]);
            for (int64_t j = used; j < width; ++j) to[j] = 0;
        }
    }
    return packed;
}

// One panel of weights [columns, depth] `pitch` apart, times scale[k] unless that is null: square by square, so that
// neither side is walked one cache line a value.
template <typename A, typename T>
void pack_transposed(const T* weights, int64_t pitch, const A* scale, Packed<A>& packed, int64_t panel) {
    const int64_t depth = packed.depth, columns = packed.columns;
    const int64_t width = packed.packs_of(panel) * kPack, first = panel * panel_packs() * kPack;
    A* to = packed.panel(panel);
    for (int64_t top = 0; top < depth; top += kPack) {
        const int64_t rows = depth - top < kPack ? depth - top : kPack;
        for (int64_t j = 0; j < width; j += kPack) {
            A square[kPack][kPack] = {};
            for (int64_t c = 0; c < kPack && first + j + c < columns; ++c) {
                const T* row = weights + (first + j + c) * pitch + top;
                for (int64_t k = 0; k < rows; ++k)
                    square[k][c] = scale ? widen(row[k]) * scale[top + k] : widen(row[k]);
            }
            for (int64_t k = 0; k < rows; ++k) std::memcpy(to + (top + k) * width + j, square[k], sizeof square[k]);
        }
    }
}

// C[i][j] = start[i][j] + sum over k < depth of A[i][k] B[k][j], for i < rows and j < packs * kPack.
//   A[i][k] = a[i * row_step + k * depth_step]; B[k][j] = b[k * b_pitch + j]; C[i][j] = c[i * c_pitch + j];
//   start likewise with its pitch: 0 repeats one row, and C itself may be given.
// packs <= panel_packs(). The order of the sum is that of k, whatever the machine. Meanwhile memory from `ahead` on is
// asked for, ahead_step bytes (128 at most) a step of the sum, for whatever comes next; null: none. The columns'
// deviations (deviations.h) are added to, and begun with these rows if `fresh`; null: not wanted.
template <typename A>
struct Product {
    const A* a;
    int64_t row_step, depth_step;
    const A* b;
    int64_t b_pitch;
    int64_t rows, packs, depth;
    const A* start;
    int64_t start_pitch;
    A* c;
    int64_t c_pitch;
    const char* ahead = nullptr;
    int64_t ahead_step = 0;
    A* deviations = nullptr;
    bool fresh = false;
};

void multiply(const Product<float>& product);
void multiply(const Product<double>& product);

}  // namespace spos::cpu
