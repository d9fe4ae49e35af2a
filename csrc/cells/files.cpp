#include "csrc/cells/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "csrc/cells/error.h"

namespace spos::cells {
namespace {

InputError unreadable(const std::string& path, int error) {
    return InputError(path + ": could not be read (" + std::strerror(error) + ")");
}

struct OpenFile {
    explicit OpenFile(const std::string& path) : path(path), file(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (file < 0) throw unreadable(path, errno);
        struct stat status;
        if (::fstat(file, &status) == 0 && !S_ISDIR(status.st_mode)) return;
        ::close(file);
        throw unreadable(path, EISDIR);
    }
    ~OpenFile() { ::close(file); }
    OpenFile(const OpenFile&) = delete;
    OpenFile& operator=(const OpenFile&) = delete;

    std::string path;
    int file;
};

std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

Read reader_of(const std::string& path) {
    const auto file = std::make_shared<OpenFile>(path);
    return [file](void* into, size_t size) {
        size_t done = 0;
        while (done < size) {
            const ssize_t got = ::read(file->file, static_cast<char*>(into) + done, size - done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) throw unreadable(file->path, errno);
            if (got == 0) break;
            done += static_cast<size_t>(got);
        }
        return done;
    };
}

bool same_file(const std::string& a, const std::string& b) {
    struct stat first, second;
    return ::stat(a.c_str(), &first) == 0 && ::stat(b.c_str(), &second) == 0 && first.st_dev == second.st_dev &&
           first.st_ino == second.st_ino;
}

MappedFile::MappedFile(const std::string& path) {
    const OpenFile file(path);
    struct stat status;
    if (::fstat(file.file, &status) != 0) throw unreadable(path, errno);
    if (!S_ISREG(status.st_mode)) throw InputError(path + ": is no regular file");
    size_ = static_cast<size_t>(status.st_size);
    if (size_ == 0) return;  // nothing can be mapped, and whoever wanted a header finds none
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.file, 0);
    if (mapped == MAP_FAILED) throw unreadable(path, errno);
    data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
}

WholeFile::WholeFile(const std::string& path) : path_(path) {
    const size_t slash = path.rfind('/');
    const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
    struct stat status;
    const bool exists = ::stat(path.c_str(), &status) == 0;
    if (name.empty() || (exists && S_ISDIR(status.st_mode))) fail(EISDIR);
    if (exists && !S_ISREG(status.st_mode)) throw InputError(path + ": is no regular file; name another one");
    // A name that nobody else uses: another thread, or a process of the same number in another container.
    const std::string prefix = folder_of(path) + "/." + name + "." + std::to_string(::getpid()) + ".";
    for (int attempt = 0; file_ < 0 && attempt < 1000; ++attempt) {
        temporary_ = prefix + std::to_string(attempt) + ".spos_fast_tmp";
        file_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (file_ < 0 && errno != EEXIST) fail(errno);
    }
    if (file_ < 0) fail(EEXIST);
}

WholeFile::~WholeFile() {
    if (file_ < 0) return;
    ::close(file_);
    ::unlink(temporary_.c_str());
}

void WholeFile::fail(int error) const {
    throw InputError(path_ + ": could not be written (" + std::strerror(error) + ")");
}

void WholeFile::write(uint64_t offset, const void* data, size_t size) {
    const auto* bytes = static_cast<const char*>(data);
    while (size > 0) {
        const ssize_t done = ::pwrite(file_, bytes, size, static_cast<off_t>(offset));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) fail(errno);
        bytes += done, offset += static_cast<uint64_t>(done), size -= static_cast<size_t>(done);
    }
}

void WholeFile::commit() {
    if (::fsync(file_) != 0) fail(errno);
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(errno);
    ::close(file_);
    file_ = -1;
    // The new name reaches the disk with its folder. The file is whole either way, so a folder that cannot be synced
    // (some network file systems) is no error.
    const int folder = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    ::fsync(folder);
    ::close(folder);
}

}  // namespace spos::cells
