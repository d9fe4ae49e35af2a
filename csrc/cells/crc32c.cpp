#include "csrc/cells/crc32c.h"

#include <array>
#include <cstring>

namespace spos::cells {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
    std::array<uint32_t, 256> table = {};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);  // the polynomial, reflected
        table[byte] = crc;
    }
    return table;
}
constexpr std::array<uint32_t, 256> kTable = make_table();

#ifdef __x86_64__
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const void* data, size_t size, uint32_t crc) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    uint64_t sum = ~crc, word;
    for (; size >= 8; size -= 8, bytes += 8) {
        std::memcpy(&word, bytes, 8);
        sum = __builtin_ia32_crc32di(sum, word);
    }
    auto rest = static_cast<uint32_t>(sum);
    for (; size > 0; --size, ++bytes) rest = __builtin_ia32_crc32qi(rest, *bytes);
    return ~rest;
}
#endif

}  // namespace

uint32_t crc32c_portable(const void* data, size_t size, uint32_t crc) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    crc = ~crc;
    for (; size > 0; --size, ++bytes) crc = crc >> 8 ^ kTable[(crc ^ *bytes) & 0xff];
    return ~crc;
}

uint32_t crc32c(const void* data, size_t size, uint32_t crc) {
#ifdef __x86_64__
    static const bool in_hardware = __builtin_cpu_supports("sse4.2");
    if (in_hardware) return crc32c_sse42(data, size, crc);
#endif
    return crc32c_portable(data, size, crc);
}

}  // namespace spos::cells
