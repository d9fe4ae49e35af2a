#include "csrc/cpu/memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace spos::cpu {
namespace {

constexpr int64_t kLine = 64;

// Large blocks: those that wait for their next use, by size, and the sizes of those in use. Never destroyed: a tensor
// may outlive everything static.
struct Blocks {
    std::mutex mutex;
    std::multimap<int64_t, void*> kept;
    std::unordered_map<void*, int64_t> taken;
    int64_t bytes = 0;  // kept
};
Blocks& blocks() {
    static Blocks& instance = *new Blocks;
    return instance;
}

int64_t rounded(int64_t bytes, int64_t unit) {
    return (bytes + unit - 1) / unit * unit;
}

void* allocate(int64_t alignment, int64_t bytes) {
    void* memory = std::aligned_alloc(alignment, bytes);
    if (!memory) throw std::bad_alloc();
    return memory;
}

}  // namespace

void* take_memory(int64_t bytes) {
    if (bytes < kLargeBlock) return allocate(kLine, rounded(bytes + 1, kLine));
    int64_t size = rounded(bytes, kLargeBlock);
    Blocks& all = blocks();
    const std::lock_guard<std::mutex> lock(all.mutex);
    void* memory = nullptr;
    // Sizes that are near share blocks: what waits is of no use to anybody else.
    const auto found = all.kept.lower_bound(size);
    if (found != all.kept.end() && found->first <= 2 * size) {
        size = found->first;
        memory = found->second;
        all.kept.erase(found);
        all.bytes -= size;
    } else {
        memory = allocate(kLargeBlock, size);
#ifdef __linux__
        madvise(memory, size, MADV_HUGEPAGE);  // advice: where there are none, small pages do
#endif
    }
    all.taken.emplace(memory, size);
    return memory;
}

void give_back_memory(void* memory, int64_t bytes) {
    if (bytes < kLargeBlock) return std::free(memory);
    Blocks& all = blocks();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.taken.find(memory);
    const int64_t size = found->second;
    all.taken.erase(found);
    if (size > kMostKept) return std::free(memory);
    // Sizes that nobody asks for any more make room, the largest first.
    while (all.bytes + size > kMostKept) {
        const auto largest = std::prev(all.kept.end());
        std::free(largest->second);
        all.bytes -= largest->first;
        all.kept.erase(largest);
    }
    all.kept.emplace(size, memory);
    all.bytes += size;
}

}  // namespace spos::cpu
