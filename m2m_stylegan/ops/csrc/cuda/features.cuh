// Passes over [N, C, H, W] features that read each element once and sum some of what they compute over the pixels of each channel.
//
// An operation Op has
//   Scalar, kSums (how many sums), kUnroll (vectors loaded before computing), samples, channels, pixels, noise_step,
//   Coefficients<W>  operands that depend on sample and channel, for W neighbouring channels: coefficients<W>(n * channels + c, c)
//   Tile<V, P>       V elements of every operand, P of the noise: load<V, P>(element, noise element)
//   apply<V, W, P>(element, tile, coefficients, sums): results are stored, and sums[k][e % W] grows.
// Contiguous features have W = 1, P = V; channels-last ones W = V, P = 1.
#pragma once

#include "reduce.cuh"

namespace m2m_stylegan::cuda {

constexpr int kMaxLanes = 64;                // threads side by side along the channels of one pixel
constexpr int kContiguousIterations = 16;    // vectors per thread, if there are enough: they share what comes before and after the loop
constexpr int kChannelsLastIterations = 8;

inline int power_of_two_from(int64_t n, int limit) {
    int result = 1;
    while (result < n && result < limit) result *= 2;
    return result;
}

// How the pixels of a sample are cut into chunks. Each chunk has partial sums of its own, so the cut depends on shapes alone.
struct Chunks {
    int64_t size, count;

    template <typename T>
    static Chunks of(const Features& f) {
        const int lanes = power_of_two_from(ceil_div<int64_t>(f.channels, kVector<T>), kMaxLanes);
        const int64_t size = f.channels_last ? kThreads / lanes * kChannelsLastIterations : kWarp * kVector<T> * kContiguousIterations;
        return {size, ceil_div(f.pixels, size)};
    }
};

template <typename A>
struct Pass {
    int64_t chunk, chunks;
    int lanes;    // neighbouring threads that share a chunk of one channel (within a warp), or the channels of a pixel; a power of two
    A* partials;  // [kSums, samples, channels, chunks]; null if no sum is wanted
};

// Contiguous features. A group of `lanes` threads takes a chunk of one channel, its neighbours the same chunk of the next channels, so that they find
// the noise in the first-level cache; blockIdx.y is the sample.
template <int V, typename Op>
__global__ __launch_bounds__(kThreads) void contiguous_pass(Op op, Pass<acc_t<typename Op::Scalar>> pass) {
    using A = acc_t<typename Op::Scalar>;
    constexpr int unroll = V == 1 ? 4 : Op::kUnroll;
    const int lane = threadIdx.x & (pass.lanes - 1);
    const uint32_t job = blockIdx.x * (kThreads / pass.lanes) + threadIdx.x / pass.lanes, channels = static_cast<uint32_t>(op.channels);
    const uint32_t chunk = job / channels, channel = job - chunk * channels;
    const bool active = chunk < pass.chunks;
    const int step = pass.lanes * V;
    const int64_t begin = chunk * pass.chunk + lane * V;
    const int64_t end = (chunk + 1) * pass.chunk < op.pixels ? (chunk + 1) * pass.chunk : op.pixels;
    for (int64_t n = blockIdx.y; n < op.samples; n += gridDim.y) {
        A sums[Op::kSums ? Op::kSums : 1][1] = {};
        if (active) {
            const auto coefficients = op.template coefficients<1>(n * op.channels + channel, channel);
            const int64_t plane = (n * op.channels + channel) * op.pixels, to_noise = n * op.noise_step - plane, stop = plane + end;
#pragma unroll 1
            for (int64_t i = plane + begin; i < stop; i += step * unroll) {
                typename Op::template Tile<V, V> tiles[unroll];
#pragma unroll
                for (int u = 0; u < unroll; ++u)
                    if (i + u * step < stop) tiles[u] = op.template load<V, V>(i + u * step, i + u * step + to_noise);
#pragma unroll
                for (int u = 0; u < unroll; ++u)
                    if (i + u * step < stop) op.template apply<V, 1, V>(i + u * step, tiles[u], coefficients, sums);
            }
        }
        if (Op::kSums > 0 && pass.partials) {
            const int64_t sum_step = op.samples * op.channels * pass.chunks;
#pragma unroll
            for (int k = 0; k < Op::kSums; ++k) {
                const A sum = warp_sum(sums[k][0], pass.lanes);
                if (lane == 0 && active) pass.partials[k * sum_step + (n * op.channels + channel) * pass.chunks + chunk] = sum;
            }
        }
    }
}

// Channels-last features. A block takes a chunk of pixels (blockIdx.x) of a sample (y) and `lanes` vectors of channels (z).
template <int V, typename Op>
__global__ __launch_bounds__(kThreads) void channels_last_pass(Op op, Pass<acc_t<typename Op::Scalar>> pass) {
    using A = acc_t<typename Op::Scalar>;
    constexpr int unroll = V == 1 ? 4 : Op::kUnroll;
    const int lane = threadIdx.x & (pass.lanes - 1), row = threadIdx.x / pass.lanes, rows = kThreads / pass.lanes;
    const int64_t first_channel = static_cast<int64_t>(blockIdx.z) * pass.lanes * V, channel = first_channel + lane * V;
    const int64_t begin = blockIdx.x * pass.chunk, end = begin + pass.chunk < op.pixels ? begin + pass.chunk : op.pixels;
    for (int64_t n = blockIdx.y; n < op.samples; n += gridDim.y) {
        A sums[Op::kSums ? Op::kSums : 1][V] = {};
        if (channel < op.channels) {
            const auto coefficients = op.template coefficients<V>(n * op.channels + channel, channel);
#pragma unroll 1
            for (int64_t p = begin + row; p < end; p += rows * unroll) {
                typename Op::template Tile<V, 1> tiles[unroll];
                const auto element = [&](int u) { return (n * op.pixels + p + u * rows) * op.channels + channel; };
#pragma unroll
                for (int u = 0; u < unroll; ++u)
                    if (p + u * rows < end) tiles[u] = op.template load<V, 1>(element(u), n * op.noise_step + p + u * rows);
#pragma unroll
                for (int u = 0; u < unroll; ++u)
                    if (p + u * rows < end) op.template apply<V, V, 1>(element(u), tiles[u], coefficients, sums);
            }
        }
        if (Op::kSums > 0 && pass.partials) {
            A* memory = shared<A>();  // [kSums, rows, lanes * V]
#pragma unroll
            for (int k = 0; k < Op::kSums; ++k)
#pragma unroll
                for (int e = 0; e < V; ++e) memory[(k * kThreads + threadIdx.x) * V + e] = sums[k][e];
            __syncthreads();
            const int width = pass.lanes * V;
            for (int i = threadIdx.x; i < Op::kSums * width; i += kThreads) {
                const int k = i / width, c = i - k * width;
                A sum = 0;
                for (int r = 0; r < rows; ++r) sum += memory[k * kThreads * V + r * width + c];
                if (first_channel + c < op.channels)
                    pass.partials[((k * op.samples + n) * op.channels + first_channel + c) * pass.chunks + blockIdx.x] = sum;
            }
            __syncthreads();
        }
    }
}

template <int V, typename Op>
cudaError_t launch_pass(const Op& op, const Features& f, void* partials, void* stream) {
    using A = acc_t<typename Op::Scalar>;
    const Chunks chunks = Chunks::of<typename Op::Scalar>(f);
    const unsigned samples = static_cast<unsigned>(f.samples < kMaxSamples ? f.samples : kMaxSamples);
    Pass<A> pass{chunks.size, chunks.count, 0, static_cast<A*>(partials)};
    if (f.channels_last) {
        pass.lanes = power_of_two_from(ceil_div<int64_t>(f.channels, V), kMaxLanes);
        const int64_t blocks = ceil_div<int64_t>(f.channels, pass.lanes * V);
        if (blocks >= 1 << 16) return cudaErrorInvalidConfiguration;
        const dim3 grid(static_cast<unsigned>(chunks.count), samples, static_cast<unsigned>(blocks));
        return launch(channels_last_pass<V, Op>, grid, Op::kSums * kThreads * V * sizeof(A), stream, op, pass);
    }
    pass.lanes = power_of_two_from(ceil_div<int64_t>(f.pixels, V), kWarp);
    const int64_t jobs = f.channels * chunks.count;
    if (jobs >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(jobs, kThreads / pass.lanes)), samples);
    return launch(contiguous_pass<V, Op>, grid, 0, stream, op, pass);
}

// vectors: all tensors are aligned.
template <typename Op>
cudaError_t launch_pass(const Op& op, const Features& f, bool vectors, void* partials, void* stream) {
    constexpr int V = kVector<typename Op::Scalar>;
    const bool whole = (f.channels_last ? f.channels : f.pixels) % V == 0;
    return vectors && whole ? launch_pass<V>(op, f, partials, stream) : launch_pass<1>(op, f, partials, stream);
}

}  // namespace m2m_stylegan::cuda
