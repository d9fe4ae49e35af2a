// Runs CUDA kernels on the CPU, from the same source that nvcc compiles: g++ -include tests/csrc/cuda_shim.h kernel.cu
//
// Blocks run one after another. The threads of a block are fibres, switched at __syncthreads and at shuffles only, in a
// fixed order that a test can turn round (spos::shim::backwards): where a barrier is missing, the two orders disagree.
// A barrier that some threads skip, or a deadlock, ends the program with a message. It shows that a kernel computes the
// right thing; how fast, and whether a GPU's memory model bites, it cannot show.
#pragma once
#define SPOS_CUDA_SHIM

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "csrc/dtype.h"

// --- The language ---
#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time, so one copy is enough
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr uint64_t size() const { return static_cast<uint64_t>(x) * y * z; }
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // threadIdx is set anew at each switch

// --- The runtime, as far as launchers use it ---
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
typedef void* cudaStream_t;

namespace spos::shim {
inline cudaError_t last_error = cudaSuccess;
inline bool backwards = false;  // resume the threads of a block from the last to the first
}  // namespace spos::shim

inline cudaError_t cudaGetLastError() {
    return std::exchange(spos::shim::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

// --- 16-bit floats ---
struct __half : spos::Half {};
struct __nv_bfloat16 : spos::BFloat16 {};
inline float __half2float(__half value) {
    return spos::widen(static_cast<spos::Half>(value));
}
inline float __bfloat162float(__nv_bfloat16 value) {
    return spos::widen(static_cast<spos::BFloat16>(value));
}
// To nearest, ties to even, as the GPU rounds.
inline __half __float2half_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fffu;
    } else if (magnitude < 0x38800000u) {
        // Below the normal halves: adding 0.5 leaves the multiple of 2^-24 in the lowest bits of the sum.
        float small;
        std::memcpy(&small, &magnitude, sizeof small);
        small += 0.5f;
        std::memcpy(&half, &small, sizeof half);
        half -= 0x3f000000u;
    } else {
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
        if (half > 0x7c00u) half = 0x7c00u;
    }
    __half result;
    result.bits = static_cast<uint16_t>(sign | half);
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    __nv_bfloat16 result;
    result.bits = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    return result;
}

// --- Threads ---
namespace spos::shim {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_shim: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
    std::abort();
}

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fibre {
    // ucontext starts a fibre; setjmp switches it from then on, for it makes no system calls.
    ucontext_t context;
    jmp_buf registers;
    std::unique_ptr<char[]> stack;
    dim3 index;
    State state;
    int shuffles;
};

struct Warp {
    // Two sets by turns: a lane may go on to its next shuffle while others still read the last one.
    unsigned char slot[2][kWarp][16];
};

inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline size_t running, threads;
inline jmp_buf scheduler;
inline std::function<void()> kernel_body;

inline void wait(State state) {
    Fibre& self = fibres[running];
    self.state = state;
    if (_setjmp(self.registers) == 0) _longjmp(scheduler, 1);
}

// A fibre outlives its block and takes the same place in the next one.
inline void enter() {
    for (;;) {
        kernel_body();
        wait(State::done);
    }
}

__attribute__((noinline)) inline void resume(Fibre& fibre) {
    if (_setjmp(scheduler) != 0) return;
    if (fibre.stack) _longjmp(fibre.registers, 1);
    fibre.stack.reset(new char[kStackBytes]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
    setcontext(&fibre.context);
}

inline bool all_in(size_t begin, size_t end, State state) {
    return std::all_of(fibres.begin() + begin, fibres.begin() + end, [&](const Fibre& f) { return f.state == state; });
}

inline void set_all(size_t begin, size_t end, State state) {
    for (size_t t = begin; t < end; ++t) fibres[t].state = state;
}

inline void run_block() {
    for (size_t t = 0; t < threads; ++t) {
        Fibre& fibre = fibres[t];
        const unsigned x = t % blockDim.x, y = t / blockDim.x % blockDim.y;
        fibre.index = dim3(x, y, t / blockDim.x / blockDim.y);
        fibre.state = State::ready;
        fibre.shuffles = 0;
    }
    while (!all_in(0, threads, State::done)) {
        for (size_t i = 0; i < threads; ++i) {
            running = backwards ? threads - 1 - i : i;
            if (fibres[running].state != State::ready) continue;
            threadIdx = fibres[running].index;
            resume(fibres[running]);
        }
        bool released = false;
        for (size_t first = 0; first < threads; first += kWarp) {
            const size_t last = std::min(first + kWarp, threads);
            if (!all_in(first, last, State::at_shuffle)) continue;
            set_all(first, last, State::ready);
            released = true;
        }
        if (all_in(0, threads, State::at_barrier)) {
            set_all(0, threads, State::ready);
            released = true;
        }
        if (!released && !all_in(0, threads, State::done))
            fail("some threads wait at a barrier or a shuffle that others never reach");
    }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
    if (block.size() == 0 || block.size() > 1024 || grid.size() == 0 || grid.y > 65535 || grid.z > 65535) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    threads = block.size();
    if (fibres.size() < threads) fibres.resize(threads);
    warps.resize((threads + kWarp - 1) / kWarp);
    kernel_body = body;
    gridDim = grid, blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block();
            }
}

// What lane `source` of the warp brought; a lane outside of the warp stands for the caller itself, as on the GPU.
template <typename T>
T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 16);
    if (mask != 0xffffffffu) fail("only shuffles of the whole warp are known here");
    const int lane = running % kWarp;
    Warp& warp = warps[running / kWarp];
    auto& slot = warp.slot[fibres[running].shuffles++ % 2];
    std::memcpy(slot[lane], &value, sizeof value);
    wait(State::at_shuffle);
    if (source >= 0 && source < kWarp && running / kWarp * kWarp + source < threads)
        std::memcpy(&value, slot[source], sizeof value);
    return value;
}

inline int lane() {
    return running % kWarp;
}

}  // namespace spos::shim

inline void __syncthreads() {
    spos::shim::wait(spos::shim::State::at_barrier);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    spos::shim::exchange(mask, 0, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return spos::shim::exchange(mask, value, source % spos::shim::kWarp);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
    return spos::shim::exchange(mask, value, spos::shim::lane() + by);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
    return spos::shim::exchange(mask, value, spos::shim::lane() - by);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
    return spos::shim::exchange(mask, value, spos::shim::lane() ^ by);
}

#define SPOS_LAUNCH(kernel, grid, block, shared, stream, ...) \
    (static_cast<void>(shared), static_cast<void>(stream),    \
     spos::shim::launch(grid, block, [&] { (kernel)(__VA_ARGS__); }))
