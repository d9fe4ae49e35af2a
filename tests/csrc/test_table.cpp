// The official file's records and the table made of them.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "check.h"
#include "csrc/cells/convert.h"
#include "csrc/cells/enumerate.h"
#include "csrc/cells/error.h"
#include "csrc/cells/table.h"
#include "csrc/cells/tfrecord.h"
#include "official_record.h"

using namespace spos::cells;
using namespace spos::test;

namespace {

// The message of the InputError that it throws; empty where it throws none.
std::string error_of(const std::function<void()>& run) {
    try {
        run();
    } catch (const InputError& error) {
        return error.what();
    }
    return "";
}

bool contains(const std::string& text, const std::string& part) {
    const bool found = text.find(part) != std::string::npos;
    if (!found) std::printf("'%s' is not in '%s'\n", part.c_str(), text.c_str());
    return found;
}

Read read_from(const std::string& bytes) {
    return [bytes, at = size_t{0}](void* into, size_t size) mutable {
        const size_t part = std::min(size, bytes.size() - at);
        std::memcpy(into, bytes.data() + at, part);
        at += part;
        return part;
    };
}

struct TemporaryFile {
    TemporaryFile() {
        char name[] = "/tmp/spos_fast_test_XXXXXX";
        const int file = ::mkstemp(name);
        if (file >= 0) ::close(file);
        path = name;
    }
    ~TemporaryFile() { ::unlink(path.c_str()); }
    void write(const std::string& bytes) const { std::ofstream(path, std::ios::binary) << bytes; }
    std::string read() const {
        std::ifstream file(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }
    std::string path;
};

// Three cells, two records each, but one of the last.
std::string small_file() {
    const Enumeration all = enumerate_cells(4);
    std::string file;
    for (size_t i : {1, 40, 84})
        for (int repeat = 0; repeat < (i == 84 ? 1 : 2); ++repeat)
            file += framed(record_of(all.cells[i], 100.5 * static_cast<double>(i) + repeat, 0.5).text());
    return file;
}

std::string convert_error(const std::string& bytes) {
    const TemporaryFile from, to;
    from.write(bytes);
    to.write("before");
    const std::string error = error_of([&] { convert(from.path, to.path, [] {}); });
    if (!error.empty()) {
        CHECK(to.read() == "before");
        CHECK(error.rfind(from.path + ": ", 0) == 0);
        CHECK(error.find('\n') == std::string::npos);
    }
    return error;
}

std::string table_bytes() {
    const TemporaryFile from, to;
    from.write(small_file());
    convert(from.path, to.path, [] {});
    return to.read();
}

}  // namespace

TEST(a_table_holds_what_the_records_held) {
    const TemporaryFile from, to;
    from.write(small_file());
    const Converted converted = convert(from.path, to.path, [] {});
    CHECK(converted.records == 5 && converted.cells == 3);
    const Table table = Table::open(to.path);
    table.verify();
    CHECK(table.size() == 3 && table.records() == 5 && table.repeats() == 2);
    CHECK(table.epochs() == std::vector<int32_t>{108});
    const Enumeration all = enumerate_cells(4);
    uint32_t row = 0;
    for (size_t i : {1, 40, 84}) {
        CHECK(table.find(all.hashes[i]) == row);
        for_each_order(all.cells[i], [&](const Cell& cell) { CHECK(table.find(cell) == row); });
        const CellRow found = table.cell(row);
        CHECK(found.hash == all.hashes[i] && Cell::from_key(found.key) == all.cells[i]);
        CHECK(found.parameters == trainable_parameters(all.cells[i]));
        const float* values = table.values(row);
        const auto time = static_cast<float>(100.5 * static_cast<double>(i));
        const float wanted[] = {time / 2, 0.25f, 0.125f, 0.0625f, time, 0.5f, 0.25f, 0.125f};
        CHECK(std::equal(wanted, wanted + 8, values));
        CHECK(table.repeats_of(row, 0) == (i == 84 ? 1 : 2));
        if (i == 84)
            CHECK(std::all_of(values + 8, values + 16, [](float value) { return std::isnan(value); }));
        else
            CHECK(values[12] == time + 1);
        ++row;
    }
    CHECK(table.find(all.cells[2]) == Table::kNone && table.find(all.hashes[2]) == Table::kNone);
    CHECK(table.find(Cell{}) == Table::kNone);
    CHECK(table.epoch_index(36) == -1);
}

// One bit anywhere: the sums of the frame cover every byte, and the message says in which record.
TEST(a_flipped_bit_in_the_official_file_is_named) {
    const Enumeration all = enumerate_cells(3);
    const std::string first = framed(record_of(all.cells[1], 9, 0.5).text());
    const std::string good = first + framed(record_of(all.cells[2], 9, 0.5).text());
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
        std::string bad = good;
        bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ 1 << bit % 8);
        RecordFile file(read_from(bad));
        std::string_view data;
        const std::string error = error_of([&] {
            while (file.next(data)) {
            }
        });
        CHECK(error.rfind("checksum of its ", 0) == 0);
        const bool second = bit / 8 >= first.size();
        CHECK(file.number() == second && file.offset() == (second ? first.size() : 0));
    }
}

TEST(a_truncated_file_is_named) {
    const std::string good = small_file();
    const size_t second = 16 + *reinterpret_cast<const uint64_t*>(good.data());
    CHECK(convert_error(good) == "");
    for (size_t size = 0; size < good.size(); ++size) {
        std::string error;
        RecordFile file(read_from(good.substr(0, size)));
        std::string_view data;
        error = error_of([&] {
            while (file.next(data)) {
            }
        });
        if (size != 0 && size < second) CHECK(contains(error, "the file ends inside its "));
    }
    CHECK(contains(convert_error(""), "holds no records"));
    CHECK(contains(convert_error(good.substr(0, 7)), "record 0 at byte 0: the file ends inside its length field"));
    CHECK(contains(convert_error(good.substr(0, second + 20)),
                   "record 1 at byte " + std::to_string(second) + ": the file ends inside its data"));
    CHECK(contains(convert_error("no TFRecord file at all"),
                   "record 0 at byte 0: checksum of its length is wrong (is this a TFRecord file?)"));
}

TEST(impossible_fields_are_named) {
    const Enumeration all = enumerate_cells(5);
    const Cell cell = all.cells[100];  // four vertices or more
    const RecordText good = record_of(cell, 10, 0.5);
    const auto error_after = [&](const std::function<void(RecordText&)>& change) {
        RecordText record = good;
        change(record);
        const std::string error = convert_error(framed(good.text()) + framed(record.text()));
        CHECK(error.empty() || contains(error, ": record 1 at byte "));
        return error;
    };
    const auto json_error = [&](const std::string& text) { return convert_error(framed(text)); };
    CHECK(error_after([](RecordText&) {}) == "");

    CHECK(contains(json_error("{}"), "'[' is missing"));
    CHECK(contains(json_error("[\"a\" 108]"), "',' is missing"));
    CHECK(contains(json_error("[\"a"), "a string does not end"));
    CHECK(contains(json_error("[\"a\\"), "a string does not end"));
    CHECK(contains(json_error("[\"a\\q\""), "a wrong escape"));
    CHECK(contains(json_error("[\"a\\u00g0\""), "a wrong escape"));
    CHECK(contains(json_error(std::string("[\"a\n\"")), "a control character"));
    CHECK(contains(json_error(good.text() + " 1"), "more follows"));
    CHECK(json_error(" [ \"" + good.text().substr(2)) == "");  // spaces are free
    // A hash may be spelled with escapes.
    CHECK(error_after([](RecordText& r) {
              r.hash = "\\u00" + [&] {
                  char code[3];
                  std::snprintf(code, sizeof code, "%02x", r.hash[0]);
                  return std::string(code);
              }() + r.hash.substr(1);
          }) == "");

    CHECK(contains(error_after([](RecordText& r) { r.epochs = "-1"; }), "epochs are no whole number"));
    CHECK(contains(error_after([](RecordText& r) { r.epochs = "1.5"; }), "epochs are no whole number"));
    CHECK(
        contains(error_after([](RecordText& r) { r.epochs = "99999999999999999999"; }), "epochs are no whole number"));
    CHECK(contains(error_after([](RecordText& r) { r.epochs = "0"; }), "epochs must be positive, got 0"));
    CHECK(contains(error_after([](RecordText& r) { r.hash.back() = 'G'; }), "is not 32 lower-case"));
    CHECK(contains(error_after([](RecordText& r) { r.hash[0] = r.hash[0] == '0' ? '1' : '0'; }),
                   "is not that of its graph, " + good.hash));
    CHECK(contains(error_after([](RecordText& r) { r.adjacency += '0'; }), "is no matrix of 2 to 7 vertices"));
    CHECK(contains(error_after([](RecordText& r) { r.adjacency = std::string(64, '0'); }), "is no matrix of 2 to 7"));
    CHECK(contains(error_after([](RecordText& r) { r.adjacency[1] = '2'; }), "more than zeros and ones"));
    CHECK(contains(error_after([](RecordText& r) { r.adjacency[0] = '1'; }), "is not upper triangular"));
    CHECK(contains(error_after([](RecordText& r) { r.adjacency = std::string(r.adjacency.size(), '0'); }),
                   "vertices on no path"));
    CHECK(contains(error_after([](RecordText& r) { r.operations += ",output"; }), "are not "));
    CHECK(contains(error_after([](RecordText& r) { r.operations = "x" + r.operations; }), "must begin with input"));
    CHECK(contains(error_after([](RecordText& r) { r.operations.replace(6, 4, "sepc"); }), "is unknown"));
    RecordText full = good;
    full.adjacency = "0111100111000110000100000";  // ten edges
    full.operations = "input,maxpool3x3,maxpool3x3,maxpool3x3,output";
    CHECK(contains(json_error(full.text()), "has more than 9 edges"));

    const auto metrics_error = [&](const std::string& metrics) {
        return error_after([&](RecordText& r) { r.metrics = metrics; });
    };
    const auto parameters = static_cast<uint64_t>(trainable_parameters(cell));
    const std::string halfway = evaluation({54, 5, 0.25, 0.125, 0.0625}), counted = "\x10" + varint(parameters);
    const std::string final = evaluation({108, 10, 0.5, 0.25, 0.125});
    CHECK(metrics_error(halfway + halfway + final + counted) == "");
    CHECK(contains(metrics_error(halfway + final + halfway + counted), "current_epoch 108.000000 is not about 54"));
    CHECK(contains(metrics_error(halfway + halfway + evaluation({108, 4, 0.5, 0.5, 0.5}) + counted),
                   "training_time falls"));
    CHECK(contains(metrics_error(halfway + halfway + counted), "metrics hold 2 evaluations; expected 3"));
    CHECK(contains(metrics_error(halfway + halfway + final + final + counted), "metrics hold 4 evaluations"));
    CHECK(contains(metrics_error(halfway + halfway + final), "no trainable_parameters"));
    CHECK(contains(metrics_error(halfway + halfway + evaluation({108, 10, 0.5, 0.5}) + counted),
                   "evaluation 2 (final) has no test_accuracy"));
    CHECK(contains(metrics_error(metrics(10, 0.1, parameters)), "is no float32 value"));
    CHECK(contains(metrics_error(metrics(10, 1.5, parameters)), "train_accuracy 1.5 is not within 0 and 1"));
    CHECK(contains(metrics_error(metrics(10, NAN, parameters)), "train_accuracy"));
    CHECK(contains(metrics_error(metrics(-1, 0.5, parameters)), "evaluation 1 (halfway): training_time -0.5"));
    CHECK(contains(metrics_error(metrics(INFINITY, 0.5, parameters)), "training_time inf is no time"));
    CHECK(contains(metrics_error(metrics(10, 0.5, 0)), "trainable_parameters 0 is not within"));
    CHECK(contains(metrics_error(metrics(10, 0.5, ~uint64_t{0})), "trainable_parameters -1 is not within"));
    CHECK(contains(metrics_error(metrics(10, 0.5, parameters + 1)), "differ from the " + std::to_string(parameters)));
    CHECK(contains(metrics_error(metrics(10, 0.5, parameters) + "\x0a"), "it ends inside a number"));
    CHECK(contains(metrics_error(metrics(10, 0.5, parameters) + "\x22\x05"), "it ends inside a field"));
    CHECK(contains(metrics_error(metrics(10, 0.5, parameters) + "\x23"), "impossible type"));
    CHECK(contains(metrics_error(metrics(10, 0.5, parameters) + std::string("\0", 1)), "impossible number"));
    CHECK(contains(metrics_error(metrics(10, 0.5, parameters) + "\x08\x01"), "evaluation_data is no message"));
    CHECK(contains(metrics_error("\x20" + std::string(11, '\xff')), "longer than 64 bits"));
    CHECK(metrics_error(metrics(10, 0.5, parameters) + "\x22\x01x\x28\x07\x35qqqq") == "");  // unknown fields
    CHECK(contains(metrics_error(""), "metrics are no base64"));

    std::string text = good.text();
    CHECK(contains(json_error(text.replace(text.size() - 6, 1, "*")), "metrics are no base64"));
    std::string many;
    for (int i = 0; i < 17; ++i) many += framed(good.text());
    CHECK(contains(convert_error(many), "a cell has 17 records of the same epochs"));
    many.clear();
    for (int i = 1; i < 18; ++i) {
        RecordText record = good;
        record.epochs = std::to_string(i);
        record.metrics =
            halfway + evaluation({i * 0.5, 5, 0.5, 0.5, 0.5}) + evaluation({i * 1.0, 10, 1, 1, 1}) + counted;
        many += framed(record.text());
    }
    CHECK(contains(convert_error(many), "more than 16 different numbers of epochs"));
    const uint64_t length = uint64_t{1} << 60;
    const uint32_t sum = masked_crc32c(&length, sizeof length);
    CHECK(contains(convert_error(bytes_of(&length, sizeof length) + bytes_of(&sum, sizeof sum) + "data"),
                   "is impossible (at most"));
}

// A bit of every byte: found when the table is opened, or at the latest by verify(); nothing wrong is ever answered.
TEST(a_flipped_bit_in_a_table_is_named) {
    const std::string good = table_bytes();
    const Enumeration all = enumerate_cells(4);
    const auto* bytes = reinterpret_cast<const uint8_t*>(good.data());
    const Table whole(bytes, good.size(), "table");
    for (size_t at = 0; at < good.size(); ++at) {
        std::vector<uint8_t> bad(bytes, bytes + good.size());
        bad[at] = static_cast<uint8_t>(bad[at] ^ 1 << at % 8);
        const std::string error = error_of([&] {
            const Table table(bad.data(), bad.size(), "table");
            CHECK(at >= kHeaderSize);
            CHECK(error_of([&] { table.find(all.cells[40]); }) != "" || table.find(all.cells[40]) == 1);
            CHECK(error_of([&] { table.values(2); }) != "" ||
                  std::equal(table.values(2), table.values(2) + 8, whole.values(2)));
            table.verify();
        });
        CHECK(contains(error, "table: "));
        if (at >= sizeof kTableMagic + 4) CHECK(contains(error, "checksum of "));
    }
    CHECK(contains(error_of([&] {
                       std::vector<uint8_t> bad(bytes, bytes + good.size());
                       bad[5000] ^= 1;
                       Table(bad.data(), bad.size(), "table").find(all.cells[40]);
                   }),
                   "table: checksum of block 0 (bytes 4096 to 20479) is wrong; the file is damaged"));
}

TEST(what_is_no_table_is_refused) {
    const std::string good = table_bytes();
    const auto open_error = [](const std::string& bytes) {
        const TemporaryFile file;
        file.write(bytes);
        return error_of([&] { Table::open(file.path); });
    };
    CHECK(open_error(good) == "");
    for (size_t size = 0; size < good.size(); size += 97) CHECK(open_error(good.substr(0, size)) != "");
    CHECK(open_error(good + "x") != "");
    CHECK(contains(open_error(""), "not a table of spos_fast"));
    CHECK(contains(open_error(small_file()), "not a table of spos_fast"));
    CHECK(contains(open_error(good.substr(0, 100)), "ends inside its header"));
    CHECK(contains(open_error(good.substr(0, good.size() - 1)), "its header says"));
    std::string newer = good;
    newer[8] = 2;
    CHECK(contains(open_error(newer), "table version 2; this program reads 1"));
    CHECK(contains(error_of([] { Table::open("/no/such/table"); }), "/no/such/table: could not be read (No such file"));
    CHECK(contains(error_of([] { Table::open("/tmp"); }), "/tmp: could not be read (Is a directory)"));
}

TEST(places_that_cannot_be_written) {
    const TemporaryFile from;
    from.write(small_file());
    CHECK(contains(error_of([&] { convert(from.path, "/no/such/folder/table", [] {}); }),
                   "/no/such/folder/table: could not be written (No such file or directory)"));
    CHECK(
        contains(error_of([&] { convert(from.path, "/tmp", [] {}); }), "/tmp: could not be written (Is a directory)"));
    CHECK(contains(error_of([&] { convert(from.path, from.path, [] {}); }), "is the file that is read"));
    CHECK(contains(error_of([&] { convert("/no/such/file", "/no/such/folder/table", [] {}); }), "/no/such/file"));
}

RUN_TESTS()
