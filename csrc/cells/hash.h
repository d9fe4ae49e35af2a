// The graph hash that names the cells of NAS-Bench-101.
#pragma once

#include <string>

#include "csrc/cells/cell.h"
#include "csrc/cells/digest.h"
#include "csrc/cells/graph.h"

namespace spos::cells {

// The hash of `graph` as it is, unpruned: equal for isomorphic labelled graphs. Digit for digit that of
// graph_util.hash_module in the official code (google-research/nasbench).
std::string hash_graph(const Graph& graph);

// The same for pruned cells, many at once.
void hash_cells(const Cell* cells, size_t count, Digest* hashes);

}  // namespace spos::cells
