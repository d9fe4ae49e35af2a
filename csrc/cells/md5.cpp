#include "csrc/cells/md5.h"

#include <array>
#include <cstdint>
#include <cstring>

namespace spos::cells {
namespace {

// floor(2^32 * |sin(i + 1)|), RFC 1321 section 3.4.
constexpr std::array<uint32_t, 64> kSines = {
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391,
};
constexpr std::array<std::array<int, 4>, 4> kShifts = {
    {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}}};

uint32_t rotate_left(uint32_t value, int shift) {
    return value << shift | value >> (32 - shift);
}

void add_block(std::array<uint32_t, 4>& state, const unsigned char* block) {
    uint32_t words[16];
    for (int i = 0; i < 16; ++i)
        words[i] = block[4 * i] | block[4 * i + 1] << 8 | block[4 * i + 2] << 16 |
                   static_cast<uint32_t>(block[4 * i + 3]) << 24;
    auto [a, b, c, d] = state;
    for (int i = 0; i < 64; ++i) {
        const int round = i / 16;
        uint32_t mixed;
        int word;
        if (round == 0) {
            mixed = (b & c) | (~b & d), word = i;
        } else if (round == 1) {
            mixed = (d & b) | (~d & c), word = (5 * i + 1) % 16;
        } else if (round == 2) {
            mixed = b ^ c ^ d, word = (3 * i + 5) % 16;
        } else {
            mixed = c ^ (b | ~d), word = 7 * i % 16;
        }
        const uint32_t turned = rotate_left(a + mixed + kSines[i] + words[word], kShifts[round][i % 4]);
        a = d, d = c, c = b, b += turned;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
}

}  // namespace

std::string md5_hex(std::string_view message) {
    std::array<uint32_t, 4> state = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    const auto* bytes = reinterpret_cast<const unsigned char*>(message.data());
    size_t done = 0;
    for (; message.size() - done >= 64; done += 64) add_block(state, bytes + done);

    // The tail: what is left, a one bit, zeros, and the length in bits as 64-bit little endian.
    unsigned char tail[128] = {};
    const size_t rest = message.size() - done;
    if (rest > 0) std::memcpy(tail, bytes + done, rest);
    tail[rest] = 0x80;
    const size_t tail_size = rest < 56 ? 64 : 128;
    const uint64_t bits = static_cast<uint64_t>(message.size()) * 8;
    for (int i = 0; i < 8; ++i) tail[tail_size - 8 + i] = static_cast<unsigned char>(bits >> (8 * i));
    for (size_t at = 0; at < tail_size; at += 64) add_block(state, tail + at);

    std::string hex;
    hex.reserve(32);
    for (uint32_t word : state)
        for (int byte = 0; byte < 4; ++byte, word >>= 8) {
            hex += "0123456789abcdef"[word >> 4 & 15];
            hex += "0123456789abcdef"[word & 15];
        }
    return hex;
}

}  // namespace spos::cells
