// upfirdn2d: insert zeros, pad or crop, filter, decimate; every channel by itself.
//
// The filters that StyleGAN2 and its augmentation use are compiled for their sizes: a thread walks down one column of the output, reads every row of the
// input once and keeps the outputs that are not complete yet in registers, so that shared memory is not needed: neighbouring threads find what they
// have in common in the first-level cache. All other filters take one thread per output.
#include "common.cuh"

namespace m2m_stylegan::cuda {
namespace {

// Division of numbers below 2^31 by a constant: Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
struct Divisor {
    uint32_t d = 1, magic = 0, shift = 0;

    Divisor() = default;
    explicit Divisor(int64_t divisor) : d(static_cast<uint32_t>(divisor)) {
        while ((uint64_t{1} << shift) < d) ++shift;
        magic = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
    }
    __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
    // n becomes the quotient, the remainder is returned.
    __device__ uint32_t split(uint32_t& n) const {
        const uint32_t quotient = divide(n), remainder = n - quotient * d;
        n = quotient;
        return remainder;
    }
};

template <typename A>
__device__ A tap(const void* filter, bool is_double, int64_t i) {
    return is_double ? static_cast<A>(static_cast<const double*>(filter)[i]) : static_cast<A>(static_cast<const float*>(filter)[i]);
}

// Sizes of a compiled filter. up and down are 1 or 2, and 1 along an axis with one tap.
template <int taps_x, int taps_y, int up_x, int up_y, int down_x, int down_y>
struct Fir {
    static constexpr int kTapsX = taps_x, kTapsY = taps_y, kUpX = up_x, kUpY = up_y, kDownX = down_x, kDownY = down_y;
    static constexpr int kColumns = taps_x / up_x;  // of the input that an output depends on
    static constexpr int kPending = down_y == 1 ? taps_y - up_y : taps_y / 2 - 1;  // outputs that are not complete after a step
    static constexpr int kDelay = down_y == 1 ? taps_y - 1 : taps_y / 2 - 1;       // from the newest output that a step contributes to to the oldest
    static constexpr bool kCanSeparate = taps_x > 1 && taps_y > 1 && up_x * up_y * down_x * down_y == 1;

    static bool matches(const Upfirdn2d& p) {
        return p.x.taps == taps_x && p.y.taps == taps_y && p.x.up == up_x && p.y.up == up_y && p.x.down == down_x && p.y.down == down_y;
    }

    // Outputs of a strip that takes this many steps. A step takes down_y rows of the input and completes up_y rows of the output.
    static constexpr int rows(int steps) { return down_y == 2 ? steps - taps_y / 2 + 1 : up_y == 2 ? 2 * steps - taps_y : steps - taps_y + 1; }
};

struct Strips {
    int in_x, in_y, out_x, out_y, pad_x, pad_y;
    int64_t in_n, in_c, in_row, out_n, out_c, out_row;  // strides in elements
    int in_pixel, out_pixel;
    bool filter_is_double, flip;
    double gain;
    int steps, rows;  // of a strip
    uint32_t threads;
    Divisor inner, columns, strips, outer;  // a thread's number, from the fastest: vector of channels in a group, column, strip, group of channels, sample
};

template <typename T, typename F, int V>
class Strip {
public:
    using A = acc_t<T>;

    __device__ Strip(const T* __restrict__ x, T* __restrict__ y, const Strips& a, uint32_t thread) : a(a) {
        const int64_t within = a.inner.split(thread);
        const int column = a.columns.split(thread), strip = a.strips.split(thread), group = a.outer.split(thread);
        const int64_t channel = (group * static_cast<int64_t>(a.inner.d) + within) * V, n = thread;
        const int base_x = column * F::kDownX - a.pad_x;
        first_tap = F::kUpX == 2 ? base_x & 1 : 0;
        const int in_column = (base_x + first_tap) >> (F::kUpX - 1);
#pragma unroll
        for (int q = 0; q < F::kColumns; ++q) column_is_inside[q] = in_column + q >= 0 && in_column + q < a.in_x;
        // The strip begins with an output whose first tap meets a sample, not an inserted zero; it may lie above the image.
        out_row = strip * a.rows - (F::kUpY == 2 ? a.pad_y & 1 : 0);
        in_row = (out_row * F::kDownY - a.pad_y) >> (F::kUpY - 1);
        source = x + n * a.in_n + channel * a.in_c + static_cast<int64_t>(in_column) * pixel();
        target = y + n * a.out_n + channel * a.out_c + static_cast<int64_t>(column) * (V == 1 ? 1 : a.out_pixel);
    }

    // taps: [kTapsY, kTapsX] of a correlation. separate: the filter is the outer product of its first column over its first element and its first row.
    template <bool separate>
    __device__ void run(const A* taps) {
        A weights_y[F::kTapsY], weights[separate ? 1 : F::kTapsY][F::kColumns];
#pragma unroll
        for (int k = 0; k < F::kTapsY; ++k) {
            weights_y[k] = taps[k * F::kTapsX] / taps[0];
            if (!separate || k == 0)
#pragma unroll
                for (int q = 0; q < F::kColumns; ++q) weights[k][q] = taps[k * F::kTapsX + first_tap + q * F::kUpX] * static_cast<A>(a.gain);
        }
        A pending[F::kPending ? F::kPending : 1][V] = {};
        for (int first = 0; first < a.steps; first += kBatch) {
            Vec<T, V> rows[kBatch][F::kDownY][F::kColumns];
#pragma unroll
            for (int s = 0; s < kBatch; ++s)
#pragma unroll
                for (int d = 0; d < F::kDownY; ++d) load_row(rows[s][d], in_row + (first + s) * F::kDownY + d);
#pragma unroll
            for (int s = 0; s < kBatch; ++s) {
                A done[F::kUpY][V];
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    // Those that the rows of this step contribute to, the oldest first; the younger an output, the earlier the tap it meets.
                    A outputs[F::kPending + F::kUpY];
#pragma unroll
                    for (int j = 0; j < F::kPending + F::kUpY; ++j) outputs[j] = j < F::kPending ? pending[j][e] : A(0);
#pragma unroll
                    for (int d = 0; d < F::kDownY; ++d) {
                        A samples[F::kColumns], sum = 0;
#pragma unroll
                        for (int q = 0; q < F::kColumns; ++q) samples[q] = to_acc(rows[s][d][q].v[e]);
                        if (separate)
#pragma unroll
                            for (int q = 0; q < F::kColumns; ++q) sum += weights[0][q] * samples[q];
#pragma unroll
                        for (int j = 0; j < F::kPending + F::kUpY; ++j) {
                            const int k = F::kTapsY - F::kDownY - j * F::kDownY + d;
                            if (separate) {
                                outputs[j] += weights_y[k] * sum;
                            } else {
#pragma unroll
                                for (int q = 0; q < F::kColumns; ++q) outputs[j] += weights[separate ? 0 : k][q] * samples[q];
                            }
                        }
                    }
#pragma unroll
                    for (int j = 0; j < F::kPending + F::kUpY; ++j) {
                        if (j < F::kUpY)
                            done[j][e] = outputs[j];
                        else
                            pending[j - F::kUpY][e] = outputs[j];
                    }
                }
#pragma unroll
                for (int u = 0; u < F::kUpY; ++u) store_row(done[u], (first + s) * F::kUpY + u - F::kDelay);
            }
        }
    }

private:
    // Steps whose rows are loaded before anything is computed: enough bytes in flight to hide the latency of memory.
    static constexpr int kBatch = (V == 1 && F::kColumns <= 4 ? 4 : 2) / F::kDownY;

    __device__ int64_t pixel() const { return V == 1 ? 1 : a.in_pixel; }

    __device__ void load_row(Vec<T, V> (&row)[F::kColumns], int y) const {
        const bool inside = y >= 0 && y < a.in_y;
        const T* p = source + y * a.in_row;
#pragma unroll
        for (int q = 0; q < F::kColumns; ++q) row[q] = inside && column_is_inside[q] ? load<V>(p + q * pixel()) : Vec<T, V>{};
    }

    // Row i of the strip.
    __device__ void store_row(const A (&row)[V], int i) const {
        const int y = out_row + i;
        if (i < 0 || i >= a.rows || y < 0 || y >= a.out_y) return;
        Vec<T, V> result;
#pragma unroll
        for (int e = 0; e < V; ++e) result.v[e] = from_acc<T>(row[e]);
        store(target + y * a.out_row, result);
    }

    const Strips& a;
    const T* source;
    T* target;
    int first_tap, in_row, out_row;
    bool column_is_inside[F::kColumns];
};

template <typename T, typename F, int V>
__global__ __launch_bounds__(kThreads, 2) void fir_kernel(const T* __restrict__ x, const void* __restrict__ filter, T* __restrict__ y, Strips a) {
    using A = acc_t<T>;
    constexpr int count = F::kTapsX * F::kTapsY;
    A* taps = shared<A>();
    const int i = threadIdx.x;
    if (i < count) taps[i] = tap<A>(filter, a.filter_is_double, a.flip ? i : count - 1 - i);
    __syncthreads();
    bool separate = false;
    if constexpr (F::kCanSeparate)  // Halves the arithmetic, which would otherwise limit half precision.
        separate = __syncthreads_and(i >= count || (taps[0] != 0 && taps[i] * taps[0] == taps[i / F::kTapsX * F::kTapsX] * taps[i % F::kTapsX]));
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
    if (thread >= a.threads) return;
    Strip<T, F, V> strip(x, y, a, thread);
    if (F::kCanSeparate && separate)
        strip.template run<F::kCanSeparate>(taps);
    else
        strip.template run<false>(taps);
}

struct General {
    Axis x, y;
    int64_t channels, in_n, in_c, in_row, in_pixel, numel;
    bool channels_last, filter_is_double, flip;
    double gain;
};

// One output per thread. Index: a type that holds numel.
template <typename T, typename Index>
__global__ __launch_bounds__(kThreads) void general_kernel(const T* __restrict__ x, const void* __restrict__ filter, T* __restrict__ y, General a) {
    using A = acc_t<T>;
    const Index step = static_cast<Index>(gridDim.x) * kThreads;
    for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < static_cast<Index>(a.numel); i += step) {
        Index n = i;
        const auto split = [&n](int64_t size) {
            const Index quotient = n / static_cast<Index>(size), remainder = n - quotient * static_cast<Index>(size);
            n = quotient;
            return static_cast<int64_t>(remainder);
        };
        int64_t channel = a.channels_last ? split(a.channels) : 0;
        const int64_t column = split(a.x.out), row = split(a.y.out);
        if (!a.channels_last) channel = split(a.channels);
        const T* plane = x + static_cast<int64_t>(n) * a.in_n + channel * a.in_c;
        const int base_x = static_cast<int>(column * a.x.down - a.x.pad), base_y = static_cast<int>(row * a.y.down - a.y.pad);
        const int up_x = static_cast<int>(a.x.up), up_y = static_cast<int>(a.y.up), taps_x = static_cast<int>(a.x.taps), taps_y = static_cast<int>(a.y.taps);
        const int first_x = base_x > 0 ? (base_x - 1) / up_x + 1 : 0, first_y = base_y > 0 ? (base_y - 1) / up_y + 1 : 0;
        A sum = 0;
        for (int in_y = first_y; in_y < a.y.in && in_y * up_y - base_y < taps_y; ++in_y) {
            for (int in_x = first_x; in_x < a.x.in && in_x * up_x - base_x < taps_x; ++in_x) {
                const int k = (in_y * up_y - base_y) * taps_x + in_x * up_x - base_x;
                sum += tap<A>(filter, a.filter_is_double, a.flip ? k : taps_x * taps_y - 1 - k) * to_acc(plane[in_y * a.in_row + in_x * a.in_pixel]);
            }
        }
        y[i] = from_acc<T>(sum * static_cast<A>(a.gain));
    }
}

template <typename T>
cudaError_t launch_general(const Upfirdn2d& p, void* stream) {
    const int64_t numel = p.samples * p.channels * p.y.out * p.x.out, max_blocks = (int64_t{1} << 31) - 1, blocks = ceil_div<int64_t>(numel, kThreads);
    const General a{p.x, p.y, p.channels, p.input_stride[0], p.input_stride[1], p.input_stride[2], p.input_stride[3], numel, p.channels_last,
                    p.filter_is_double, p.flip, p.gain};
    const auto kernel = blocks < int64_t{1} << 22 ? general_kernel<T, uint32_t> : general_kernel<T, uint64_t>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks)), 0, stream, static_cast<const T*>(p.input), p.filter,
                  static_cast<T*>(p.output), a);
}

template <typename T, typename F, int V>
cudaError_t launch_fir(const Upfirdn2d& p, Strips a, void* stream) {
    a.steps = F::kTapsY > 8 || (F::kTapsY > 1 && p.y.out >= 64) ? 16 : 8;  // Tall strips read few rows twice, low ones keep all of the GPU busy.
    a.rows = F::rows(a.steps);
    const int64_t vectors = p.channels / V, strips = ceil_div<int64_t>(p.y.out + (F::kUpY == 2 ? a.pad_y & 1 : 0), a.rows);
    // With channels last, groups of 8 vectors: a whole cache line per pixel, and a block still covers an area with little border.
    const int64_t inner = V == 1 ? 1 : vectors % 8 == 0 ? 8 : vectors;
    const int64_t threads = p.samples * vectors * strips * p.x.out;
    if (threads >= int64_t{1} << 31) return launch_general<T>(p, stream);
    a.threads = static_cast<uint32_t>(threads);
    a.inner = Divisor(inner), a.columns = Divisor(p.x.out), a.strips = Divisor(strips), a.outer = Divisor(vectors / inner);
    return launch(fir_kernel<T, F, V>, dim3(static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads))), F::kTapsX * F::kTapsY * sizeof(acc_t<T>), stream,
                  static_cast<const T*>(p.input), p.filter, static_cast<T*>(p.output), a);
}

// Launches the first of the filters Fs that fits, else the general kernel.
template <typename T, int V, typename... Fs>
cudaError_t launch_first(const Upfirdn2d& p, const Strips& a, void* stream) {
    cudaError_t error = cudaSuccess;
    const bool found = ((Fs::matches(p) && (error = launch_fir<T, Fs, V>(p, a, stream), true)) || ...);
    return found ? error : launch_general<T>(p, stream);
}

template <typename T>
cudaError_t launch_upfirdn2d(const Upfirdn2d& p, void* stream) {
    using Same = Fir<4, 4, 1, 1, 1, 1>;
    using Up = Fir<4, 4, 2, 2, 1, 1>;
    using Down = Fir<4, 4, 1, 1, 2, 2>;
    constexpr int V = kVector<T>;
    Strips a{};
    a.in_x = static_cast<int>(p.x.in), a.in_y = static_cast<int>(p.y.in), a.out_x = static_cast<int>(p.x.out), a.out_y = static_cast<int>(p.y.out);
    a.pad_x = static_cast<int>(p.x.pad), a.pad_y = static_cast<int>(p.y.pad);
    a.in_n = p.input_stride[0], a.in_c = p.input_stride[1], a.in_row = p.input_stride[2];
    a.filter_is_double = p.filter_is_double, a.flip = p.flip, a.gain = p.gain;
    a.out_n = p.channels * p.y.out * p.x.out;
    if (p.channels_last) {
        const bool whole = p.channels % V == 0 && a.in_c == 1 && a.in_n % V == 0 && a.in_row % V == 0 && p.input_stride[3] % V == 0;
        if (!whole || !aligned(p.input, p.output) || p.channels >= int64_t{1} << 28 || p.input_stride[3] >= int64_t{1} << 28)
            return launch_general<T>(p, stream);
        a.in_pixel = static_cast<int>(p.input_stride[3]), a.out_pixel = static_cast<int>(p.channels);
        a.out_c = 1, a.out_row = p.channels * p.x.out;
        return launch_first<T, V, Same, Up, Down>(p, a, stream);
    }
    if (p.input_stride[3] != 1) return launch_general<T>(p, stream);
    a.out_c = p.y.out * p.x.out, a.out_row = p.x.out;
    if constexpr (std::is_same_v<T, float>)  // The 12 taps of sym6, one axis at a time: adaptive augmentation (arXiv 2006.06676, appendix B).
        return launch_first<T, 1, Same, Up, Down, Fir<12, 1, 2, 1, 1, 1>, Fir<1, 12, 1, 2, 1, 1>, Fir<12, 1, 1, 1, 2, 1>, Fir<1, 12, 1, 1, 1, 2>>(p, a, stream);
    else
        return launch_first<T, 1, Same, Up, Down>(p, a, stream);
}

}  // namespace

int upfirdn2d(const Upfirdn2d& p, void* stream) {
    return dispatch(p.dtype, [&](auto zero) { return launch_upfirdn2d<decltype(zero)>(p, stream); });
}

}  // namespace m2m_stylegan::cuda
