// MD5 (RFC 1321). The hash of NAS-Bench-101 is made of it; it protects nothing here.
#pragma once

#include <string>
#include <string_view>

namespace spos::cells {

// 32 lower-case hexadecimal digits.
std::string md5_hex(std::string_view message);

}  // namespace spos::cells
