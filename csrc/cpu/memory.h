// Memory for vector code: it starts on a cache line, so that no pack lies across two.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace spos::cpu {

constexpr int64_t kLine = 64;  // bytes

inline void* allocate_lines(int64_t bytes) {
    void* memory = std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine + kLine);
    if (!memory) throw std::bad_alloc();
    return memory;
}

struct FreeMemory {
    void operator()(void* memory) const { std::free(memory); }
};
template <typename A>
using Scratch = std::unique_ptr<A[], FreeMemory>;

// Memory that is written before it is read.
template <typename A>
Scratch<A> scratch(int64_t size) {
    return Scratch<A>(static_cast<A*>(allocate_lines(size * sizeof(A))));
}

template <typename A>
struct LineAllocator {
    using value_type = A;
    LineAllocator() = default;
    template <typename B>
    LineAllocator(const LineAllocator<B>&) {}
    A* allocate(size_t size) { return static_cast<A*>(allocate_lines(size * sizeof(A))); }
    void deallocate(A* memory, size_t) { std::free(memory); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
template <typename A>
using Lines = std::vector<A, LineAllocator<A>>;

}  // namespace spos::cpu
