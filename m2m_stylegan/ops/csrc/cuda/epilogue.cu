// epilogue: what follows a modulated convolution, clamp(gain * leaky(x * scale + noise * strength + b)), and its gradients. Each is one pass over
// memory; sums over pixels are finished by small kernels, and the gradient of the noise, which a training does not need, takes a pass of its own.
#include "epilogue_ops.cuh"

namespace m2m_stylegan::cuda {
namespace {

// Partial sums [samples, channels, chunks], any of which may be null, to dscale [samples, channels], db [channels] and one part of dstrength per channel.
template <typename A>
struct Partials {
    const A *scale, *b, *strength;
    A *dscale, *db, *strengths;
    int64_t samples, channels, chunks;
};

template <typename A>
__device__ A sum_of_chunks(const A* partials, int64_t nc, int64_t chunks) {
    A sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x % kWarp; i < chunks; i += kWarp) sum += partials[nc * chunks + i];
    return warp_sum(sum, kWarp);
}

// One block per channel, one warp per sample.
template <typename A>
__global__ __launch_bounds__(kThreads) void finish_channels(Partials<A> p) {
    const int64_t c = blockIdx.x;
    const bool first_lane = threadIdx.x % kWarp == 0;
    A b = 0, strength = 0;
    for (int64_t n = threadIdx.x / kWarp; n < p.samples; n += kThreads / kWarp) {
        const int64_t nc = n * p.channels + c;
        if (p.scale) {
            const A sum = sum_of_chunks(p.scale, nc, p.chunks);
            if (first_lane) p.dscale[nc] = sum;
        }
        if (p.b) b += sum_of_chunks(p.b, nc, p.chunks);
        if (p.strength) strength += sum_of_chunks(p.strength, nc, p.chunks);
    }
    if (p.b) {
        b = block_sum(first_lane ? b : A(0));
        if (threadIdx.x == 0) p.db[c] = b;
    }
    if (p.strength) {
        strength = block_sum(first_lane ? strength : A(0));
        if (threadIdx.x == 0) p.strengths[c] = strength;
    }
}

template <typename A>
__global__ __launch_bounds__(kThreads) void finish_strength(const A* strengths, int64_t channels, A* dstrength) {
    A sum = 0;
    for (int64_t c = threadIdx.x; c < channels; c += kThreads) sum += strengths[c];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *dstrength = sum;
}

// dnoise = strength * sum of g over channels and, if the samples share the noise, over samples. `slots` threads share the channels of a pixel.
template <typename T>
struct NoiseGrad {
    using A = acc_t<T>;
    const T *dy, *y;
    const A* strength;
    A* dnoise;
    int64_t samples, channels, pixels, noise_samples;
    bool channels_last;
    RectifierSlope<A> slope;
};

constexpr int kContiguousSlots = 8;  // 32 neighbouring pixels are read at a time, or 32 neighbouring channels

template <typename T>
__global__ __launch_bounds__(kThreads) void noise_grad(NoiseGrad<T> p) {
    using A = acc_t<T>;
    A* memory = shared<A>();  // [slots, pixels of this block]
    const int slots = p.channels_last ? kWarp : kContiguousSlots, width = kThreads / slots;
    const int slot = p.channels_last ? threadIdx.x % kWarp : threadIdx.x / width, local = p.channels_last ? threadIdx.x / kWarp : threadIdx.x % width;
    const int64_t pixel = static_cast<int64_t>(blockIdx.x) * width + local;
    const int64_t channel_step = p.channels_last ? 1 : p.pixels, pixel_step = p.channels_last ? p.channels : 1;
    for (int64_t m = blockIdx.y; m < p.noise_samples; m += gridDim.y) {
        A sum = 0;
        if (pixel < p.pixels) {
            for (int64_t n = m; n < p.samples; n += p.noise_samples) {
                const int64_t first = n * p.channels * p.pixels + pixel * pixel_step;
#pragma unroll 2
                for (int64_t c = slot; c < p.channels; c += slots) {
                    const int64_t i = first + c * channel_step;
                    sum += p.slope.times(to_acc(p.dy[i]), to_acc(p.y[i]));
                }
            }
        }
        memory[slot * width + local] = sum;
        __syncthreads();
        if (slot == 0 && pixel < p.pixels) {
            for (int s = 1; s < slots; ++s) sum += memory[s * width + local];
            p.dnoise[m * p.pixels + pixel] = p.strength ? sum * *p.strength : sum;
        }
        __syncthreads();
    }
}

// Without slope and clamp y is not looked at.
bool is_linear(const Features& f) { return f.alpha == 1 && f.clamp < 0; }

template <typename T>
cudaError_t launch_noise_grad(const EpilogueGrad& p, void* stream) {
    using A = acc_t<T>;
    const T* dy = static_cast<const T*>(p.dy);
    const int64_t noise_samples = p.noise_per_sample ? p.samples : 1;
    NoiseGrad<T> op{dy, is_linear(p) ? dy : static_cast<const T*>(p.y), static_cast<const A*>(p.strength), static_cast<A*>(p.dnoise), p.samples, p.channels,
                    p.pixels, noise_samples, p.channels_last, rectifier_slope<T>(p.alpha, p.gain, p.clamp)};
    const int64_t width = p.channels_last ? kThreads / kWarp : kThreads / kContiguousSlots;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.pixels, width)), static_cast<unsigned>(noise_samples < kMaxSamples ? noise_samples : kMaxSamples));
    return launch(noise_grad<T>, grid, kThreads * sizeof(A), stream, op);
}

template <typename T>
int64_t partials_count(const Features& f) {
    return f.samples * f.channels * Chunks::of<T>(f).count;
}

template <typename T>
cudaError_t launch_epilogue(const Epilogue& p, void* stream) {
    using A = acc_t<T>;
    const Forward<T> op{p.samples, p.channels, p.pixels, p.noise_per_sample ? p.pixels : 0, static_cast<const T*>(p.x), static_cast<const A*>(p.scale),
                        static_cast<const A*>(p.noise), static_cast<const A*>(p.strength), static_cast<const A*>(p.b), static_cast<T*>(p.y),
                        static_cast<A>(p.alpha), static_cast<A>(p.gain), limit_of<A>(p.clamp)};
    return launch_pass(op, p, aligned(p.x, p.scale, p.noise, p.b, p.y), nullptr, stream);
}

template <typename T>
cudaError_t launch_grad(const EpilogueGrad& p, void* stream) {
    using A = acc_t<T>;
    if (p.dnoise) {
        const cudaError_t error = launch_noise_grad<T>(p, stream);
        if (error != cudaSuccess) return error;
    }
    const T *x = static_cast<const T*>(p.dscale ? p.x : nullptr), *y = static_cast<const T*>(is_linear(p) ? nullptr : p.y);
    const A* noise = static_cast<const A*>(p.dstrength ? p.noise : nullptr);
    const int64_t count = partials_count<T>(p);
    const Chunks chunks = Chunks::of<T>(p);
    const bool sums = p.dscale || p.dstrength || p.db;
    if (!p.dx && !sums) return cudaSuccess;
    A* partials = static_cast<A*>(sums ? p.workspace : nullptr);
    const Grad<T> op{p.samples, p.channels, p.pixels, p.noise_per_sample ? p.pixels : 0, static_cast<const T*>(p.dy), x, y,
                     static_cast<const A*>(p.scale), noise, static_cast<T*>(p.dx), rectifier_slope<T>(p.alpha, p.gain, p.clamp)};
    cudaError_t error = launch_pass(op, p, aligned(p.dy, x, y, p.scale, noise, p.dx), partials, stream);
    if (error != cudaSuccess || !sums) return error;
    A* strengths = partials + 3 * count;
    const Partials<A> all{p.dscale ? partials : nullptr, p.db ? partials + count : nullptr, p.dstrength ? partials + 2 * count : nullptr,
                          static_cast<A*>(p.dscale), static_cast<A*>(p.db), strengths, p.samples, p.channels, chunks.count};
    error = launch(finish_channels<A>, dim3(static_cast<unsigned>(p.channels)), kBlockSumBytes<A>, stream, all);
    if (error != cudaSuccess || !p.dstrength) return error;
    return launch(finish_strength<A>, dim3(1), kBlockSumBytes<A>, stream, static_cast<const A*>(strengths), p.channels,
                  static_cast<A*>(p.dstrength));
}

template <typename T>
cudaError_t launch_grad2(const EpilogueGrad2& p, void* stream) {
    using A = acc_t<T>;
    const T *x = static_cast<const T*>(p.ddscale ? p.x : nullptr), *y = static_cast<const T*>(is_linear(p) ? nullptr : p.y);
    A* partials = static_cast<A*>(p.gscale ? p.workspace : nullptr);
    const Grad2<T> op{p.samples, p.channels, p.pixels, static_cast<const T*>(p.ddx), static_cast<const T*>(p.dy), x, y, static_cast<const A*>(p.scale),
                      static_cast<const A*>(p.ddscale), static_cast<T*>(p.gdy), static_cast<T*>(p.gx), rectifier_slope<T>(p.alpha, p.gain, p.clamp)};
    const cudaError_t error = launch_pass(op, p, aligned(p.ddx, p.dy, x, y, p.scale, p.ddscale, p.gdy, p.gx), partials, stream);
    if (error != cudaSuccess || !p.gscale) return error;
    const Partials<A> all{partials, nullptr, nullptr, static_cast<A*>(p.gscale), nullptr, nullptr, p.samples, p.channels, Chunks::of<T>(p).count};
    return launch(finish_channels<A>, dim3(static_cast<unsigned>(p.channels)), kBlockSumBytes<A>, stream, all);
}

}  // namespace

int64_t workspace_bytes(const Features& f) {
    int64_t bytes = 0;
    dispatch(f.dtype, [&](auto zero) {
        using T = decltype(zero);
        bytes = (3 * partials_count<T>(f) + f.channels) * static_cast<int64_t>(sizeof(acc_t<T>));
        return cudaSuccess;
    });
    return bytes;
}

int epilogue(const Epilogue& p, void* stream) {
    return dispatch(p.dtype, [&](auto zero) { return launch_epilogue<decltype(zero)>(p, stream); });
}

int epilogue_grad(const EpilogueGrad& p, void* stream) {
    return dispatch(p.dtype, [&](auto zero) { return launch_grad<decltype(zero)>(p, stream); });
}

int epilogue_grad2(const EpilogueGrad2& p, void* stream) {
    return dispatch(p.dtype, [&](auto zero) { return launch_grad2<decltype(zero)>(p, stream); });
}

}  // namespace m2m_stylegan::cuda
