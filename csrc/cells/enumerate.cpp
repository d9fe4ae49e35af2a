#include "csrc/cells/enumerate.h"

#include "csrc/cells/hash.h"

namespace spos::cells {
namespace {

// No vertex but the last without successors, none but the first without predecessors. As edges lead upwards, this puts
// every vertex on a path from input to output.
bool whole(const Cell& cell) {
    uint32_t with_successors = 0;
    for (int y = 1; y < cell.vertices; ++y) {
        if (cell.predecessors(y) == 0) return false;
        with_successors |= cell.predecessors(y);
    }
    return with_successors == (1u << (cell.vertices - 1)) - 1;
}

// Operations of `inner` vertices in the order of itertools.product.
std::vector<uint16_t> labelings(int inner) {
    std::vector<uint16_t> all = {0};
    for (int v = 0; v < inner; ++v) {
        std::vector<uint16_t> longer;
        for (uint16_t ops : all)
            for (int op = 0; op < kOps; ++op) longer.push_back(static_cast<uint16_t>(ops | op << 2 * v));
        all.swap(longer);
    }
    return all;
}

}  // namespace

void for_each_graph(int most_vertices, const std::function<void(const Cell&)>& visit) {
    for (int n = 2; n <= most_vertices; ++n) {
        const std::vector<uint16_t> ops = labelings(n - 2);
        Cell cell;
        cell.vertices = static_cast<uint8_t>(n);
        for (uint32_t edges = 0; edges < 1u << Cell::column(n); ++edges) {
            cell.edges = edges;
            if (!whole(cell) || cell.edge_count() > kCellEdges) continue;
            for (uint16_t labels : ops) {
                cell.ops = labels;
                visit(cell);
            }
        }
    }
}

Enumeration enumerate_cells(int most_vertices) {
    constexpr uint32_t kSlots = 1 << 20;  // more than twice the cells
    constexpr size_t kPiece = 4096;
    Enumeration all;
    std::vector<uint32_t> slots(kSlots);  // 1 + index, by hash
    std::vector<Cell> piece;
    std::vector<Digest> hashes(kPiece);
    const auto keep_new = [&] {
        hash_cells(piece.data(), piece.size(), hashes.data());
        for (size_t i = 0; i < piece.size(); ++i) {
            uint32_t slot = static_cast<uint32_t>(first_half(hashes[i])) % kSlots;
            while (slots[slot] != 0 && all.hashes[slots[slot] - 1] != hashes[i]) slot = (slot + 1) % kSlots;
            if (slots[slot] != 0) continue;
            all.cells.push_back(piece[i]);
            all.hashes.push_back(hashes[i]);
            slots[slot] = static_cast<uint32_t>(all.cells.size());
        }
        piece.clear();
    };
    for_each_graph(most_vertices, [&](const Cell& cell) {
        piece.push_back(cell);
        if (piece.size() == kPiece) keep_new();
    });
    keep_new();
    return all;
}

}  // namespace spos::cells
