// The one exception that leaves csrc/cells for what a user gave: a damaged file, an impossible cell, a full disk.
#pragma once

#include <stdexcept>

namespace spos::cells {

// The message is one line.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace spos::cells
