#include "csrc/cpu/memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace spos::cpu {
namespace {

constexpr int64_t kLine = 64;

// Blocks that wait for their next use, by size. Never destroyed: a tensor may outlive everything static.
struct Kept {
    std::mutex mutex;
    std::multimap<int64_t, void*> blocks;
    int64_t bytes = 0;
};
Kept& kept() {
    static Kept& instance = *new Kept;
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
    const int64_t size = rounded(bytes, kLargeBlock);
    {
        const std::lock_guard<std::mutex> lock(kept().mutex);
        const auto found = kept().blocks.find(size);
        if (found != kept().blocks.end()) {
            void* memory = found->second;
            kept().blocks.erase(found);
            kept().bytes -= size;
            return memory;
        }
    }
    void* memory = allocate(kLargeBlock, size);
#ifdef __linux__
    madvise(memory, size, MADV_HUGEPAGE);  // advice: where there are none, small pages do
#endif
    return memory;
}

void give_back_memory(void* memory, int64_t bytes) {
    const int64_t size = rounded(bytes, kLargeBlock);
    if (bytes >= kLargeBlock && size <= kMostKept) {
        const std::lock_guard<std::mutex> lock(kept().mutex);
        // Sizes that nobody asks for any more make room, the largest first.
        while (kept().bytes + size > kMostKept && !kept().blocks.empty()) {
            const auto largest = std::prev(kept().blocks.end());
            std::free(largest->second);
            kept().bytes -= largest->first;
            kept().blocks.erase(largest);
        }
        kept().blocks.emplace(size, memory);
        kept().bytes += size;
        return;
    }
    std::free(memory);
}

}  // namespace spos::cpu
