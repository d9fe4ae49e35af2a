// The graph hash that names the cells of NAS-Bench-101.
#pragma once

#include <string>
#include <vector>

#include "csrc/cells/cell.h"
#include "csrc/cells/digest.h"
#include "csrc/cells/graph.h"
#include "csrc/cells/hash_lanes.h"

namespace spos::cells {

// The hash of `graph` as it is, unpruned: equal for isomorphic labelled graphs. Digit for digit that of
// graph_util.hash_module in the official code (google-research/nasbench).
std::string hash_graph(const Graph& graph);

// The ways to hash many cells that this machine can run, the best first.
struct HashEngine {
    const char* name;
    HashBatch run;
};
std::vector<HashEngine> hash_engines();

// The same for `count` pruned cells of at least two vertices; by the best engine unless one is given.
void hash_cells(const Cell* cells, size_t count, Digest* hashes, const HashEngine* engine = nullptr);

}  // namespace spos::cells
