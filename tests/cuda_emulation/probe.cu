#include "probe.h"

#include "common.cuh"

namespace m2m_stylegan::cuda {
namespace {

// y = x in reverse, through shared memory; count is the number of threads.
__global__ void probe_kernel(const float* x, float* y, int count, int fault) {
    float* memory = shared<float>();
    const int i = threadIdx.x;
    memory[i] = x[fault == kReadPastEnd ? i + 1 : i];
    if (fault == kSharedPastEnd) memory[i + 1] = 0;
    if (fault == kBarrierInBranch ? i > 3 : fault != kMissingBarrier) __syncthreads();
    if (fault == kMisaligned && i == 0) {
        store(y + 1, load<4>(x));
    } else {
        y[fault == kWriteBeforeStart ? i - 1 : i] = memory[count - 1 - i];
    }
}

}  // namespace
}  // namespace m2m_stylegan::cuda

int emulation_probe(const float* x, float* y, int count, int fault) {
    using namespace m2m_stylegan::cuda;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, fault == kGridTooLarge ? 1 << 16 : 1);
    config.blockDim = dim3(count);
    config.dynamicSmemBytes = count * sizeof(float);
    return cudaLaunchKernelEx(&config, probe_kernel, x, y, count, fault);
}
