// The name of a cell: an MD5 digest, 16 bytes, shown as 32 hexadecimal digits.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

namespace spos::cells {

using Digest = std::array<uint8_t, 16>;

// 32 characters, without a zero behind them.
inline void write_hex(const Digest& digest, char* hex) {
    for (size_t i = 0; i < digest.size(); ++i) {
        hex[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
}

inline std::string to_hex(const Digest& digest) {
    std::string hex(32, '0');
    write_hex(digest, hex.data());
    return hex;
}

// Nothing unless `hex` is 32 lower-case hexadecimal digits.
inline std::optional<Digest> from_hex(std::string_view hex) {
    if (hex.size() != 32) return std::nullopt;
    Digest digest = {};
    for (size_t i = 0; i < 32; ++i) {
        const char c = hex[i];
        const bool digit = c >= '0' && c <= '9';
        if (!digit && !(c >= 'a' && c <= 'f')) return std::nullopt;
        digest[i / 2] = static_cast<uint8_t>(digest[i / 2] << 4 | (digit ? c - '0' : c - 'a' + 10));
    }
    return digest;
}

// Digests are evenly spread, so any part of one addresses a table.
inline uint64_t first_half(const Digest& digest) {
    uint64_t half;
    std::memcpy(&half, digest.data(), sizeof half);
    return half;
}

}  // namespace spos::cells
