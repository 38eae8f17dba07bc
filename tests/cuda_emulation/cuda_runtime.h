// Stands in for the CUDA toolkit's header of this name: the kernels compile as C++ and run on the CPU, one fibre per thread of a block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
    unsigned x, y, z;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {
constexpr int kWarp = 32, kMaxThreads = 1024, kSharedBytes = 48 << 10;
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
int thread();                  // number of the running thread in its block
void barrier();                // of the block
uint64_t exchange(uint64_t value, int mask);  // the value of the thread of the same warp whose number differs in these bits
extern uint64_t slots[kMaxThreads];           // for predicates
}  // namespace emulation

namespace m2m_stylegan::cuda {
extern unsigned char shared_memory[emulation::kSharedBytes];  // what `extern __shared__` in the kernels refers to
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    return emulation::run(*config, [&] { kernel(Params(args)...); });
}

inline void __syncthreads() { emulation::barrier(); }

inline int __syncthreads_and(int predicate) {
    emulation::slots[emulation::thread()] = predicate != 0;
    emulation::barrier();
    int all = 1;
    for (unsigned i = 0; i < blockDim.x; ++i) all &= static_cast<int>(emulation::slots[i]);
    emulation::barrier();
    return all;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = emulation::exchange(bits, mask);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline void __stwb(uint4* p, uint4 value) { *p = value; }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
