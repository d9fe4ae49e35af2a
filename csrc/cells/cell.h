// A cell of at most 7 vertices in two machine words: what the batch code, the enumeration and the table work on.
#pragma once

#include <cstdint>

namespace spos::cells {

constexpr int kCellVertices = 7;  // limits of the benchmark
constexpr int kCellEdges = 9;
constexpr int kOps = 3;       // conv3x3, conv1x1, maxpool3x3
constexpr int kKeyBits = 31;  // of Cell::key()

struct Cell {
    uint32_t edges =
        0;             // bit x + y(y-1)/2: an edge x -> y, x < y; column by column, as the official enumeration counts
    uint16_t ops = 0;  // two bits an inner vertex, vertex 1 lowest
    uint8_t vertices = 0;  // 0: no cell at all

    static constexpr int column(int y) { return y * (y - 1) / 2; }
    uint32_t predecessors(int y) const { return edges >> column(y) & ((1u << y) - 1); }
    bool edge(int x, int y) const { return x < y && edges >> (x + column(y)) & 1; }
    int op(int v) const { return ops >> 2 * (v - 1) & 3; }
    int edge_count() const { return __builtin_popcount(edges); }

    // Unlike for unlike cells as long as they are pruned: the last column is not empty, so the edges tell the vertices.
    uint32_t key() const { return edges | static_cast<uint32_t>(ops) << 21; }
    static Cell from_key(uint32_t key);

    friend bool operator==(const Cell& a, const Cell& b) {
        return a.edges == b.edges && a.ops == b.ops && a.vertices == b.vertices;
    }
};

// Only the vertices on a path from input to output (ModelSpec._prune of the official code); vertices = 0 without a
// path.
Cell prune(const Cell& cell);

// Why a cell could not be read.
enum class CellProblem { none, vertices, not_binary, not_upper_triangular, first_op, last_op, inner_op };

// From adjacency [7, 7] and ops [7] of a batch: row-major zeros and ones; -1 input, 0, 1, 2, -2 output. A smaller cell
// lies in the first rows and columns; vertices = 0 takes their number from where the output stands. Unpruned.
CellProblem read_cell(const uint8_t* adjacency, const int8_t* ops, int vertices, Cell& cell);
const char* describe(CellProblem problem);

// The reverse; what lies beyond the cell's vertices becomes 0 in both.
void write_cell(const Cell& cell, uint8_t* adjacency, int8_t* ops);

// Trainable parameters of the CIFAR-10 network of a pruned cell, in closed form. Where the channels of the output do
// not divide evenly, the first vertices get one more: the number depends on the order of the vertices, as in the
// benchmark.
int32_t trainable_parameters(const Cell& cell);

// Calls visit(cell) for all cells that differ from a pruned `cell` only in the order of inner vertices, edges still
// leading upwards; `cell` itself is among them, and symmetric cells come more than once.
template <typename Visit>
void for_each_order(const Cell& cell, const Visit& visit);

namespace detail {
template <typename Visit>
void place_next(const Cell& cell, uint8_t* place_of, int placed, uint32_t done, Cell ordered, const Visit& visit) {
    const int n = cell.vertices;
    for (int v = 1; v < n - 1; ++v) {
        const uint32_t before = cell.predecessors(v);
        if (done >> v & 1 || before & ~done) continue;
        Cell next = ordered;
        for (int w = 0; w < v; ++w)
            if (before >> w & 1) next.edges |= 1u << (place_of[w] + Cell::column(placed));
        next.ops = static_cast<uint16_t>(next.ops | cell.op(v) << 2 * (placed - 1));
        place_of[v] = static_cast<uint8_t>(placed);
        place_next(cell, place_of, placed + 1, done | 1u << v, next, visit);
    }
    if (placed < n - 1) return;
    for (int w = 0; w < n - 1; ++w)
        if (cell.edge(w, n - 1)) ordered.edges |= 1u << (place_of[w] + Cell::column(n - 1));
    visit(ordered);
}
}  // namespace detail

template <typename Visit>
void for_each_order(const Cell& cell, const Visit& visit) {
    uint8_t place_of[kCellVertices] = {};
    Cell ordered;
    ordered.vertices = cell.vertices;
    detail::place_next(cell, place_of, 1, 1, ordered, visit);
}

}  // namespace spos::cells
