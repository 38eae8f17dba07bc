// Sums in a fixed order: the same bits for the same input on every run.
#pragma once

#include "common.cuh"

namespace m2m_stylegan::cuda {

// Sum over each aligned group of `lanes` threads of a warp, a power of two; every thread gets it. All threads of the warp take part.
template <typename A>
__device__ A warp_sum(A v, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// Sum over the block; its first thread gets it. All threads take part.
template <typename A>
__device__ A block_sum(A v) {
    A* memory = shared<A>();  // kBlockSumBytes
    v = warp_sum(v, kWarp);
    if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = v;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kThreads / kWarp; ++warp) v += memory[warp];
    __syncthreads();
    return v;
}

template <typename A>
constexpr size_t kBlockSumBytes = kThreads / kWarp * sizeof(A);

}  // namespace m2m_stylegan::cuda
