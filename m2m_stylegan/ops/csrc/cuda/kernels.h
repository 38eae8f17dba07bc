// Launchers of the CUDA kernels, in plain C++: the host compiler builds register.cpp with it, and the .cu files know nothing of torch.
#pragma once

#include <cstdint>

namespace m2m_stylegan::cuda {

enum class Dtype { half, bfloat16, float32, float64 };

// Launchers enqueue on a cudaStream_t and return a cudaError_t. Pointers are to device memory; no tensor is empty. "acc" is double for float64
// and float for all others.

// One axis of upfirdn2d: sizes of input and output, taps of the filter, factors, zeros in front (cropped if negative).
struct Axis {
    int64_t in, out, taps, up, down, pad;
};

struct Upfirdn2d {
    Dtype dtype;
    int64_t samples, channels;
    Axis x, y;                // in.y * up.y + padding, and so on, fit into 31 bits
    const void* input;
    int64_t input_stride[4];  // of N, C, H, W, in elements
    const void* filter;       // [taps_y, taps_x] float or, if `filter_is_double`, double; contiguous
    bool filter_is_double, flip;
    double gain;
    void* output;             // dense
    bool channels_last;       // layout of the output
};

int upfirdn2d(const Upfirdn2d& p, void* stream);

// Indices of ops/reference.py ACTIVATIONS.
enum Act { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kActs };

// All tensors in the same dense layout. Without dy: the function; with dy: its derivative times dy; with ddx also: its second one times dy * ddx.
struct BiasAct {
    Dtype dtype;
    int act;
    double alpha, gain, clamp;  // slope below zero of linear, relu and lrelu; clamp < 0: none
    int64_t numel;
    const void* x;              // the function's value y for the derivatives of linear, relu and lrelu
    const void *dy, *ddx, *b;   // null if absent
    int64_t b_size, b_stride;   // element i, counted in memory, has the bias b[i / b_stride % b_size]
    void* out;
};

int bias_act(const BiasAct& p, void* stream);

// [samples, channels, pixels], or [samples, pixels, channels] if channels_last.
struct Features {
    Dtype dtype;
    bool channels_last;
    int64_t samples, channels, pixels;
    double alpha, gain, clamp;  // clamp < 0: none
};

// Small operands are contiguous and in acc: scale and ddscale [samples, channels], noise [samples or 1, pixels], strength [], b [channels].
// Null stands for an operand that is absent, a result that is not wanted, and for y where alpha = 1 and nothing is clamped.
struct Epilogue : Features {
    const void *x, *scale, *noise, *strength, *b;
    bool noise_per_sample;
    void* y;
};

struct EpilogueGrad : Features {
    const void *dy, *x, *y, *scale, *noise, *strength;
    bool noise_per_sample;
    void *dx, *dscale, *dnoise, *dstrength, *db;
    void* workspace;  // of workspace_bytes; not needed without dscale, dstrength and db
};

struct EpilogueGrad2 : Features {
    const void *ddx, *ddscale, *dy, *x, *y, *scale;
    void *gdy, *gx, *gscale;
    void* workspace;  // of workspace_bytes; not needed without gscale
};

int64_t workspace_bytes(const Features& f);
int epilogue(const Epilogue& p, void* stream);
int epilogue_grad(const EpilogueGrad& p, void* stream);
int epilogue_grad2(const EpilogueGrad2& p, void* stream);

}  // namespace m2m_stylegan::cuda
