// Eight MD5 sums a vector.
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "csrc/cells/hash_lanes.h"
#include "csrc/cells/md5_constants.h"

SPOS_TARGET_BEGIN("avx2,bmi,bmi2,popcnt")
namespace spos::cells {
namespace {

struct Lanes {
    using Vector = __m256i;
    static constexpr int kWidth = 8, kInterleaved = 4;

    static Vector set(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
    template <int N>
    static Vector rotate(Vector a) {
        return _mm256_or_si256(_mm256_slli_epi32(a, N), _mm256_srli_epi32(a, 32 - N));
    }
    static Vector f(Vector b, Vector c, Vector d) {
        return _mm256_xor_si256(d, _mm256_and_si256(b, _mm256_xor_si256(c, d)));
    }
    static Vector g(Vector b, Vector c, Vector d) { return f(d, b, c); }
    static Vector h(Vector b, Vector c, Vector d) { return _mm256_xor_si256(b, _mm256_xor_si256(c, d)); }
    static Vector i(Vector b, Vector c, Vector d) {
        return _mm256_xor_si256(c, _mm256_or_si256(b, _mm256_xor_si256(d, _mm256_set1_epi32(-1))));
    }
    // In each 128-bit lane: four rows of four words, turned.
    static void transpose(const Vector (&rows)[4], Vector* columns) {
        const Vector a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpacklo_epi32(rows[2], rows[3]);
        const Vector c = _mm256_unpackhi_epi32(rows[0], rows[1]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
        columns[0] = _mm256_unpacklo_epi64(a, b);
        columns[1] = _mm256_unpackhi_epi64(a, b);
        columns[2] = _mm256_unpacklo_epi64(c, d);
        columns[3] = _mm256_unpackhi_epi64(c, d);
    }
    static void load_block(const uint8_t* rows, Vector* words);
    static void store_digests(uint8_t* to, Vector a, Vector b, Vector c, Vector d) {
        Vector quads[4];  // in lane l, digest 4 l + j
        transpose({a, b, c, d}, quads);
        for (int j = 0; j < 4; ++j) {
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * j), _mm256_extracti128_si256(quads[j], 0));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * (4 + j)), _mm256_extracti128_si256(quads[j], 1));
        }
    }
};

using std::aligned_alloc;
using std::free;
using std::memcpy;
using std::memset;
#include "csrc/cells/hash_lanes.inc"

void Lanes::load_block(const uint8_t* rows, Vector* words) {
    for (int half = 0; half < 2; ++half) {
        Vector quads[8];  // [4 i + j]: in 128-bit lane l, words 4 l + j of rows 4 i to 4 i + 3
        for (int i = 0; i < 2; ++i) {
            Vector row[4];
            for (int r = 0; r < 4; ++r)
                row[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + (4 * i + r) * kStride + half * 32));
            transpose(row, quads + 4 * i);
        }
        for (int j = 0; j < 4; ++j) {
            words[8 * half + j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x20);
            words[8 * half + 4 + j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x31);
        }
    }
}

}  // namespace

void hash_batch_avx2(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes) {
    hash_batch(cells, count, initial, hashes);
}

}  // namespace spos::cells
SPOS_TARGET_END
#endif
