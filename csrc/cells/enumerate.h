// Every cell of the benchmark.
#pragma once

#include <functional>
#include <vector>

#include "csrc/cells/cell.h"
#include "csrc/cells/digest.h"

namespace spos::cells {

struct Enumeration {
    std::vector<Cell> cells;  // of each hash the graph that came first
    std::vector<Digest> hashes;
};

// Calls visit(cell) for every labelled graph of 2 to `most_vertices` vertices that is whole (nothing to prune) and has
// at most kCellEdges edges, in the official order (generate_graphs.py of google-research/nasbench): by vertices, then
// edges as a number, then operations with the first vertex slowest.
void for_each_graph(int most_vertices, const std::function<void(const Cell&)>& visit);

// One graph a hash, in the order of for_each_graph: 423,624 cells for 7 vertices.
Enumeration enumerate_cells(int most_vertices = kCellVertices);

}  // namespace spos::cells
