#include "csrc/cells/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "csrc/cells/crc32c.h"
#include "csrc/cells/error.h"
#include "csrc/cells/files.h"
#include "csrc/cells/hash.h"
#include "csrc/cells/tfrecord.h"

namespace spos::cells {
namespace {

InputError bad_record(uint64_t number, uint64_t offset, const std::string& why) {
    return InputError("record " + std::to_string(number) + " at byte " + std::to_string(offset) + ": " + why);
}

// Writes sections one after another and sums up blocks on the way.
class BlockWriter {
  public:
    explicit BlockWriter(const TableBuilder::Write& write) : write_(write) { block_.reserve(kBlockSize); }

    void add(const void* data, size_t size) {
        const auto* bytes = static_cast<const uint8_t*>(data);
        while (size > 0) {
            const size_t part = std::min(size, kBlockSize - block_.size());
            block_.insert(block_.end(), bytes, bytes + part);
            bytes += part, size -= part, offset_ += part;
            if (block_.size() == kBlockSize) flush();
        }
    }

    // Zeros up to an offset in the file.
    void pad(uint64_t offset) {
        static constexpr uint8_t kZeros[kBlockSize] = {};
        if (offset > offset_) add(kZeros, offset - offset_);
    }

    const std::vector<uint32_t>& checksums() const { return checksums_; }

  private:
    void flush() {
        checksums_.push_back(crc32c(block_.data(), kBlockSize));
        write_(offset_ - kBlockSize, block_.data(), kBlockSize);
        block_.clear();
    }

    const TableBuilder::Write& write_;
    std::vector<uint8_t> block_;
    std::vector<uint32_t> checksums_;
    uint64_t offset_ = kHeaderSize;
};

}  // namespace

TableBuilder::TableBuilder() : names_(slots_for(0)) {}

void TableBuilder::grow_names() {
    names_.assign(slots_for(2 * cells_.size()), 0);
    for (uint32_t row = 0; row < cells_.size(); ++row) {
        const auto slots = static_cast<uint32_t>(names_.size());
        uint32_t slot = name_slot(cells_[row].hash, slots);
        while (names_[slot] != 0) slot = (slot + 1) & (slots - 1);
        names_[slot] = row + 1;
    }
}

void TableBuilder::check_pending() {
    std::vector<Cell> cells;
    for (const Pending& pending : pending_) cells.push_back(pending.cell);
    std::vector<Digest> hashes(cells.size());
    hash_cells(cells.data(), cells.size(), hashes.data());
    for (size_t i = 0; i < hashes.size(); ++i)
        if (hashes[i] != pending_[i].hash)
            throw bad_record(
                pending_[i].number, pending_[i].offset,
                "module hash " + to_hex(pending_[i].hash) + " is not that of its graph, " + to_hex(hashes[i]));
    pending_.clear();
}

uint32_t TableBuilder::row_of(const Record& record, uint64_t number, uint64_t offset) {
    const auto slots = static_cast<uint32_t>(names_.size());
    uint32_t slot = name_slot(record.hash, slots);
    // Records of a cell mostly follow one another.
    if (!cells_.empty() && cells_.back().hash == record.hash)
        slot = slots;
    else
        while (names_[slot] != 0 && cells_[names_[slot] - 1].hash != record.hash) slot = (slot + 1) & (slots - 1);
    const bool known = slot == slots || names_[slot] != 0;
    const uint32_t key = record.cell.key();
    if (!known || cells_[slot == slots ? cells_.size() - 1 : names_[slot] - 1].key != key) {
        constexpr size_t kBatch = 4096;
        pending_.push_back({record.cell, record.hash, number, offset});
        if (pending_.size() == kBatch) check_pending();
    }
    if (known) {
        const auto row = slot == slots ? static_cast<uint32_t>(cells_.size() - 1) : names_[slot] - 1;
        const CellRow& first = cells_[row];
        if (first.key == key && first.parameters != record.parameters)
            throw bad_record(number, offset,
                             "trainable_parameters " + std::to_string(record.parameters) + " differ from the " +
                                 std::to_string(first.parameters) + " of the same cell before");
        return row;
    }
    const auto row = static_cast<uint32_t>(cells_.size());
    if (row == kMostCells) throw bad_record(number, offset, "more than " + std::to_string(kMostCells) + " cells");
    cells_.push_back({record.hash, key, record.parameters});
    first_.push_back(kEnd);
    last_.push_back(kEnd);
    names_[slot] = row + 1;
    if (slots < slots_for(cells_.size())) grow_names();
    return row;
}

void TableBuilder::add(const Record& record, uint64_t number, uint64_t offset) {
    if (records_ == kEnd) throw bad_record(number, offset, "too many records");
    const uint32_t row = row_of(record, number, offset);
    const auto found = std::find(epochs_.begin(), epochs_.end(), record.epochs);
    if (found == epochs_.end() && epochs_.size() == kMostEpochs)
        throw bad_record(number, offset, "more than " + std::to_string(kMostEpochs) + " different numbers of epochs");
    const auto epoch = static_cast<uint32_t>(found - epochs_.begin());
    if (found == epochs_.end()) epochs_.push_back(record.epochs);

    const auto at = static_cast<uint32_t>(records_);
    if (at % kChunk == 0) entries_.push_back(std::make_unique<Entry[]>(kChunk));
    Entry& entry = entries_[at / kChunk][at % kChunk];
    std::memcpy(entry.metrics, record.metrics, sizeof entry.metrics);
    entry.next = kEnd;
    entry.epoch = epoch;
    if (last_[row] == kEnd)
        first_[row] = at;
    else
        entries_[last_[row] / kChunk][last_[row] % kChunk].next = at;
    last_[row] = at;
    ++records_;
}

std::vector<GraphSlot> TableBuilder::index_graphs() const {
    std::vector<GraphSlot> all;
    std::vector<uint32_t> keys;
    for (uint32_t row = 0; row < cells_.size(); ++row) {
        keys.clear();
        for_each_order(Cell::from_key(cells_[row].key), [&](const Cell& cell) { keys.push_back(cell.key()); });
        std::sort(keys.begin(), keys.end());
        keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
        for (uint32_t key : keys) all.push_back({key, row});
    }
    const uint32_t slots = slots_for(all.size());
    std::vector<GraphSlot> index(slots);
    for (const GraphSlot& entry : all) {
        uint32_t slot = graph_slot(entry.key, slots);
        while (index[slot].key != 0) slot = (slot + 1) & (slots - 1);
        index[slot] = entry;
    }
    return index;
}

void TableBuilder::finish() {
    check_pending();
    for (uint32_t i : first_) {
        uint32_t count[kMostEpochs] = {};
        for (; i != kEnd; i = entry(i).next) repeats_ = std::max(repeats_, ++count[entry(i).epoch]);
    }
    if (records_ == 0) throw InputError("holds no records");
    if (repeats_ > kMostRepeats)
        throw InputError("a cell has " + std::to_string(repeats_) + " records of the same epochs; at most " +
                         std::to_string(kMostRepeats) + " fit");
}

void TableBuilder::write(const Write& write) const {
    std::vector<uint32_t> order(epochs_.size()), rank(epochs_.size());  // epochs ascending
    for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return epochs_[a] < epochs_[b]; });
    TableHeader header = {};
    for (uint32_t i = 0; i < order.size(); ++i) {
        rank[order[i]] = i;
        header.epoch_values[i] = epochs_[order[i]];
    }
    header.repeats = repeats_;
    const std::vector<GraphSlot> graphs = index_graphs();
    std::memcpy(header.magic, kTableMagic, sizeof header.magic);
    header.version = kTableVersion;
    header.cells = static_cast<uint32_t>(cells_.size());
    header.name_slots = static_cast<uint32_t>(names_.size());
    header.graph_slots = static_cast<uint32_t>(graphs.size());
    header.epochs = static_cast<uint32_t>(epochs_.size());
    header.records = records_;
    const TableLayout layout = layout_of(header);
    header.file_size = layout.file_size;

    BlockWriter writer(write);
    writer.add(names_.data(), names_.size() * sizeof names_[0]);
    writer.pad(layout.graphs);
    writer.add(graphs.data(), graphs.size() * sizeof graphs[0]);
    writer.pad(layout.cells);
    writer.add(cells_.data(), cells_.size() * sizeof cells_[0]);
    writer.pad(layout.values);
    std::vector<float> row(layout.row_floats);
    for (uint32_t i : first_) {
        std::fill(row.begin(), row.end(), std::numeric_limits<float>::quiet_NaN());
        uint32_t count[kMostEpochs] = {};
        for (; i != kEnd; i = entry(i).next) {
            const uint32_t repeat = count[entry(i).epoch]++;
            std::memcpy(&row[(rank[entry(i).epoch] * header.repeats + repeat) * kPoints * kMetrics], entry(i).metrics,
                        sizeof entry(i).metrics);
        }
        writer.add(row.data(), row.size() * sizeof(float));
    }
    writer.pad(layout.checksums);
    const std::vector<uint32_t>& checksums = writer.checksums();
    write(layout.checksums, checksums.data(), checksums.size() * sizeof checksums[0]);
    header.checksums_crc = crc32c(checksums.data(), checksums.size() * sizeof checksums[0]);
    uint8_t head[kHeaderSize] = {};
    std::memcpy(head, &header, sizeof header);
    const uint32_t crc = crc32c(head, kHeaderSize - sizeof crc);
    std::memcpy(head + kHeaderSize - sizeof crc, &crc, sizeof crc);
    write(0, head, kHeaderSize);
}

Converted convert(const std::string& from, const std::string& to, const std::function<void()>& poll) {
    constexpr uint64_t kPollEvery = 1 << 15;
    if (same_file(from, to)) throw InputError(to + ": is the file that is read; name another one");
    RecordFile file(reader_of(from));
    WholeFile table(to);  // now, so that a folder that cannot be written is found before the work
    TableBuilder builder;
    try {
        RecordParser parser;
        std::string_view data;
        for (;;) {
            Record record;
            try {
                if (!file.next(data)) break;
                record = parser.parse(data);
            } catch (const InputError& error) {
                throw bad_record(file.number(), file.offset(), error.what());
            }
            builder.add(record, file.number(), file.offset());
            if (file.number() % kPollEvery == 0) poll();
        }
        builder.finish();
    } catch (const InputError& error) {
        throw InputError(from + ": " + error.what());
    }
    builder.write([&](uint64_t offset, const void* data, size_t size) { table.write(offset, data, size); });
    table.commit();
    return {builder.records(), builder.cells()};
}

}  // namespace spos::cells
