#include "csrc/cells/hash.h"

#include <algorithm>
#include <bitset>
#include <cstring>

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

// A vertex starts as the text of a Python tuple.
std::string first_hash(int out_degree, int in_degree, int label) {
    return md5_hex("(" + std::to_string(out_degree) + ", " + std::to_string(in_degree) + ", " + std::to_string(label) +
                   ")");
}

}  // namespace

std::string hash_graph(const Graph& graph) {
    const int n = graph.vertices();
    std::vector<std::string> hashes(n);
    for (int v = 0; v < n; ++v)
        hashes[v] = first_hash(edges(graph.successors[v]), edges(graph.predecessors[v]), graph.labels[v]);

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

namespace {

InitialHashes initial_hashes() {
    InitialHashes initial;
    for (int out = 0; out < kCellVertices; ++out)
        for (int in = 0; in < kCellVertices; ++in)
            for (int label = -2; label <= 2; ++label) {
                const std::string hex = first_hash(out, in, label);
                VertexHash& hash = initial.of[out][in][label + 2];
                std::memcpy(hash.hex, hex.data(), hex.size());
                hash.high = std::stoull(hex.substr(0, 16), nullptr, 16);
                hash.low = std::stoull(hex.substr(16), nullptr, 16);
            }
    return initial;
}

Graph graph_of(const Cell& cell) {
    const int n = cell.vertices;
    Graph graph{std::vector<uint64_t>(n), std::vector<uint64_t>(n), std::vector<int>(n)};
    for (int y = 0; y < n; ++y) {
        graph.labels[y] = y == 0 ? kInput : y == n - 1 ? kOutput : cell.op(y);
        if (y > 0) graph.predecessors[y] = cell.predecessors(y);
        for (int x = 0; x < y; ++x)
            if (cell.edge(x, y)) graph.successors[x] |= uint64_t{1} << y;
    }
    return graph;
}

}  // namespace

std::vector<HashEngine> hash_engines() {
    std::vector<HashEngine> engines;
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        engines.push_back({"avx512", hash_batch_avx512});
    if (avx2) engines.push_back({"avx2", hash_batch_avx2});
#endif
    engines.push_back({"baseline", hash_batch_baseline});
    return engines;
}

void hash_cells(const Cell* cells, size_t count, Digest* hashes, const HashEngine* engine) {
    constexpr size_t kFew = 4;  // not worth the memory of an engine
    if (!engine && count <= kFew) {
        for (size_t i = 0; i < count; ++i) hashes[i] = *from_hex(hash_graph(graph_of(cells[i])));
        return;
    }
    static const HashEngine best = hash_engines().front();
    static const InitialHashes initial = initial_hashes();
    (engine ? engine : &best)->run(cells, count, initial, hashes);
}

}  // namespace spos::cells
