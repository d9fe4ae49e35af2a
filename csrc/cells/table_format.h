// The table file, byte by byte. docs/nasbench.md describes it.
//
//   header      4096 bytes: TableHeader, zeros, and in the last four bytes the CRC-32C of all before
//   data        blocks of 16 KiB, zeros behind the last section; sections begin on multiples of 64 bytes
//     names     u32 [name_slots]: 1 + row, or 0; open addressing by the first half of the hash
//     graphs    GraphSlot [graph_slots]: open addressing by Cell::key() of every order of vertices of every cell
//     cells     CellRow [cells]: in the order of their first records
//     values    float32 [cells, epochs, repeats, 2 (halfway, final), 4 (Metric)]; NaN where there is no such record
//   checksums   u32 [blocks]: CRC-32C of each block of data
//
// Little endian. Bytes have one meaning each: a change of a single bit anywhere changes a checksum or is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "csrc/cells/digest.h"
#include "csrc/cells/record.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the table is read in place");

namespace spos::cells {

constexpr char kTableMagic[8] = {'S', 'P', 'O', 'S', '1', '0', '1', '\n'};
constexpr uint32_t kTableVersion = 1;
constexpr size_t kHeaderSize = 4096;
constexpr size_t kBlockSize = 16384;
constexpr uint32_t kMostEpochs = 16;  // different training lengths, and repeats of one, in a table
constexpr uint32_t kMostRepeats = 16;
constexpr uint32_t kMostCells = 1 << 22;
constexpr uint32_t kMostSlots = 1 << 28;

struct TableHeader {
    char magic[8];
    uint32_t version;
    uint32_t cells;
    uint32_t name_slots;  // powers of two
    uint32_t graph_slots;
    uint32_t epochs;
    uint32_t repeats;
    int32_t epoch_values[kMostEpochs];  // ascending; 0 beyond `epochs`
    uint64_t records;                   // that the table was made from
    uint64_t file_size;
    uint32_t checksums_crc;  // CRC-32C of the checksums
};

struct GraphSlot {
    uint32_t key;  // 0: empty
    uint32_t row;
};

struct CellRow {
    Digest hash;
    uint32_t key;
    int32_t parameters;
};
static_assert(sizeof(GraphSlot) == 8 && sizeof(CellRow) == 24);

struct TableLayout {
    uint64_t names, graphs, cells, values, checksums, file_size;  // offsets in bytes
    uint64_t blocks, values_size, row_floats;
};

inline TableLayout layout_of(const TableHeader& header) {
    const auto aligned = [](uint64_t offset) { return (offset + 63) / 64 * 64; };
    TableLayout layout = {};
    layout.row_floats = uint64_t{header.epochs} * header.repeats * kPoints * kMetrics;
    layout.values_size = header.cells * layout.row_floats * sizeof(float);
    layout.names = kHeaderSize;
    layout.graphs = aligned(layout.names + uint64_t{header.name_slots} * sizeof(uint32_t));
    layout.cells = aligned(layout.graphs + uint64_t{header.graph_slots} * sizeof(GraphSlot));
    layout.values = aligned(layout.cells + uint64_t{header.cells} * sizeof(CellRow));
    layout.blocks = (layout.values + layout.values_size - kHeaderSize + kBlockSize - 1) / kBlockSize;
    layout.checksums = kHeaderSize + layout.blocks * kBlockSize;
    layout.file_size = layout.checksums + layout.blocks * sizeof(uint32_t);
    return layout;
}

// Where a search begins; slots is a power of two.
inline uint32_t name_slot(const Digest& hash, uint32_t slots) {
    return static_cast<uint32_t>(first_half(hash)) & (slots - 1);
}
inline uint32_t graph_slot(uint32_t key, uint32_t slots) {
    return static_cast<uint32_t>(key * uint64_t{0x9e3779b97f4a7c15} >> 32) & (slots - 1);  // Fibonacci hashing
}

// A power of two that leaves a third of the slots free.
inline uint32_t slots_for(uint64_t entries) {
    uint32_t slots = 16;
    while (slots < entries + entries / 2) slots *= 2;
    return slots;
}

}  // namespace spos::cells
