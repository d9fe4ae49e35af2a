// The whole space: known counts, and a second proof that equal hashes mean isomorphic cells.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "csrc/cells/enumerate.h"
#include "csrc/cells/hash.h"

using namespace spos::cells;

namespace {

// The smallest description of a cell over all permutations of its inner vertices that leave the operations sorted: the
// same for isomorphic cells and for no others. It knows nothing of hashes.
class CanonicalForm {
  public:
    uint64_t of(const Cell& cell) {
        cell_ = cell;
        inner_ = cell.vertices - 2;
        for (int v = 0; v < inner_; ++v) ops_[v] = cell.op(v + 1);
        std::sort(ops_, ops_ + inner_);
        place_of_[0] = 0;
        place_of_[inner_ + 1] = inner_ + 1;
        smallest_ = ~uint64_t{0};
        place(0, 0);
        uint64_t form = smallest_ << 3 | cell.vertices;  // 36 entries can be ones: row 0 to 5, column 1 to 6
        for (int v = 0; v < kCellVertices - 2; ++v) form = form * 3 + static_cast<uint64_t>(v < inner_ ? ops_[v] : 0);
        return form;
    }

  private:
    void place(int at, uint32_t used) {
        if (at == inner_) {
            uint64_t matrix = 0;
            for (int y = 1; y < cell_.vertices; ++y)
                for (uint32_t before = cell_.predecessors(y); before; before &= before - 1)
                    matrix |= uint64_t{1} << (place_of_[__builtin_ctz(before)] * 6 + place_of_[y] - 1);
            smallest_ = std::min(smallest_, matrix);
            return;
        }
        for (int v = 1; v <= inner_; ++v)
            if (!(used >> v & 1) && cell_.op(v) == ops_[at]) {
                place_of_[v] = at + 1;
                place(at + 1, used | 1u << v);
            }
    }

    Cell cell_;
    int inner_ = 0, ops_[kCellVertices] = {}, place_of_[kCellVertices] = {};
    uint64_t smallest_ = 0;
};

}  // namespace

// Published counts (and measured with the official code): all labelled graphs, and classes by vertices and edges.
TEST(counts_of_the_space) {
    size_t labelled = 0;
    for_each_graph(kCellVertices, [&](const Cell&) { ++labelled; });
    CHECK(labelled == 1293208);
    const Enumeration all = enumerate_cells();
    CHECK(all.cells.size() == 423624);
    size_t by_vertices[8] = {}, by_edges_of_seven[10] = {};
    for (const Cell& cell : all.cells) {
        ++by_vertices[cell.vertices];
        if (cell.vertices == 7) ++by_edges_of_seven[cell.edge_count()];
    }
    const size_t wanted[8] = {0, 0, 1, 6, 84, 2441, 62010, 359082};
    CHECK(std::equal(wanted, wanted + 8, by_vertices));
    CHECK(by_edges_of_seven[6] == 243 && by_edges_of_seven[7] == 6264 && by_edges_of_seven[8] == 58563 &&
          by_edges_of_seven[9] == 294012);
    Digest first = all.hashes[0], last = all.hashes[0];
    for (const Digest& hash : all.hashes) first = std::min(first, hash), last = std::max(last, hash);
    CHECK(to_hex(first) == "00005c142e6f48ac74fdcf73e3439874");
    CHECK(to_hex(last) == "ffff76fafa7b0cdf545fd7feee9c8bf9");
}

// Over all 1,293,208 labelled graphs, hashes and canonical forms make the same classes: as many pairs as either.
TEST(equal_hashes_are_isomorphic_cells) {
    struct Pair {
        uint64_t form;
        Digest hash;
    };
    std::vector<Pair> pairs;
    std::vector<Cell> cells;
    CanonicalForm canonical;
    for_each_graph(kCellVertices, [&](const Cell& cell) {
        cells.push_back(cell);
        pairs.push_back({canonical.of(cell), {}});
    });
    std::vector<Digest> hashes(cells.size());
    hash_cells(cells.data(), cells.size(), hashes.data());
    for (size_t i = 0; i < pairs.size(); ++i) pairs[i].hash = hashes[i];
    std::sort(pairs.begin(), pairs.end(),
              [](const Pair& a, const Pair& b) { return a.form != b.form ? a.form < b.form : a.hash < b.hash; });
    size_t forms = 0, different = 0;
    for (size_t i = 0; i < pairs.size(); ++i) {
        const bool new_form = i == 0 || pairs[i].form != pairs[i - 1].form;
        forms += new_form;
        different += new_form || pairs[i].hash != pairs[i - 1].hash;
    }
    std::sort(hashes.begin(), hashes.end());
    const auto names = static_cast<size_t>(std::unique(hashes.begin(), hashes.end()) - hashes.begin());
    CHECK(forms == 423624);
    CHECK(names == 423624);
    CHECK(different == 423624);
}

RUN_TESTS()
