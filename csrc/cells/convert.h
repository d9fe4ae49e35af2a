// From records of the official file to the table.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/cells/record.h"
#include "csrc/cells/table_format.h"

namespace spos::cells {

class TableBuilder {
  public:
    TableBuilder();

    // Throws InputError, with the record's number and offset, for a record that contradicts an earlier one or whose
    // hash is not that of its graph; the hash of a new cell may be checked a few records later.
    void add(const Record& record, uint64_t number, uint64_t offset);
    // After the last record: the checks that are left. Throws InputError.
    void finish();
    // Hands the table over piece by piece; the header comes last. Throws what `write` throws.
    using Write = std::function<void(uint64_t offset, const void* data, size_t size)>;
    void write(const Write& write) const;

    uint64_t records() const { return records_; }
    size_t cells() const { return cells_.size(); }

  private:
    // One record's numbers. Those of a cell form a list in the order of the file.
    struct Entry {
        float metrics[kPoints][kMetrics];
        uint32_t next;
        uint32_t epoch;  // index into epochs_
    };
    struct Pending {
        Cell cell;
        Digest hash;
        uint64_t number, offset;
    };

    uint32_t row_of(const Record& record, uint64_t number, uint64_t offset);
    void check_pending();
    void grow_names();
    std::vector<GraphSlot> index_graphs() const;
    const Entry& entry(uint32_t i) const { return entries_[i / kChunk][i % kChunk]; }

    static constexpr uint32_t kChunk = 1 << 10;
    static constexpr uint32_t kEnd = ~uint32_t{0};
    std::vector<std::unique_ptr<Entry[]>> entries_;  // in chunks: no copy doubles the memory
    uint64_t records_ = 0;
    uint32_t repeats_ = 0;         // the most of one cell and number of epochs
    std::vector<int32_t> epochs_;  // in the order of appearance
    std::vector<CellRow> cells_;
    std::vector<uint32_t> first_, last_;  // entries of each cell
    std::vector<uint32_t> names_;         // as in the file
    std::vector<Pending> pending_;
};

struct Converted {
    uint64_t records, cells;
};

// Converts the file `from` to the table `to`. `poll` is called now and then and may throw to stop.
// Throws InputError that names the file and, for a bad record, its number, offset and what is wrong.
Converted convert(const std::string& from, const std::string& to, const std::function<void()>& poll);

}  // namespace spos::cells
