// CRC-32C (Castagnoli), the check of TFRecord files and of the table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spos::cells {

// By the instruction of SSE 4.2 where the processor has it. `crc` continues an earlier sum.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);

// The same without that instruction.
uint32_t crc32c_portable(const void* data, size_t size, uint32_t crc = 0);

// As TFRecord stores it, so that a sum over sums stays meaningful.
inline uint32_t masked_crc32c(const void* data, size_t size) {
    const uint32_t crc = crc32c(data, size);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

}  // namespace spos::cells
