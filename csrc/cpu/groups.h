// Groups: runs of images that lie one behind the other, each of which a kernel treats as a call of its own.
#pragma once

#include <cstdint>
#include <functional>

#include "csrc/cpu/parallel.h"

namespace spos::cpu {

// Bytes of a group's images up to which one thread's second-level cache holds what a unit makes of them.
constexpr int64_t kSmallGroup = 1 << 20;

// Calls run(group, pool) for every group. Large groups take turns, each on all threads. Small ones, which would wait
// for one another's threads at the end of every layer, go one to a thread; what is left over when every thread has had
// as many as the others takes turns again. A group's bits are the same either way, for they depend on no pool.
inline void for_each_group(int64_t groups, int64_t bytes, int64_t threads, const ParallelFor& parallel_for,
                           const std::function<void(int64_t group, const ParallelFor& pool)>& run) {
    const int64_t spread = bytes <= kSmallGroup && threads > 1 ? groups / threads * threads : 0;
    if (spread > 0)
        parallel_for(spread, [&](int64_t begin, int64_t end) {
            for (int64_t group = begin; group < end; ++group) run(group, run_serially);
        });
    for (int64_t group = spread; group < groups; ++group) run(group, parallel_for);
}

}  // namespace spos::cpu
