// Memory that is kept between calls.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "csrc/cpu/memory.h"

namespace {

using namespace spos::cpu;

bool starts_on(const void* memory, int64_t unit) {
    return reinterpret_cast<uintptr_t>(memory) % unit == 0;
}

// Taken, written to the last byte.
void* written(int64_t bytes) {
    void* memory = take_memory(bytes);
    std::memset(memory, 1, bytes);
    return memory;
}

}  // namespace

// Vector code counts on lines, huge pages need their own alignment.
TEST(blocks_are_aligned) {
    for (const int64_t bytes : {int64_t(1), int64_t(100), kLargeBlock - 1}) {
        void* memory = written(bytes);
        CHECK(starts_on(memory, 64));
        give_back_memory(memory, bytes);
    }
    for (const int64_t bytes : {kLargeBlock, kLargeBlock + 1, 3 * kLargeBlock + 5}) {
        void* memory = written(bytes);
        CHECK(starts_on(memory, kLargeBlock));
        give_back_memory(memory, bytes);
    }
}

// The next call gets the same pages; so does one that asks for a little less, but nothing much smaller.
TEST(blocks_are_used_again) {
    const int64_t bytes = 20 * kLargeBlock - 7;
    void* memory = written(bytes);
    give_back_memory(memory, bytes);
    void* less = written(11 * kLargeBlock);
    CHECK(less == memory);
    give_back_memory(less, 11 * kLargeBlock);
    void* little = written(9 * kLargeBlock);
    CHECK(little != memory);
    void* again = written(bytes);  // whole, although less was given back
    CHECK(again == memory);
    void* other = written(bytes);
    CHECK(other != memory);
    for (void* each : {again, other}) give_back_memory(each, bytes);
    give_back_memory(little, 9 * kLargeBlock);
}

// A block larger than all that may be kept goes back to the system; others still are kept then.
TEST(no_more_is_kept_than_allowed) {
    void* kept = written(5 * kLargeBlock);
    give_back_memory(kept, 5 * kLargeBlock);
    const int64_t huge = kMostKept + kLargeBlock;
    void* memory = take_memory(huge);
    give_back_memory(memory, huge);
    void* again = take_memory(5 * kLargeBlock);
    CHECK(again == kept);
    give_back_memory(again, 5 * kLargeBlock);
    // Blocks of half the limit: of three, at most two are kept.
    std::vector<void*> halves;
    for (int i = 0; i < 3; ++i) halves.push_back(take_memory(kMostKept / 2));
    for (void* half : halves) give_back_memory(half, kMostKept / 2);
    void* first = take_memory(5 * kLargeBlock);
    CHECK(first == kept);  // the largest make room
    give_back_memory(first, 5 * kLargeBlock);
}

// Threads take and give back at once; a block never has two owners.
TEST(threads_share_them) {
    std::vector<std::thread> threads;
    std::vector<int> wrong(4);
    for (int mine = 0; mine < 4; ++mine)
        threads.emplace_back([&wrong, mine] {
            for (int round = 0; round < 50; ++round) {
                const int64_t bytes = (1 + (round + mine) % 3) * kLargeBlock;
                auto* memory = static_cast<unsigned char*>(take_memory(bytes));
                std::memset(memory, mine, bytes);
                std::this_thread::yield();
                for (int64_t at = 0; at < bytes; at += 4096) wrong[mine] += memory[at] != mine;
                give_back_memory(memory, bytes);
            }
        });
    for (std::thread& thread : threads) thread.join();
    for (const int count : wrong) CHECK(count == 0);
}

RUN_TESTS()
