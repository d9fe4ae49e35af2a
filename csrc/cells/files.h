// Files: read in pieces, mapped read-only, written so that they appear whole or not at all. POSIX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "csrc/cells/tfrecord.h"

namespace spos::cells {

// Reads a file from its beginning; the file closes with the last copy. Throws InputError.
Read reader_of(const std::string& path);

// Whether two paths lead to one file.
bool same_file(const std::string& a, const std::string& b);

// A whole file in memory, read-only and shared with other processes. Throws InputError.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

  private:
    const uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

// Written under a temporary name in the same folder; commit() syncs it and gives it its name. Without commit() it
// disappears, and what had the name before is untouched. Throws InputError.
class WholeFile {
  public:
    explicit WholeFile(const std::string& path);
    ~WholeFile();
    WholeFile(const WholeFile&) = delete;
    WholeFile& operator=(const WholeFile&) = delete;

    void write(uint64_t offset, const void* data, size_t size);
    void commit();

  private:
    [[noreturn]] void fail(int error) const;

    std::string path_, temporary_;
    int file_ = -1;
};

}  // namespace spos::cells
