// The converted benchmark, read in place. Opening checks the header; every 16 KiB block is checked when it is first
// touched, so a damaged file never gives an answer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "csrc/cells/files.h"
#include "csrc/cells/table_format.h"

namespace spos::cells {

class Table {
  public:
    static constexpr int64_t kNone = -1;

    // Throws InputError for what is no table, has another version, or is damaged.
    static Table open(const std::string& path);
    // Over memory that outlives the table; `name` stands in messages.
    Table(const uint8_t* data, size_t size, std::string name);

    uint32_t size() const { return header_.cells; }
    uint64_t records() const { return header_.records; }
    uint32_t repeats() const { return header_.repeats; }
    const std::vector<int32_t>& epochs() const { return epochs_; }  // ascending
    const std::string& name() const { return name_; }
    int epoch_index(int64_t epochs) const;  // kNone if there are no such records

    // Rows, or kNone. The cell must be pruned. All that follow throw InputError where the file is damaged.
    int64_t find(const Cell& cell) const;
    int64_t find(const Digest& hash) const;
    void find(const Cell* cells, size_t count, int64_t* rows) const;

    // row < size(), epoch < epochs().size(), repeat < repeats()
    CellRow cell(uint32_t row) const;
    const float* values(uint32_t row) const;  // [epochs, repeats, kPoints, kMetrics], all of a row
    int repeats_of(uint32_t row, int epoch) const;

    // Checks every block.
    void verify() const;

  private:
    void touch(uint64_t offset, uint64_t size) const;
    void check_block(uint64_t block) const;
    const GraphSlot& graph(uint32_t slot) const;

    std::string name_;
    std::unique_ptr<MappedFile> file_;
    const uint8_t* data_;
    TableHeader header_;
    TableLayout layout_;
    std::vector<int32_t> epochs_;
    std::unique_ptr<std::atomic<uint8_t>[]> checked_;  // one a block
};

}  // namespace spos::cells
