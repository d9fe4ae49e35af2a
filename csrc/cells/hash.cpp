#include "csrc/cells/hash.h"

#include <algorithm>
#include <bitset>

#include "csrc/cells/md5.h"

namespace spos::cells {
namespace {

int edges(uint64_t neighbours) {
    return static_cast<int>(std::bitset<64>(neighbours).count());
}

void append_sorted(const std::vector<std::string>& hashes, uint64_t neighbours, std::string& text) {
    std::vector<const std::string*> chosen;
    for (size_t v = 0; v < hashes.size(); ++v)
        if (neighbours >> v & 1) chosen.push_back(&hashes[v]);
    std::sort(chosen.begin(), chosen.end(), [](const auto* a, const auto* b) { return *a < *b; });
    for (const std::string* hash : chosen) text += *hash;
}

}  // namespace

std::string hash_graph(const Graph& graph) {
    const int n = graph.vertices();
    // A vertex starts as the text of a Python tuple: (out-degree, in-degree, label).
    std::vector<std::string> hashes(n);
    for (int v = 0; v < n; ++v)
        hashes[v] =
            md5_hex("(" + std::to_string(edges(graph.successors[v])) + ", " +
                    std::to_string(edges(graph.predecessors[v])) + ", " + std::to_string(graph.labels[v]) + ")");

    // As many rounds as vertices, all vertices at once: predecessors | successors | itself.
    std::vector<std::string> next(n);
    std::string text;
    for (int round = 0; round < n; ++round) {
        for (int v = 0; v < n; ++v) {
            text.clear();
            append_sorted(hashes, graph.predecessors[v], text);
            text += '|';
            append_sorted(hashes, graph.successors[v], text);
            text += '|';
            text += hashes[v];
            next[v] = md5_hex(text);
        }
        hashes.swap(next);
    }

    // The text of a Python list of strings.
    std::sort(hashes.begin(), hashes.end());
    text = "[";
    for (int v = 0; v < n; ++v) text += (v == 0 ? "'" : ", '") + hashes[v] + "'";
    return md5_hex(text + "]");
}

void hash_cells(const Cell* cells, size_t count, Digest* hashes) {
    for (size_t i = 0; i < count; ++i) {
        const Cell& cell = cells[i];
        const int n = cell.vertices;
        Graph graph{std::vector<uint64_t>(n), std::vector<uint64_t>(n), std::vector<int>(n)};
        for (int v = 0; v < n; ++v) {
            graph.labels[v] = v == 0 ? kInput : v == n - 1 ? kOutput : cell.op(v);
            for (int w = v + 1; w < n; ++w)
                if (cell.edge(v, w)) graph.successors[v] |= uint64_t{1} << w, graph.predecessors[w] |= uint64_t{1} << v;
        }
        hashes[i] = *from_hex(hash_graph(graph));
    }
}

}  // namespace spos::cells
