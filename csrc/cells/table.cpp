#include "csrc/cells/table.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "csrc/cells/crc32c.h"
#include "csrc/cells/error.h"

namespace spos::cells {
namespace {

bool power_of_two(uint32_t value) {
    return value != 0 && (value & (value - 1)) == 0;
}

bool plausible(const TableHeader& header) {
    if (header.cells > kMostCells || !power_of_two(header.name_slots) || !power_of_two(header.graph_slots) ||
        header.name_slots > kMostSlots || header.graph_slots > kMostSlots)
        return false;
    if (header.epochs < 1 || header.epochs > kMostEpochs || header.repeats < 1 || header.repeats > kMostRepeats)
        return false;
    for (uint32_t i = 0; i < kMostEpochs; ++i) {
        if (i < header.epochs ? header.epoch_values[i] < 1 : header.epoch_values[i] != 0) return false;
        if (i > 0 && i < header.epochs && header.epoch_values[i] <= header.epoch_values[i - 1]) return false;
    }
    return true;
}

}  // namespace

Table Table::open(const std::string& path) {
    auto file = std::make_unique<MappedFile>(path);
    Table table(file->data(), file->size(), path);
    table.file_ = std::move(file);
    return table;
}

Table::Table(const uint8_t* data, size_t size, std::string name) : name_(std::move(name)), data_(data) {
    const auto refuse = [&](const std::string& why) { throw InputError(name_ + ": " + why); };
    if (size < sizeof kTableMagic || std::memcmp(data, kTableMagic, sizeof kTableMagic) != 0)
        refuse("not a table of spos_fast; make one from the official file with `spos-fast nasbench convert`");
    if (size < kHeaderSize) refuse("the table ends inside its header; convert again");
    std::memcpy(&header_, data, sizeof header_);
    if (header_.version != kTableVersion)
        refuse("table version " + std::to_string(header_.version) + "; this program reads " +
               std::to_string(kTableVersion) + "; convert again");
    uint32_t crc;
    std::memcpy(&crc, data + kHeaderSize - sizeof crc, sizeof crc);
    if (crc != crc32c(data, kHeaderSize - sizeof crc)) refuse("checksum of the header is wrong; the file is damaged");
    if (!plausible(header_)) refuse("the header holds impossible numbers; the file is damaged");
    layout_ = layout_of(header_);
    if (header_.file_size != layout_.file_size || size != layout_.file_size)
        refuse("has " + std::to_string(size) + " bytes; its header says " + std::to_string(layout_.file_size) +
               "; the file is damaged");
    if (header_.checksums_crc != crc32c(data + layout_.checksums, layout_.file_size - layout_.checksums))
        refuse("checksum of the checksums is wrong; the file is damaged");
    epochs_.assign(header_.epoch_values, header_.epoch_values + header_.epochs);
    checked_ = std::make_unique<std::atomic<uint8_t>[]>(layout_.blocks);
}

void Table::check_block(uint64_t block) const {
    const uint64_t begin = kHeaderSize + block * kBlockSize;
    uint32_t crc;
    std::memcpy(&crc, data_ + layout_.checksums + block * sizeof crc, sizeof crc);
    if (crc != crc32c(data_ + begin, kBlockSize))
        throw InputError(name_ + ": checksum of block " + std::to_string(block) + " (bytes " + std::to_string(begin) +
                         " to " + std::to_string(begin + kBlockSize - 1) + ") is wrong; the file is damaged");
    checked_[block].store(1, std::memory_order_relaxed);
}

inline void Table::touch(uint64_t offset, uint64_t size) const {
    const uint64_t last = (offset + size - 1 - kHeaderSize) / kBlockSize;
    for (uint64_t block = (offset - kHeaderSize) / kBlockSize; block <= last; ++block)
        if (!checked_[block].load(std::memory_order_relaxed)) check_block(block);
}

inline const GraphSlot& Table::graph(uint32_t slot) const {
    const uint64_t offset = layout_.graphs + slot * sizeof(GraphSlot);
    touch(offset, sizeof(GraphSlot));
    return *reinterpret_cast<const GraphSlot*>(data_ + offset);
}

int Table::epoch_index(int64_t epochs) const {
    const auto found = std::find(epochs_.begin(), epochs_.end(), epochs);
    return found == epochs_.end() ? static_cast<int>(kNone) : static_cast<int>(found - epochs_.begin());
}

int64_t Table::find(const Cell& cell) const {
    const uint32_t key = cell.key(), mask = header_.graph_slots - 1;
    if (cell.vertices == 0) return kNone;
    uint32_t slot = graph_slot(key, header_.graph_slots);
    for (uint32_t tried = 0; tried <= mask; ++tried, slot = (slot + 1) & mask) {
        const GraphSlot& found = graph(slot);
        if (found.key == 0) return kNone;
        if (found.key != key) continue;
        if (found.row >= header_.cells) throw InputError(name_ + ": row out of range; the file is damaged");
        return found.row;
    }
    return kNone;
}

void Table::find(const Cell* cells, size_t count, int64_t* rows) const {
    // The slots lie anywhere in megabytes; asking for them ahead hides most of the way to memory.
    constexpr size_t kAhead = 16;
    for (size_t i = 0; i < count; ++i) {
        if (i + kAhead < count)
            __builtin_prefetch(data_ + layout_.graphs +
                               graph_slot(cells[i + kAhead].key(), header_.graph_slots) * sizeof(GraphSlot));
        rows[i] = find(cells[i]);
        if (rows[i] != kNone) __builtin_prefetch(data_ + layout_.values + rows[i] * layout_.row_floats * sizeof(float));
    }
}

int64_t Table::find(const Digest& hash) const {
    const uint32_t mask = header_.name_slots - 1;
    uint32_t slot = name_slot(hash, header_.name_slots);
    for (uint32_t tried = 0; tried <= mask; ++tried, slot = (slot + 1) & mask) {
        const uint64_t offset = layout_.names + slot * sizeof(uint32_t);
        touch(offset, sizeof(uint32_t));
        uint32_t found;
        std::memcpy(&found, data_ + offset, sizeof found);
        if (found == 0) return kNone;
        if (found > header_.cells) throw InputError(name_ + ": row out of range; the file is damaged");
        if (cell(found - 1).hash == hash) return found - 1;
    }
    return kNone;
}

CellRow Table::cell(uint32_t row) const {
    const uint64_t offset = layout_.cells + row * sizeof(CellRow);
    touch(offset, sizeof(CellRow));
    CellRow found;
    std::memcpy(&found, data_ + offset, sizeof found);
    return found;
}

const float* Table::values(uint32_t row) const {
    const uint64_t size = layout_.row_floats * sizeof(float), offset = layout_.values + row * size;
    touch(offset, size);
    return reinterpret_cast<const float*>(data_ + offset);
}

int Table::repeats_of(uint32_t row, int epoch) const {
    const int most = static_cast<int>(header_.repeats);
    const float* first = values(row) + static_cast<size_t>(epoch) * most * kPoints * kMetrics;
    int count = 0;
    while (count < most && !std::isnan(first[count * kPoints * kMetrics])) ++count;
    return count;
}

void Table::verify() const {
    for (uint64_t block = 0; block < layout_.blocks; ++block) check_block(block);
}

}  // namespace spos::cells
