// Sixteen MD5 sums a vector.
#ifdef __x86_64__
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 blames its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "csrc/cells/hash_lanes.h"
#include "csrc/cells/md5_constants.h"

SPOS_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,popcnt")
namespace spos::cells {
namespace {

struct Lanes {
    using Vector = __m512i;
    static constexpr int kWidth = 16, kInterleaved = 4;

    static Vector set(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
    static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
    template <int N>
    static Vector rotate(Vector a) {
        return _mm512_rol_epi32(a, N);
    }
    // The last number is the truth table.
    static Vector f(Vector b, Vector c, Vector d) { return _mm512_ternarylogic_epi32(b, c, d, 0xca); }
    static Vector g(Vector b, Vector c, Vector d) { return _mm512_ternarylogic_epi32(d, b, c, 0xca); }
    static Vector h(Vector b, Vector c, Vector d) { return _mm512_ternarylogic_epi32(b, c, d, 0x96); }
    static Vector i(Vector b, Vector c, Vector d) { return _mm512_ternarylogic_epi32(b, c, d, 0x39); }
    // In each 128-bit lane: four rows of four words, turned.
    static void transpose(const Vector (&rows)[4], Vector* columns) {
        const Vector a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpacklo_epi32(rows[2], rows[3]);
        const Vector c = _mm512_unpackhi_epi32(rows[0], rows[1]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
        columns[0] = _mm512_unpacklo_epi64(a, b);
        columns[1] = _mm512_unpackhi_epi64(a, b);
        columns[2] = _mm512_unpacklo_epi64(c, d);
        columns[3] = _mm512_unpackhi_epi64(c, d);
    }
    static void load_block(const uint8_t* rows, Vector* words);
    static void store_digests(uint8_t* to, Vector a, Vector b, Vector c, Vector d) {
        Vector quads[4];  // in lane l, digest 4 l + j
        transpose({a, b, c, d}, quads);
        for (int j = 0; j < 4; ++j) {
            auto* digest = reinterpret_cast<__m128i*>(to + 16 * j);
            _mm_store_si128(digest, _mm512_extracti32x4_epi32(quads[j], 0));
            _mm_store_si128(digest + 4, _mm512_extracti32x4_epi32(quads[j], 1));
            _mm_store_si128(digest + 8, _mm512_extracti32x4_epi32(quads[j], 2));
            _mm_store_si128(digest + 12, _mm512_extracti32x4_epi32(quads[j], 3));
        }
    }
};

using std::aligned_alloc;
using std::free;
using std::memcpy;
using std::memset;
#include "csrc/cells/hash_lanes.inc"

void Lanes::load_block(const uint8_t* rows, Vector* words) {
    Vector quads[16];  // [4 i + j]: in 128-bit lane l, words 4 l + j of rows 4 i to 4 i + 3
    for (int i = 0; i < 4; ++i) {
        Vector row[4];
        for (int r = 0; r < 4; ++r) row[r] = _mm512_loadu_si512(rows + (4 * i + r) * kStride);
        transpose(row, quads + 4 * i);
    }
    for (int j = 0; j < 4; ++j) {
        const Vector a = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x44);
        const Vector b = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x44);
        const Vector c = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xee);
        const Vector d = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xee);
        words[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        words[4 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        words[8 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        words[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

}  // namespace

void hash_batch_avx512(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes) {
    hash_batch(cells, count, initial, hashes);
}

}  // namespace spos::cells
SPOS_TARGET_END
#endif
