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

}  // namespace spos::cells
