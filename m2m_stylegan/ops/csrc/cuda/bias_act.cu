// bias_act: clamp(gain * act(x + b)) and its first two derivatives, element by element, in one pass over memory.
#include "common.cuh"

namespace m2m_stylegan::cuda {
namespace {

constexpr int kUnroll = 2;  // vectors that a thread loads before it computes: enough bytes in flight to hide the latency of memory

template <typename A>
__device__ A sigmoid(A x) {
    return 1 / (1 + std::exp(-x));
}

// The activation (order 0) or its first or second derivative at x.
template <int order, typename A>
__device__ A smooth(int act, A x) {
    const bool is_linear = order == 2 ? x >= 0 : x > 0;  // at 0 torch takes the first derivative from the left and the second from the right
    switch (act) {
        case kTanh: {
            const A t = std::tanh(x), d = 1 - t * t;
            return order == 0 ? t : order == 1 ? d : -2 * t * d;
        }
        case kSigmoid: {
            const A s = sigmoid(x), d = s * (1 - s);
            return order == 0 ? s : order == 1 ? d : d * (1 - 2 * s);
        }
        case kElu:
            return is_linear ? (order == 0 ? x : A(order == 1)) : (order == 0 ? std::expm1(x) : std::exp(x));
        case kSelu: {  // Klambauer et al., arXiv 1706.02515, eq. 14
            const A scale = A(1.0507009873554804934193349852946), alpha = A(1.6732632423543772848170429916717);
            return scale * (is_linear ? (order == 0 ? x : A(order == 1)) : alpha * (order == 0 ? std::expm1(x) : std::exp(x)));
        }
        case kSoftplus: {  // torch takes it for linear above 20
            if (x > 20) return order == 0 ? x : A(order == 1);
            if (order == 0) return std::log1p(std::exp(x));
            const A s = sigmoid(x);
            return order == 1 ? s : s * (1 - s);
        }
        default: {  // swish
            const A s = sigmoid(x), d = s * (1 - s);
            return order == 0 ? x * s : order == 1 ? s + x * d : d * (2 + x * (1 - 2 * s));
        }
    }
}

template <typename T, typename Index>
struct Args {
    using A = acc_t<T>;
    const T *x, *dy, *ddx, *b;
    T* out;
    Index numel, b_size, b_stride;
    bool vectors, b_vectors;  // Is everything aligned? Do the biases of a vector lie in an aligned vector?
    int act;
    A alpha, gain, limit;
    RectifierSlope<A> slope;
};

// The elements i, i + 1, ... up to the end.
template <int V, typename T, typename Index>
__device__ Vec<T, V> load_until(const T* p, Index i, Index numel, bool vectors) {
    if (vectors && i + V <= numel) return load<V>(p + i);
    Vec<T, V> result{};
#pragma unroll
    for (int e = 0; e < V; ++e)
        if (i + e < numel) result.v[e] = p[i + e];
    return result;
}

template <int V, typename T, typename Index>
__device__ void load_bias(acc_t<T> (&bias)[V], const Args<T, Index>& a, Index i) {
    Index c = i / a.b_stride, within = i - c * a.b_stride;
    c %= a.b_size;
    if (a.b_vectors) {
        const Vec<T, V> b = load<V>(a.b + c);
#pragma unroll
        for (int e = 0; e < V; ++e) bias[e] = to_acc(b.v[e]);
        return;
    }
    acc_t<T> value = to_acc(a.b[c]);
#pragma unroll
    for (int e = 0; e < V; ++e) {
        bias[e] = value;
        if (++within == a.b_stride) {
            within = 0;
            c = c + 1 == a.b_size ? 0 : c + 1;
            value = to_acc(a.b[c]);
        }
    }
}

template <int order, bool is_smooth, typename T, typename Index>
__global__ __launch_bounds__(kThreads) void bias_act_kernel(Args<T, Index> a) {
    using A = acc_t<T>;
    constexpr int V = kVector<T>;
    const Index first = (static_cast<Index>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x) * V;
    Vec<T, V> x[kUnroll], dy[kUnroll], ddx[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const Index i = first + u * kThreads * V;
        x[u] = load_until<V>(a.x, i, a.numel, a.vectors);
        if constexpr (order > 0) dy[u] = load_until<V>(a.dy, i, a.numel, a.vectors);
        if constexpr (order > 1) ddx[u] = load_until<V>(a.ddx, i, a.numel, a.vectors);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const Index i = first + u * kThreads * V;
        if (i >= a.numel) return;
        A bias[V] = {};
        if (a.b) load_bias(bias, a, i);
        Vec<T, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A t = to_acc(x[u].v[e]) + bias[e];
            A result;
            if constexpr (order == 0) {
                result = clamped(a.gain * (is_smooth ? smooth<0>(a.act, t) : (t > 0 ? t : t * a.alpha)), a.limit);
            } else if constexpr (!is_smooth) {
                result = a.slope.times(to_acc(dy[u].v[e]), t);
            } else {
                result = to_acc(dy[u].v[e]) * a.gain * smooth<order>(a.act, t);
                if constexpr (order == 2) result *= to_acc(ddx[u].v[e]);
                if (a.limit >= 0 && !(std::abs(a.gain * smooth<0>(a.act, t)) <= a.limit)) result = 0;
            }
            out.v[e] = from_acc<T>(result);
        }
        if (a.vectors && i + V <= a.numel) {
            store(a.out + i, out);
        } else {
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (i + e < a.numel) a.out[i + e] = out.v[e];
        }
    }
}

template <typename T, typename Index>
cudaError_t launch_bias_act(const BiasAct& p, void* stream) {
    using A = acc_t<T>;
    constexpr int V = kVector<T>;
    const bool is_smooth = p.act >= kTanh;
    Args<T, Index> a{};
    a.x = static_cast<const T*>(p.x), a.dy = static_cast<const T*>(p.dy), a.ddx = static_cast<const T*>(p.ddx), a.b = static_cast<const T*>(p.b);
    a.out = static_cast<T*>(p.out);
    a.numel = static_cast<Index>(p.numel), a.b_size = static_cast<Index>(p.b_size), a.b_stride = static_cast<Index>(p.b_stride);
    a.vectors = aligned(p.x, p.dy, p.ddx, p.out);
    a.b_vectors = p.b_stride == 1 && p.b_size % V == 0 && aligned(p.b);
    a.act = p.act;
    a.alpha = static_cast<A>(p.alpha);
    a.gain = static_cast<A>(p.gain), a.limit = limit_of<A>(p.clamp);
    a.slope = rectifier_slope<T>(p.alpha, p.gain, p.clamp);
    const auto kernel = is_smooth ? (p.ddx ? bias_act_kernel<2, true, T, Index> : p.dy ? bias_act_kernel<1, true, T, Index> : bias_act_kernel<0, true, T, Index>)
                                  : (p.dy ? bias_act_kernel<1, false, T, Index> : bias_act_kernel<0, false, T, Index>);
    return launch(kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(p.numel, kThreads * kUnroll * V))), 0, stream, a);
}

}  // namespace

int bias_act(const BiasAct& p, void* stream) {
    return dispatch(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool small = p.numel < int64_t{1} << 31;
        return small ? launch_bias_act<T, uint32_t>(p, stream) : launch_bias_act<T, uint64_t>(p, stream);
    });
}

}  // namespace m2m_stylegan::cuda
