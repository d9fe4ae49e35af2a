// The thread pool as CPU kernels see it: handed in, so that they neither know torch nor start threads.
#pragma once

#include <cstdint>
#include <functional>

namespace spos::cpu {

// Calls body(begin, end) for ranges that together cover [0, tasks). Kernels fix their tasks by the shape alone, so
// the number of threads never changes a result.
using ParallelFor = std::function<void(int64_t tasks, const std::function<void(int64_t, int64_t)>& body)>;

inline void run_serially(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
    body(0, tasks);
}

}  // namespace spos::cpu
