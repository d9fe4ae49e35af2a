// TFRecord framing: u64 length, u32 masked CRC-32C of the length, data, u32 masked CRC-32C of the data; little endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

namespace spos::cells {

// Fills up to `size` bytes; fewer only at the end. Throws InputError when reading fails.
using Read = std::function<size_t(void* into, size_t size)>;

class RecordFile {
  public:
    static constexpr size_t kLongest = 1 << 14;  // of a record's data, in bytes; real ones have some 400

    // buffer: bytes to read at a time, more than kLongest by the frame at least.
    explicit RecordFile(Read read, size_t buffer = 1 << 20);

    // The data of the next record, valid until the next call; false at the end of the file. Both sums are checked.
    // Throws InputError that says which check failed; the caller adds where.
    bool next(std::string_view& data);

    uint64_t number() const { return number_; }  // of the last record asked for, from 0
    uint64_t offset() const { return offset_; }  // where it begins in the file, in bytes

  private:
    size_t fill(size_t size);  // how many of `size` bytes are at hand

    Read read_;
    std::vector<char> buffer_;
    size_t begin_ = 0, end_ = 0;  // what is read and not yet used
    uint64_t number_ = ~uint64_t{0}, offset_ = 0, next_offset_ = 0;
};

}  // namespace spos::cells
