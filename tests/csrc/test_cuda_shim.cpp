// The shim itself: what it must get right for the kernel tests to mean anything.

#include "check.h"
#include "kernels/cuda/launch.cuh"

namespace {

__global__ void sum_of_block(const int* in, int* out) {
    __shared__ int shared[256];
    const int t = threadIdx.y * blockDim.x + threadIdx.x, n = blockDim.x * blockDim.y;
    shared[t] = in[blockIdx.x * n + t];
    __syncthreads();
    for (int step = n / 2; step > 0; step /= 2) {
        if (t < step) shared[t] += shared[t + step];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = shared[0];
}

__global__ void shuffles(int* down, int* crossed, int* first) {
    const int lane = threadIdx.x % 32;
    down[threadIdx.x] = __shfl_down_sync(0xffffffffu, lane, 4);
    crossed[threadIdx.x] = __shfl_xor_sync(0xffffffffu, lane, 5);
    first[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 0);
}

__global__ void without_barrier(int* out) {
    __shared__ int shared[64];
    shared[threadIdx.x] = -1;
    __syncthreads();
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[63 - threadIdx.x];  // a race, on purpose
}

}  // namespace

TEST(barriers_and_blocks) {
    for (const bool backwards : {false, true}) {
        spos::shim::backwards = backwards;
        std::vector<int> in(3 * 256, 1), out(3);
        in[700] = 100;
        SPOS_LAUNCH(sum_of_block, dim3(3), dim3(64, 4), 0, nullptr, in.data(), out.data());
        CHECK(out[0] == 256 && out[1] == 256 && out[2] == 355);
    }
}

TEST(shuffles_reach_the_right_lanes) {
    std::vector<int> down(64), crossed(64), first(64);
    SPOS_LAUNCH(shuffles, dim3(1), dim3(64), 0, nullptr, down.data(), crossed.data(), first.data());
    for (int t = 0; t < 64; ++t) {
        const int lane = t % 32;
        CHECK(down[t] == (lane < 28 ? lane + 4 : lane) && crossed[t] == (lane ^ 5) && first[t] == t / 32 * 32);
    }
}

// Turning the order round is what shows a missing barrier.
TEST(a_race_shows) {
    std::vector<int> forwards(64), backwards(64);
    spos::shim::backwards = false;
    SPOS_LAUNCH(without_barrier, dim3(1), dim3(64), 0, nullptr, forwards.data());
    spos::shim::backwards = true;
    SPOS_LAUNCH(without_barrier, dim3(1), dim3(64), 0, nullptr, backwards.data());
    CHECK(forwards != backwards);
}

// All 16-bit patterns come back as they were, and what lies half way goes to the even neighbour.
TEST(floats_are_rounded_to_nearest) {
    for (uint32_t bits = 0; bits < 0x7c00; ++bits) {  // to 65504
        __half low, high;
        low.bits = static_cast<uint16_t>(bits), high.bits = static_cast<uint16_t>(bits + 1);
        const float value = __half2float(low);
        CHECK(__float2half_rn(value).bits == bits && __float2half_rn(-value).bits == (bits | 0x8000u));
        if (bits == 0x7bff) break;
        const float middle = value + (__half2float(high) - value) / 2;
        CHECK(__float2half_rn(middle).bits == (bits % 2 == 0 ? bits : bits + 1));
        CHECK(__float2half_rn(std::nextafter(middle, 1e9f)).bits == bits + 1);
        CHECK(__float2half_rn(std::nextafter(middle, 0.0f)).bits == bits);
    }
    CHECK(__float2half_rn(65520.0f).bits == 0x7c00 && __float2half_rn(1e30f).bits == 0x7c00);
    CHECK(std::isnan(__half2float(__float2half_rn(NAN))) && std::isnan(__bfloat162float(__float2bfloat16_rn(NAN))));
    CHECK(__float2bfloat16_rn(1.00390625f).bits == 0x3f80 && __float2bfloat16_rn(1.01171875f).bits == 0x3f82);
}

TEST(bad_launches_are_refused) {
    int out = 0;
    SPOS_LAUNCH(sum_of_block, dim3(1), dim3(2048), 0, nullptr, &out, &out);
    CHECK(spos::cuda::launch_error() != nullptr);
    CHECK(spos::cuda::launch_error() == nullptr);
}

RUN_TESTS()
