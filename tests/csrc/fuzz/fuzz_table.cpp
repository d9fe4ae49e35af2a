// Fuzzes the reader of tables. The first byte of an input says how to take the rest:
//   even: the bytes of a table file
//   odd:  the fields of a header and the first bytes of the data; the rest is zeros, and all sums and sizes are set
//   right,
//         so that what lies behind the checksums is reached
#include <algorithm>
#include <cstring>
#include <vector>

#include "csrc/cells/crc32c.h"
#include "csrc/cells/error.h"
#include "csrc/cells/table.h"

using namespace spos::cells;

namespace {

std::vector<uint8_t> signed_table(const uint8_t* data, size_t size) {
    constexpr uint64_t kMost = 40000;  // two blocks: more of them is only slower
    TableHeader header = {};
    const size_t given = std::min(size, sizeof header);
    std::memcpy(&header, data, given);
    std::memcpy(header.magic, kTableMagic, sizeof header.magic);
    header.version = kTableVersion;
    const TableLayout layout = layout_of(header);
    if (layout.file_size > kMost || layout.file_size < kHeaderSize) return {data, data + size};
    header.file_size = layout.file_size;
    std::vector<uint8_t> bytes(layout.file_size);
    std::memcpy(bytes.data() + kHeaderSize, data + given,
                std::min<size_t>(size - given, layout.checksums - kHeaderSize));
    for (uint64_t block = 0; block < layout.blocks; ++block) {
        const uint32_t crc = crc32c(bytes.data() + kHeaderSize + block * kBlockSize, kBlockSize);
        std::memcpy(bytes.data() + layout.checksums + block * sizeof crc, &crc, sizeof crc);
    }
    header.checksums_crc = crc32c(bytes.data() + layout.checksums, layout.file_size - layout.checksums);
    std::memcpy(bytes.data(), &header, sizeof header);
    const uint32_t crc = crc32c(bytes.data(), kHeaderSize - sizeof crc);
    std::memcpy(bytes.data() + kHeaderSize - sizeof crc, &crc, sizeof crc);
    return bytes;
}

float use(const Table& table) {
    float sum = 0;
    const auto points = table.epochs().size() * table.repeats() * kPoints * kMetrics;
    for (uint32_t row = 0; row < std::min<uint32_t>(table.size(), 64); ++row) {
        const CellRow cell = table.cell(row);
        const Cell graph = Cell::from_key(cell.key);
        uint8_t adjacency[49];
        int8_t ops[7];
        write_cell(graph, adjacency, ops);
        const float* values = table.values(row);
        for (size_t i = 0; i < points; ++i) sum += values[i];
        for (size_t epoch = 0; epoch < table.epochs().size(); ++epoch)
            sum += static_cast<float>(table.repeats_of(row, static_cast<int>(epoch)));
        for (const int64_t found : {table.find(graph), table.find(cell.hash)})
            if (found < Table::kNone || found >= static_cast<int64_t>(table.size())) __builtin_trap();
    }
    table.verify();
    return sum;
}

}  // namespace

float fuzz_sink;  // so that no read is left out

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    std::vector<uint8_t> bytes(data + 1, data + size);
    if (data[0] & 1) bytes = signed_table(data + 1, size - 1);
    try {
        const Table table(bytes.data(), bytes.size(), "table");
        fuzz_sink = use(table);
    } catch (const InputError&) {
        return 0;
    }
    return 0;
}
