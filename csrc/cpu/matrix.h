// Small matrix products, the 1x1 convolutions: C = start + A B, one tile of C in registers at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/memory.h"
#include "csrc/cpu/simd.h"

namespace spos::cpu {

// Packs (of kPack columns) in a panel of B: as many as a tile has. A machine's registers decide.
int64_t panel_packs();

// How the packs of B's columns are divided: into panels of panel_packs(), of which the last one takes in what is left
// over, for a tile of a single pack would wait for its loads.
inline int64_t panels_of(int64_t packs) {
    return std::max<int64_t>(1, packs / panel_packs());
}
inline int64_t packs_of_panel(int64_t panel, int64_t packs) {
    return panel + 1 < panels_of(packs) ? panel_packs() : packs - panel * panel_packs();
}
inline int64_t most_panel_packs() {
    return 2 * panel_packs() - 1;
}

// B in panels, zeros behind the last column: what multiply() reads.
template <typename A>
struct Packed {
    Lines<A> values;
    int64_t depth = 0, columns = 0;

    void reserve(int64_t rows, int64_t width) {
        depth = rows, columns = width;
        values.resize(packs() * kPack * depth);
    }
    int64_t packs() const { return (columns + kPack - 1) / kPack; }
    int64_t panels() const { return panels_of(packs()); }
    int64_t packs_of(int64_t panel) const { return packs_of_panel(panel, packs()); }
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

// C[i][j] = start[i][j] + sum over k < depth of A[i][k] B[k][j], for i < rows and j < packs * kPack.
//   A[i][k] = a[i * row_step + k * depth_step]; B[k][j] = b[k * b_pitch + j]; C[i][j] = c[i * c_pitch + j];
//   start likewise with its pitch: 0 repeats one row, and C itself may be given.
// packs <= most_panel_packs(). The order of the sum is that of k, whatever the machine. Meanwhile memory from `ahead`
// on is asked for, ahead_step bytes (128 at most) a step of the sum, for whatever comes next; null: none. The columns'
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
