// Records of the official file, made in C++.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "csrc/cells/crc32c.h"
#include "csrc/cells/hash.h"
#include "csrc/cells/record.h"

namespace spos::test {

inline std::string bytes_of(const void* data, size_t size) {
    return {static_cast<const char*>(data), size};
}

// One record with its frame.
inline std::string framed(const std::string& data) {
    const uint64_t length = data.size();
    const uint32_t head = cells::masked_crc32c(&length, sizeof length);
    const uint32_t foot = cells::masked_crc32c(data.data(), data.size());
    return bytes_of(&length, sizeof length) + bytes_of(&head, sizeof head) + data + bytes_of(&foot, sizeof foot);
}

// MIME base64 as a JSON string holds it: the line breaks are escaped.
inline std::string base64_of(const std::string& bytes) {
    static const char* kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        uint32_t group = 0;
        for (size_t j = 0; j < 3; ++j)
            group = group << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0);
        for (size_t j = 0; j < 4; ++j) text += i + j > bytes.size() ? '=' : kDigits[group >> (18 - 6 * j) & 63];
        if (i % 57 == 54 || i + 3 >= bytes.size()) text += "\\n";
    }
    return text;
}

struct RecordText {
    std::string hash, epochs = "108", adjacency, operations, metrics;
    std::string text() const {
        return "[\"" + hash + "\", " + epochs + ", \"" + adjacency + "\", \"" + operations + "\", \"" +
               base64_of(metrics) + "\"]";
    }
};

inline std::string evaluation(const std::vector<double>& values) {
    std::string fields;
    for (size_t i = 0; i < values.size(); ++i)
        fields += static_cast<char>((i + 1) << 3 | 1) + bytes_of(&values[i], sizeof values[i]);
    return std::string("\x0a") + static_cast<char>(fields.size()) + fields;
}

inline std::string varint(uint64_t value) {
    std::string text;
    for (; value > 127; value >>= 7) text += static_cast<char>(value | 128);
    return text + static_cast<char>(value);
}

inline std::string metrics(double time, double accuracy, uint64_t parameters) {
    return evaluation({0, 0, 0.25, 0.25, 0.25}) + evaluation({54, time / 2, accuracy / 2, accuracy / 4, accuracy / 8}) +
           evaluation({108, time, accuracy, accuracy / 2, accuracy / 4}) + "\x10" + varint(parameters);
}

inline RecordText record_of(const cells::Cell& cell, double time, double accuracy) {
    static const char* kNames[] = {"conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"};
    const int n = cell.vertices;
    cells::Digest hash;
    cells::hash_cells(&cell, 1, &hash);
    RecordText record;
    record.hash = cells::to_hex(hash);
    for (int x = 0; x < n; ++x)
        for (int y = 0; y < n; ++y) record.adjacency += cell.edge(x, y) ? '1' : '0';
    for (int v = 0; v < n; ++v)
        record.operations += v == 0 ? "input" : v == n - 1 ? ",output" : std::string(",") + kNames[cell.op(v)];
    record.metrics = metrics(time, accuracy, static_cast<uint64_t>(cells::trainable_parameters(cell)));
    return record;
}

}  // namespace spos::test
