// A NAS-Bench-101 cell: a directed acyclic graph whose first vertex is the input and whose last is the output.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace spos::cells {

constexpr int kMaxVertices = 64;  // a row of the matrix is one machine word; the benchmark itself stops at 7

constexpr int kInput = -1;  // labels; operations are 0 (conv3x3), 1 (conv1x1), 2 (maxpool3x3)
constexpr int kOutput = -2;

struct Graph {
    std::vector<uint64_t> successors;    // bit w of successors[v]: an edge v -> w, w > v
    std::vector<uint64_t> predecessors;  // the same edges from the other end
    std::vector<int> labels;

    int vertices() const { return static_cast<int>(labels.size()); }
};

// matrix: row-major, labels.size() squared, nonzero for an edge. Throws std::invalid_argument unless it is strictly
// upper triangular and has 1 to kMaxVertices vertices.
Graph make_graph(const uint8_t* matrix, const std::vector<int>& labels);

// The graph without the vertices that lie on no path from input to output; nothing where there is no such path.
// (Ying et al., "NAS-Bench-101", 2019; ModelSpec._prune of the official code.)
std::optional<Graph> prune(const Graph& graph);

}  // namespace spos::cells
