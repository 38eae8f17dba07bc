// What the kernels share: dtypes, 16-byte vectors, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

namespace m2m_stylegan::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxSamples = 1024;  // that blocks are started for; each loops over the samples that are this far apart

// Arithmetic runs in double for double and in float for everything else; results are rounded once.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__host__ __device__ inline float to_acc(__half v) { return __half2float(v); }
__host__ __device__ inline float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__host__ __device__ inline float to_acc(float v) { return v; }
__host__ __device__ inline double to_acc(double v) { return v; }

template <typename T>
__host__ __device__ T from_acc(acc_t<T> v) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(v);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(v);
    } else {
        return v;
    }
}

// A load or store of up to 16 bytes in one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
    T v[V];
};

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <int V, typename T>
__device__ Vec<T, V> load(const T* p) {
    return *reinterpret_cast<const Vec<T, V>*>(p);
}

template <typename T, int V>
__device__ void store(T* p, const Vec<T, V>& value) {
    if constexpr (sizeof(value) == sizeof(uint4)) {  // nvcc makes several stores of an assignment if the elements are computed one by one.
        uint4 bits;
        memcpy(&bits, &value, sizeof(bits));
        __stwb(reinterpret_cast<uint4*>(p), bits);
    } else {
        *reinterpret_cast<Vec<T, V>*>(p) = value;
    }
}

// `count` small operands from p, or `otherwise` if there are none; p is aligned if count > 1.
template <int count, typename A>
__device__ void load_small(A (&out)[count], const A* p, int64_t start, A otherwise) {
    constexpr int step = count < kVector<A> ? count : kVector<A>;
#pragma unroll
    for (int i = 0; i < count; i += step) {
        Vec<A, step> part;
        if (p) part = load<step>(p + start + i);
#pragma unroll
        for (int e = 0; e < step; ++e) out[i + e] = p ? part.v[e] : otherwise;
    }
}

// max(min(v, limit), -limit) that lets NaN through. limit: NaN for none.
template <typename A>
__device__ A clamped(A v, A limit) {
    v = v > limit ? limit : v;
    return v < -limit ? -limit : v;
}

template <typename A>
A limit_of(double clamp) {
    return clamp < 0 ? std::numeric_limits<A>::quiet_NaN() : static_cast<A>(clamp);
}

// Derivative of clamp(gain * leaky(t)) with respect to t, from its value y: sign and size of y tell all.
template <typename A>
struct RectifierSlope {
    A positive, negative, limit;

    __device__ A times(A v, A y) const {
        const A product = v * (y > 0 ? positive : negative);
        return std::abs(y) >= limit ? A(0) : product;
    }
};

// For y in dtype T: a clamped y has been rounded to it, and so has the limit here.
template <typename T>
RectifierSlope<acc_t<T>> rectifier_slope(double alpha, double gain, double clamp) {
    using A = acc_t<T>;
    return {static_cast<A>(gain), static_cast<A>(gain * alpha), to_acc(from_acc<T>(limit_of<A>(clamp)))};
}

template <typename T>
__device__ T* shared() {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    return reinterpret_cast<T*>(shared_memory);
}

// Are all of these (null ones aside) multiples of 16 bytes?
template <typename... Pointers>
bool aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) | ... | 0) & 15) == 0;
}

template <typename I>
constexpr I ceil_div(I a, I b) {
    return (a + b - 1) / b;
}

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, size_t shared_bytes, void* stream, Params... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// f(T()) for the C++ type T of a dtype.
template <typename F>
cudaError_t dispatch(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::half: return f(__half());
        case Dtype::bfloat16: return f(__nv_bfloat16());
        case Dtype::float32: return f(float());
        case Dtype::float64: return f(double());
    }
    return cudaErrorInvalidValue;
}

}  // namespace m2m_stylegan::cuda
