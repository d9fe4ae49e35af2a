// Memory for vector code: it starts on a cache line, so that no pack lies across two. Large blocks come in huge pages
// and are kept between calls, for the first touch of fresh pages can cost as much as the kernel that touches them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace spos::cpu {

// Blocks of this size or more are kept when they are given back, up to kMostKept bytes in a process.
constexpr int64_t kLargeBlock = 2 << 20;
constexpr int64_t kMostKept = 512 << 20;

void* take_memory(int64_t bytes);
void give_back_memory(void* memory, int64_t bytes);  // as many as were taken

struct GiveBack {
    int64_t bytes = 0;
    void operator()(void* memory) const { give_back_memory(memory, bytes); }
};
template <typename A>
using Scratch = std::unique_ptr<A[], GiveBack>;

// Memory that is written before it is read.
template <typename A>
Scratch<A> scratch(int64_t size) {
    const int64_t bytes = size * sizeof(A);
    return Scratch<A>(static_cast<A*>(take_memory(bytes)), GiveBack{bytes});
}

template <typename A>
struct LineAllocator {
    using value_type = A;
    LineAllocator() = default;
    template <typename B>
    LineAllocator(const LineAllocator<B>&) {}
    A* allocate(size_t size) { return static_cast<A*>(take_memory(size * sizeof(A))); }
    void deallocate(A* memory, size_t size) { give_back_memory(memory, size * sizeof(A)); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
template <typename A>
using Lines = std::vector<A, LineAllocator<A>>;

}  // namespace spos::cpu
