// Cells in machine words: pruning, hashing many at once, parameters, orders of vertices.
#include <algorithm>
#include <random>
#include <set>
#include <string>

#include "check.h"
#include "csrc/cells/cell.h"
#include "csrc/cells/crc32c.h"
#include "csrc/cells/enumerate.h"
#include "csrc/cells/hash.h"

using namespace spos::cells;

namespace {

Graph graph_of(const Cell& cell) {
    std::vector<uint8_t> matrix;
    std::vector<int> labels;
    for (int x = 0; x < cell.vertices; ++x) {
        labels.push_back(x == 0 ? kInput : x == cell.vertices - 1 ? kOutput : cell.op(x));
        for (int y = 0; y < cell.vertices; ++y) matrix.push_back(cell.edge(x, y));
    }
    return make_graph(matrix.data(), labels);
}

std::vector<Cell> random_cells(size_t count) {
    std::mt19937 random(7);
    std::vector<Cell> cells(count);
    for (Cell& cell : cells) {
        const int n = 1 + static_cast<int>(random() % kCellVertices);
        cell.vertices = static_cast<uint8_t>(n);
        cell.edges = random() & (random() | random()) & ((1u << Cell::column(n)) - 1);
        for (int v = 1; v < n - 1; ++v) cell.ops = static_cast<uint16_t>(cell.ops | random() % kOps << 2 * (v - 1));
    }
    return cells;
}

}  // namespace

// Cells of all sizes, up to 21 edges, pruned and hashed in two ways that share only scalar MD5.
TEST(every_engine_hashes_as_one_graph_does) {
    std::vector<Cell> pruned;
    std::vector<Digest> wanted;
    for (const Cell& cell : random_cells(3000)) {
        const auto graph = prune(graph_of(cell));
        const Cell small = prune(cell);
        CHECK(graph.has_value() == (small.vertices != 0));
        if (!graph) continue;
        CHECK(Cell::from_key(small.key()) == small);
        pruned.push_back(small);
        wanted.push_back(*from_hex(hash_graph(*graph)));
    }
    CHECK(pruned.size() > 1000);
    for (const HashEngine& engine : hash_engines())
        for (size_t count : {size_t{0}, size_t{1}, size_t{65}, pruned.size()}) {
            std::vector<Digest> hashes(count);
            hash_cells(pruned.data(), count, hashes.data(), &engine);
            CHECK(std::equal(hashes.begin(), hashes.end(), wanted.begin()));
        }
    CHECK(std::string(hash_engines().back().name) == "baseline");
}

TEST(matrices_are_read_as_they_were_written) {
    for (const Cell& cell : random_cells(2000)) {
        if (cell.vertices == 1) continue;
        uint8_t adjacency[49];
        int8_t ops[7];
        write_cell(cell, adjacency, ops);
        Cell read;
        CHECK(read_cell(adjacency, ops, cell.vertices, read) == CellProblem::none && read == cell);
        CHECK(read_cell(adjacency, ops, 0, read) == CellProblem::none && read == cell);
    }
}

TEST(wrong_matrices_are_named) {
    Cell cell, read;
    cell.vertices = 4;
    cell.edges = 0x3f;
    uint8_t adjacency[49];
    int8_t ops[7];
    const auto problem_after = [&](auto change, int vertices = 4) {
        write_cell(cell, adjacency, ops);
        change();
        return read_cell(adjacency, ops, vertices, read);
    };
    CHECK(problem_after([] {}) == CellProblem::none);
    CHECK(problem_after([] {}, 8) == CellProblem::vertices && problem_after([] {}, -1) == CellProblem::vertices);
    for (int entry = 0; entry < 49; ++entry) {
        const int x = entry / 7, y = entry % 7;
        CHECK(problem_after([&] { adjacency[entry] = 2; }) == CellProblem::not_binary);
        CHECK(problem_after([&] { adjacency[entry] = 255; }) == CellProblem::not_binary);
        const auto inside = x < y && y < 4 ? CellProblem::none : CellProblem::not_upper_triangular;
        CHECK(problem_after([&] { adjacency[entry] = 1; }) == inside);
    }
    CHECK(problem_after([&] { ops[0] = 0; }) == CellProblem::first_op);
    CHECK(problem_after([&] { ops[3] = 1; }) == CellProblem::last_op);
    CHECK(problem_after([&] { ops[3] = 1; }, 0) == CellProblem::last_op);
    for (int op = -128; op < 128; ++op) {
        const bool good = op >= 0 && op < kOps;
        CHECK(problem_after([&] { ops[1] = static_cast<int8_t>(op); }) ==
              (good ? CellProblem::none : CellProblem::inner_op));
        CHECK(problem_after([&] { ops[6] = static_cast<int8_t>(op); }) == CellProblem::none);  // not read
    }
}

// Named cells of the benchmark: the smallest, the Inception-like and the ResNet-like one.
TEST(parameters_of_named_cells) {
    const auto cell = [](std::initializer_list<std::pair<int, int>> edges, std::initializer_list<int> ops) {
        Cell made;
        made.vertices = static_cast<uint8_t>(ops.size() + 2);
        for (const auto& [x, y] : edges) made.edges |= 1u << (x + Cell::column(y));
        int at = 0;
        for (int op : ops) made.ops = static_cast<uint16_t>(made.ops | op << 2 * at++);
        return made;
    };
    CHECK(trainable_parameters(cell({{0, 1}}, {})) == 882570);
    CHECK(trainable_parameters(cell({{0, 1}, {0, 2}, {0, 3}, {0, 5}, {1, 6}, {2, 6}, {3, 4}, {4, 6}, {5, 6}},
                                    {1, 0, 0, 0, 2})) == 2694282);
}

// Every order of the vertices of a cell is one of the same hash, and all of them are found.
TEST(orders_of_vertices_keep_the_hash) {
    const Enumeration all = enumerate_cells(5);
    CHECK(all.cells.size() == 2532);
    std::set<uint32_t> keys;
    for (size_t i = 0; i < all.cells.size(); ++i)
        for_each_order(all.cells[i], [&](const Cell& cell) {
            Digest hash;
            hash_cells(&cell, 1, &hash);
            CHECK(hash == all.hashes[i]);
            keys.insert(cell.key());
        });
    CHECK(keys.size() == 1 + 6 + 90 + 3267);  // the labelled graphs of 2 to 5 vertices
}

// RFC 3720, appendix B.4; and both ways agree at every length and alignment.
TEST(crc32c_in_hardware_and_without) {
    const std::string zeros(32, '\0');
    CHECK(crc32c(zeros.data(), zeros.size()) == 0x8a9136aau);
    CHECK(crc32c_portable("123456789", 9) == 0xe3069283u);
    std::mt19937 random(3);
    std::vector<uint8_t> bytes(300);
    for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
    for (size_t from = 0; from < 9; ++from)
        for (size_t size = 0; size + from <= bytes.size(); ++size)
            CHECK(crc32c(bytes.data() + from, size) == crc32c_portable(bytes.data() + from, size));
    CHECK(crc32c(bytes.data() + 100, 200, crc32c(bytes.data(), 100)) == crc32c(bytes.data(), 300));
}

RUN_TESTS()
