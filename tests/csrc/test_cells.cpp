// The NAS-Bench-101 core, without Python.
#include <stdexcept>

#include "check.h"
#include "csrc/cells/graph.h"
#include "csrc/cells/hash.h"
#include "csrc/cells/md5.h"

using namespace spos::cells;

namespace {

std::string hash(const std::vector<uint8_t>& matrix, const std::vector<int>& labels) {
    const auto pruned = prune(make_graph(matrix.data(), labels));
    return pruned ? hash_graph(*pruned) : "invalid";
}

}  // namespace

// The test suite of RFC 1321, and lengths on both sides of a block's end.
TEST(md5_of_the_rfc) {
    CHECK(md5_hex("") == "d41d8cd98f00b204e9800998ecf8427e");
    CHECK(md5_hex("abc") == "900150983cd24fb0d6963f7d28e17f72");
    CHECK(md5_hex("message digest") == "f96b697d7cb7938d525a2f31aaf161d0");
    CHECK(md5_hex("12345678901234567890123456789012345678901234567890123456789012345678901234567890") ==
          "57edf4a22be3c955ac49da2e2107b67a");
    CHECK(md5_hex(std::string(55, 'a')) == "ef1772b6dff9a122358552954ad0df65");
    CHECK(md5_hex(std::string(56, 'a')) == "3b0c8ac703f828b04c6c197006d17218");
    CHECK(md5_hex(std::string(64, 'a')) == "014842d480b571495a4a0363793f7367");
}

// The smallest cell of the benchmark: input -> output.
TEST(hash_of_the_smallest_cell) {
    CHECK(hash({0, 1, 0, 0}, {-1, -2}) == "043721b9c7fe8c5fad811d47d83132ec");
}

// A vertex that leads nowhere, or that nothing leads to, does not count.
TEST(pruning_drops_what_lies_on_no_path) {
    // 0 -> 1 -> 3; 0 -> 2 ends there.
    CHECK(hash({0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, {-1, 0, 1, -2}) ==
          hash({0, 1, 0, 0, 0, 1, 0, 0, 0}, {-1, 0, -2}));
}

TEST(no_path_is_no_cell) {
    CHECK(hash({0, 0, 0, 0}, {-1, -2}) == "invalid");
    CHECK(hash({0}, {-2}) == "invalid");
}

// Swapping two parallel vertices changes nothing; changing an operation does.
TEST(isomorphic_cells_share_a_hash) {
    const std::vector<uint8_t> parallel = {0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0};
    CHECK(hash(parallel, {-1, 0, 2, -2}) == hash(parallel, {-1, 2, 0, -2}));
    CHECK(hash(parallel, {-1, 0, 2, -2}) != hash(parallel, {-1, 0, 1, -2}));
}

TEST(edges_backwards_are_refused) {
    bool refused = false;
    const uint8_t matrix[] = {0, 1, 1, 0};
    try {
        make_graph(matrix, {-1, -2});
    } catch (const std::invalid_argument&) {
        refused = true;
    }
    CHECK(refused);
}

RUN_TESTS()
