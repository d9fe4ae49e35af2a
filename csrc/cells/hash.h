// The graph hash that names the cells of NAS-Bench-101.
#pragma once

#include <string>

#include "csrc/cells/graph.h"

namespace spos::cells {

// The hash of `graph` as it is, unpruned: equal for isomorphic labelled graphs. Digit for digit that of
// graph_util.hash_module in the official code (google-research/nasbench).
std::string hash_graph(const Graph& graph);

}  // namespace spos::cells
