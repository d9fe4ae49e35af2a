// Fuzzes the reader of the official file. The first byte of an input says how to take the rest:
//   even: the bytes of a TFRecord file
//   odd:  the data of records, one a line, without frames; hashes are set right, so that changed graphs come through
// What is accepted becomes a table in memory, which must hold what the records held.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/cells/convert.h"
#include "csrc/cells/error.h"
#include "csrc/cells/hash.h"
#include "csrc/cells/table.h"
#include "csrc/cells/tfrecord.h"

using namespace spos::cells;

namespace {

void require(bool good) {
    if (!good) std::abort();
}

void check_table(const TableBuilder& builder, const std::vector<Record>& records) {
    std::vector<uint8_t> bytes;
    builder.write([&](uint64_t offset, const void* data, size_t size) {
        bytes.resize(std::max<size_t>(bytes.size(), offset + size));
        std::memcpy(bytes.data() + offset, data, size);
    });
    const Table table(bytes.data(), bytes.size(), "table");
    table.verify();
    for (const Record& record : records) {
        const int64_t row = table.find(record.hash);
        require(row >= 0 && table.find(record.cell) == row);
        const int epoch = table.epoch_index(record.epochs);
        require(epoch >= 0);
        const size_t size = sizeof record.metrics / sizeof(float);
        const float* values = table.values(static_cast<uint32_t>(row)) + epoch * table.repeats() * size;
        bool found = false;
        for (int repeat = 0; repeat < table.repeats_of(static_cast<uint32_t>(row), epoch); ++repeat)
            found |= std::memcmp(values + repeat * size, record.metrics, sizeof record.metrics) == 0;
        require(found);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const bool lines = data[0] & 1;
    const std::string text(reinterpret_cast<const char*>(data + 1), size - 1);
    TableBuilder builder;
    RecordParser parser;
    std::vector<Record> records;
    try {
        if (lines) {
            for (size_t begin = 0; begin < text.size();) {
                const size_t end = std::min(text.find('\n', begin), text.size());
                Record record = parser.parse(std::string_view(text).substr(begin, end - begin));
                hash_cells(&record.cell, 1, &record.hash);
                builder.add(record, records.size(), begin);
                records.push_back(record);
                begin = end + 1;
            }
        } else {
            size_t at = 0;
            RecordFile file(
                [&](void* into, size_t wanted) {
                    const size_t part = std::min(wanted, text.size() - at);
                    std::memcpy(into, text.data() + at, part);
                    at += part;
                    return part;
                },
                2 * RecordFile::kLongest);
            for (std::string_view found; file.next(found);) {
                const Record record = parser.parse(found);
                builder.add(record, file.number(), file.offset());
                records.push_back(record);
            }
        }
        builder.finish();
    } catch (const InputError& error) {
        require(std::strchr(error.what(), '\n') == nullptr);
        return 0;
    }
    check_table(builder, records);
    return 0;
}
