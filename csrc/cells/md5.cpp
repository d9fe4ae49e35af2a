#include "csrc/cells/md5.h"

#include <array>
#include <cstdint>
#include <cstring>

#include "csrc/cells/md5_constants.h"

namespace spos::cells {
namespace {

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
        const uint32_t mixed = round == 0   ? (b & c) | (~b & d)
                               : round == 1 ? (d & b) | (~d & c)
                               : round == 2 ? b ^ c ^ d
                                            : c ^ (b | ~d);
        const uint32_t turned = rotate_left(a + mixed + kMd5Sines[i] + words[md5_word(i)], kMd5Shifts[round][i % 4]);
        a = d, d = c, c = b, b += turned;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
}

}  // namespace

std::string md5_hex(std::string_view message) {
    std::array<uint32_t, 4> state = {kMd5Start[0], kMd5Start[1], kMd5Start[2], kMd5Start[3]};
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
