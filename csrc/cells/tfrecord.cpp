#include "csrc/cells/tfrecord.h"

#include <cstring>
#include <string>

#include "csrc/cells/crc32c.h"
#include "csrc/cells/error.h"

namespace spos::cells {
namespace {

constexpr size_t kHead = 12, kFoot = 4;

template <typename T>
T load(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

}  // namespace

RecordFile::RecordFile(Read read, size_t buffer) : read_(std::move(read)), buffer_(buffer) {}

size_t RecordFile::fill(size_t size) {
    if (end_ - begin_ < size) {
        std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
        end_ -= begin_;
        begin_ = 0;
        end_ += read_(buffer_.data() + end_, buffer_.size() - end_);
    }
    return end_ - begin_;
}

bool RecordFile::next(std::string_view& data) {
    ++number_;
    offset_ = next_offset_;
    const size_t head = fill(kHead);
    if (head == 0) return false;
    const std::string hint = number_ == 0 ? " (is this a TFRecord file?)" : "";
    if (head < kHead) throw InputError("the file ends inside its length field" + hint);
    const char* at = buffer_.data() + begin_;
    if (load<uint32_t>(at + 8) != masked_crc32c(at, 8)) throw InputError("checksum of its length is wrong" + hint);
    const auto length = load<uint64_t>(at);
    if (length > kLongest)
        throw InputError("its length of " + std::to_string(length) + " bytes is impossible (at most " +
                         std::to_string(kLongest) + ")");
    if (fill(kHead + length + kFoot) < kHead + length + kFoot) throw InputError("the file ends inside its data");
    at = buffer_.data() + begin_ + kHead;
    if (load<uint32_t>(at + length) != masked_crc32c(at, length)) throw InputError("checksum of its data is wrong");
    data = std::string_view(at, length);
    begin_ += kHead + length + kFoot;
    next_offset_ += kHead + length + kFoot;
    return true;
}

}  // namespace spos::cells
