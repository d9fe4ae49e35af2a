// 128-bit vectors, which every machine has or the compiler makes of four words.
#include <cstdlib>
#include <cstring>
#include <new>

#include "csrc/cells/hash_lanes.h"
#include "csrc/cells/md5_constants.h"

namespace spos::cells {
namespace {

struct Lanes {
    typedef uint32_t Vector __attribute__((vector_size(16)));
    static constexpr int kWidth = 4, kInterleaved = 4;

    static Vector set(uint32_t value) { return Vector{} + value; }
    static Vector add(Vector a, Vector b) { return a + b; }
    template <int N>
    static Vector rotate(Vector a) {
        return a << N | a >> (32 - N);
    }
    static Vector f(Vector b, Vector c, Vector d) { return d ^ (b & (c ^ d)); }
    static Vector g(Vector b, Vector c, Vector d) { return c ^ (d & (b ^ c)); }
    static Vector h(Vector b, Vector c, Vector d) { return b ^ c ^ d; }
    static Vector i(Vector b, Vector c, Vector d) { return c ^ (b | ~d); }
    static void transpose(const Vector (&rows)[4], Vector* columns) {
        const Vector a = SPOS_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5);
        const Vector b = SPOS_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5);
        const Vector c = SPOS_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);
        const Vector d = SPOS_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
        columns[0] = SPOS_SHUFFLE(a, b, 0, 1, 4, 5);
        columns[1] = SPOS_SHUFFLE(a, b, 2, 3, 6, 7);
        columns[2] = SPOS_SHUFFLE(c, d, 0, 1, 4, 5);
        columns[3] = SPOS_SHUFFLE(c, d, 2, 3, 6, 7);
    }
    static void load_block(const uint8_t* rows, Vector* words);
    static void store_digests(uint8_t* to, Vector a, Vector b, Vector c, Vector d) {
        Vector rows[4];
        transpose({a, b, c, d}, rows);
        std::memcpy(to, rows, sizeof rows);
    }
};

using std::aligned_alloc;
using std::free;
using std::memcpy;
using std::memset;
#include "csrc/cells/hash_lanes.inc"

void Lanes::load_block(const uint8_t* rows, Vector* words) {
    for (int part = 0; part < 4; ++part) {
        Vector row[4];
        for (int r = 0; r < 4; ++r) memcpy(&row[r], rows + r * kStride + part * 16, sizeof row[r]);
        transpose(row, words + 4 * part);
    }
}

}  // namespace

void hash_batch_baseline(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes) {
    hash_batch(cells, count, initial, hashes);
}

}  // namespace spos::cells
