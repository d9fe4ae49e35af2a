// Hashing many cells with several MD5 sums at once, for several instruction sets. Each hash_*.cpp defines its `Lanes`
// and includes hash_lanes.inc, which is everything else; hash.cpp chooses at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/cells/cell.h"
#include "csrc/cells/digest.h"

// Functions between these two are compiled for an instruction set. Headers come before, so that what they define inline
// stays runnable everywhere.
#define SPOS_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SPOS_TARGET_BEGIN(isa) SPOS_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SPOS_TARGET_END SPOS_PRAGMA(clang attribute pop)
#else
#define SPOS_TARGET_BEGIN(isa) SPOS_PRAGMA(GCC push_options) SPOS_PRAGMA(GCC target(isa))
#define SPOS_TARGET_END SPOS_PRAGMA(GCC pop_options)
#endif

// GCC knows Clang's name only since version 12.
#ifdef __clang__
#define SPOS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SPOS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, __typeof__(a){__VA_ARGS__})
#endif

namespace spos::cells {

// The hash of one vertex: as text, which the next round hashes, and as a number, which orders as the text does.
struct VertexHash {
    uint8_t hex[32];
    uint64_t high, low;
};

// Hashes of vertices before the first round, by out-degree, in-degree and label.
struct InitialHashes {
    VertexHash of[kCellVertices][kCellVertices][5];  // labels -2 to 2
};

using HashBatch = void (*)(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes);
void hash_batch_baseline(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes);
void hash_batch_avx2(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes);
void hash_batch_avx512(const Cell* cells, size_t count, const InitialHashes& initial, Digest* hashes);

}  // namespace spos::cells
