#include "csrc/cells/graph.h"

#include <stdexcept>
#include <string>

namespace spos::cells {

Graph make_graph(const uint8_t* matrix, const std::vector<int>& labels) {
    const int n = static_cast<int>(labels.size());
    if (n < 1 || n > kMaxVertices)
        throw std::invalid_argument("a cell has 1 to " + std::to_string(kMaxVertices) + " vertices, got " +
                                    std::to_string(n));
    Graph graph{std::vector<uint64_t>(n), std::vector<uint64_t>(n), labels};
    for (int v = 0; v < n; ++v)
        for (int w = 0; w < n; ++w) {
            if (matrix[v * n + w] == 0) continue;
            if (w <= v)
                throw std::invalid_argument("matrix must be upper triangular, got an edge from vertex " +
                                            std::to_string(v) + " to vertex " + std::to_string(w));
            graph.successors[v] |= uint64_t{1} << w;
            graph.predecessors[w] |= uint64_t{1} << v;
        }
    return graph;
}

std::optional<Graph> prune(const Graph& graph) {
    const int n = graph.vertices();
    if (n < 2) return std::nullopt;
    // Edges only lead to higher vertices, so one sweep in each direction finds everything that can be reached.
    uint64_t from_input = 1, to_output = uint64_t{1} << (n - 1);
    for (int v = 0; v < n; ++v)
        if (from_input >> v & 1) from_input |= graph.successors[v];
    for (int v = n - 1; v >= 0; --v)
        if (to_output >> v & 1) to_output |= graph.predecessors[v];
    const uint64_t kept = from_input & to_output;
    if (!(kept & 1)) return std::nullopt;  // then nothing lies on a path: every path starts at the input

    std::vector<int> old_vertices;
    for (int v = 0; v < n; ++v)
        if (kept >> v & 1) old_vertices.push_back(v);
    const int m = static_cast<int>(old_vertices.size());
    Graph pruned{std::vector<uint64_t>(m), std::vector<uint64_t>(m), std::vector<int>(m)};
    for (int v = 0; v < m; ++v) {
        pruned.labels[v] = graph.labels[old_vertices[v]];
        for (int w = v + 1; w < m; ++w) {
            if (!(graph.successors[old_vertices[v]] >> old_vertices[w] & 1)) continue;
            pruned.successors[v] |= uint64_t{1} << w;
            pruned.predecessors[w] |= uint64_t{1} << v;
        }
    }
    return pruned;
}

}  // namespace spos::cells
