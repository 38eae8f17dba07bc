// bias_act: clamp(gain * act(x + b)) and its first two derivatives, element by element, in one pass over memory.
#include "common.h"

namespace m2m_stylegan {
namespace {

constexpr int64_t kBlock = 1024;  // elements handled at a time: fits into the first-level cache with all its operands

// Indices of ops/reference.py ACTIVATIONS.
enum Act { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kActs };

template <typename A>
A sigmoid(A x) { return 1 / (1 + std::exp(-x)); }

// value, d1, d2: the function and its derivatives.
template <typename A>
struct Tanh {
    static A value(A x) { return std::tanh(x); }
    static A d1(A x) { const A t = std::tanh(x); return 1 - t * t; }
    static A d2(A x) { const A t = std::tanh(x); return -2 * t * (1 - t * t); }
};

template <typename A>
struct Sigmoid {
    static A value(A x) { return sigmoid(x); }
    static A d1(A x) { const A s = sigmoid(x); return s * (1 - s); }
    static A d2(A x) { const A s = sigmoid(x); return s * (1 - s) * (1 - 2 * s); }
};

template <typename A>
struct Elu {
    static A value(A x) { return x > 0 ? x : std::expm1(x); }
    static A d1(A x) { return x > 0 ? A(1) : std::exp(x); }
    static A d2(A x) { return x > 0 ? A(0) : std::exp(x); }
};

template <typename A>
struct Selu {  // Klambauer et al., arXiv 1706.02515, eq. 14
    static constexpr A kScale = A(1.0507009873554804934193349852946), kAlpha = A(1.6732632423543772848170429916717);
    static A value(A x) { return kScale * (x > 0 ? x : kAlpha * std::expm1(x)); }
    static A d1(A x) { return kScale * (x > 0 ? A(1) : kAlpha * std::exp(x)); }
    static A d2(A x) { return kScale * (x > 0 ? A(0) : kAlpha * std::exp(x)); }
};

template <typename A>
struct Softplus {  // torch takes it for linear above 20, which is exact in float32 and defines the derivatives in float64
    static A value(A x) { return x > 20 ? x : std::log1p(std::exp(x)); }
    static A d1(A x) { return x > 20 ? A(1) : sigmoid(x); }
    static A d2(A x) { return x > 20 ? A(0) : Sigmoid<A>::d1(x); }
};

template <typename A>
struct Swish {
    static A value(A x) { return x * sigmoid(x); }
    static A d1(A x) { const A s = sigmoid(x); return s * (1 + x * (1 - s)); }
    static A d2(A x) { const A s = sigmoid(x); return s * (1 - s) * (2 + x * (1 - 2 * s)); }
};

template <typename A>
struct Scalars {
    A alpha, gain, limit;
};

// One block: out from x (or y) and b and, for the derivatives, the gradients that are multiplied in.
template <typename A>
using Block = void (*)(A* out, const A* x, const A* b, const A* dy, const A* ddx, int64_t count, Scalars<A> k);

template <typename A>
void rectify(A* __restrict out, const A* __restrict x, const A* __restrict b, const A*, const A*, int64_t count, Scalars<A> k) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = clamped(k.gain * leaky(x[i] + b[i], k.alpha), k.limit);
}

template <typename A>
void rectify_grad(A* __restrict out, const A* __restrict y, const A*, const A* __restrict dy, const A*, int64_t count, Scalars<A> k) {
    const RectifierSlope<A> slope{k.gain, k.gain * k.alpha, k.limit};
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = dy[i] * slope(y[i]);
}

template <typename A, typename F, int order>
void smooth(A* __restrict out, const A* __restrict x, const A* __restrict b, const A* __restrict dy, const A* __restrict ddx, int64_t count, Scalars<A> k) {
    for (int64_t i = 0; i < count; ++i) {
        const A t = x[i] + b[i];
        if constexpr (order == 0) {
            out[i] = clamped(k.gain * F::value(t), k.limit);
        } else {
            const A factor = dy[i] * k.gain * (order == 1 ? F::d1(t) : ddx[i] * F::d2(t));
            out[i] = k.limit < INFINITY && std::abs(k.gain * F::value(t)) > k.limit ? A(0) : factor;
        }
    }
}

template <typename A, int order>
Block<A> block_of(int64_t act) {
    switch (act) {
        case kTanh: return smooth<A, Tanh<A>, order>;
        case kSigmoid: return smooth<A, Sigmoid<A>, order>;
        case kElu: return smooth<A, Elu<A>, order>;
        case kSelu: return smooth<A, Selu<A>, order>;
        case kSoftplus: return smooth<A, Softplus<A>, order>;
        case kSwish: return smooth<A, Swish<A>, order>;
        default: return order == 0 ? rectify<A> : rectify_grad<A>;
    }
}

// `count` elements as A: where they are if T is A, else converted into `buffer`. source may be null.
template <typename T, typename A>
const A* load(const T* source, int64_t start, int64_t count, A* buffer) {
    if (source == nullptr) return nullptr;
    if constexpr (std::is_same_v<T, A>) {
        return source + start;
    } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(source[start + i]);
        return buffer;
    }
}

struct Operands {
    Tensor out, x;  // all of one dense layout; x is y for rectify_grad
    OptionalTensor dy, ddx, b;
    int64_t dim;
};

// Runs `block` over dense memory, whatever the order of its dimensions: the bias of element i is b[i / inner % channels].
template <typename T, typename A>
void for_blocks(const Operands& op, Block<A> block, Scalars<A> k) {
    const T *x = op.x.const_data_ptr<T>(), *dy = data_or_null<T>(op.dy), *ddx = data_or_null<T>(op.ddx), *b = data_or_null<T>(op.b);
    T* out = op.out.mutable_data_ptr<T>();
    const int64_t numel = op.x.numel();
    const int64_t channels = b ? op.x.size(op.dim) : 1;
    const int64_t inner = channels > 1 ? op.x.stride(op.dim) : 1;
    // Rows begin with the same bias (channels are neighbours: one or several pixels), or have one bias each.
    const int64_t row = inner > 1 ? inner : channels * std::max<int64_t>(1, kBlock / channels);
    parallel((numel + row - 1) / row, row, [&](int64_t begin, int64_t end) {
        std::vector<A> biases(inner > 1 ? std::min(row, kBlock) : row, A(0)), buffers(std::is_same_v<T, A> ? 0 : 4 * kBlock);
        if (inner == 1 && b)
            for (int64_t i = 0; i < row; ++i) biases[i] = static_cast<A>(b[i % channels]);
        for (int64_t r = begin; r < end; ++r) {
            if (inner > 1) std::fill(biases.begin(), biases.end(), static_cast<A>(b[r % channels]));
            const int64_t stop = std::min(numel, (r + 1) * row);
            for (int64_t i = r * row; i < stop; i += kBlock) {
                const int64_t count = std::min(kBlock, stop - i);
                const A* block_b = biases.data() + (inner > 1 ? 0 : i - r * row);
                const A* block_x = load(x, i, count, buffers.data());
                const A* block_dy = load(dy, i, count, buffers.data() + kBlock);
                const A* block_ddx = load(ddx, i, count, buffers.data() + 2 * kBlock);
                if constexpr (std::is_same_v<T, A>) {
                    block(out + i, block_x, block_b, block_dy, block_ddx, count, k);
                } else {
                    A* result = buffers.data() + 3 * kBlock;
                    block(result, block_x, block_b, block_dy, block_ddx, count, k);
                    for (int64_t j = 0; j < count; ++j) out[i + j] = static_cast<T>(result[j]);
                }
            }
        }
    });
}

Tensor dense(const Tensor& t) { return t.is_non_overlapping_and_dense() ? t : t.clone(); }

// t in the memory layout of `like`, which is dense.
Tensor in_layout_of(const Tensor& like, const Tensor& t) {
    bool same = true;
    for (int64_t d = 0; d < t.dim(); ++d) same &= t.size(d) == 1 || t.stride(d) == like.stride(d);
    return same ? t : at::empty_like(like).copy_(t);
}

void check_args(const char* op, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, int64_t first_act) {
    TORCH_CHECK(act >= first_act && act < kActs, op, ": expected an activation index from ", first_act, " to ", kActs - 1, ", found ", act);
    if (!b.has_value()) return;
    TORCH_CHECK(dim >= 0 && dim < x.dim(), op, ": expected a dimension of x ", x.sizes(), " for the bias, found ", dim);
    TORCH_CHECK(b->dim() == 1 && b->size(0) == x.size(dim) && b->scalar_type() == x.scalar_type(), op, ": expected b [", x.size(dim), "] ", x.scalar_type(),
                " for dimension ", dim, " of x ", x.sizes(), ", found ", b->sizes(), " ", b->scalar_type());
}

OptionalTensor contiguous(const OptionalTensor& b) { return b.has_value() ? OptionalTensor(b->contiguous()) : b; }

double slope_of(int64_t act, double alpha) { return act == kLinear ? 1 : act == kRelu ? 0 : alpha; }

Tensor bias_act(const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
    check_args("bias_act", x, b, dim, act, 0);
    const Tensor source = dense(x), y = at::empty_like(source);
    M2M_DISPATCH(x, "bias_act", [&] {
        using A = acc_t<scalar_t>;
        for_blocks<scalar_t, A>({y, source, {}, {}, contiguous(b), dim}, block_of<A, 0>(act),
                                {static_cast<A>(slope_of(act, alpha)), static_cast<A>(gain), limit_of<A>(clamp)});
    });
    return y;
}

Tensor bias_act_grad(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& y, int64_t dim, int64_t act, double alpha,
                     double gain, double clamp) {
    const bool rectifier = act <= kLrelu;
    const OptionalTensor& saved = rectifier ? y : x;
    TORCH_CHECK(saved.has_value(), "bias_act_grad: expected ", rectifier ? "y" : "x", " for activation ", act, ", found None");
    check_same("bias_act_grad", rectifier ? "y" : "x", *saved, "dy", dy);
    const OptionalTensor bias = rectifier ? OptionalTensor() : contiguous(b);
    check_args("bias_act_grad", dy, bias, dim, act, 0);
    const Tensor source = dense(dy), dx = at::empty_like(source);
    M2M_DISPATCH(dy, "bias_act_grad", [&] {
        using A = acc_t<scalar_t>;
        const A limit = rectifier ? rectifier_slope<scalar_t>(alpha, gain, clamp).limit : limit_of<A>(clamp);
        for_blocks<scalar_t, A>({dx, in_layout_of(source, *saved), source, {}, bias, dim}, block_of<A, 1>(act),
                                {static_cast<A>(slope_of(act, alpha)), static_cast<A>(gain), limit});
    });
    return dx;
}

Tensor bias_act_grad2(const Tensor& ddx, const Tensor& dy, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                      double clamp) {
    check_same("bias_act_grad2", "dy", dy, "ddx", ddx);
    check_same("bias_act_grad2", "x", x, "ddx", ddx);
    check_args("bias_act_grad2", x, b, dim, act, kTanh);
    const Tensor source = dense(ddx), out = at::empty_like(source);
    M2M_DISPATCH(x, "bias_act_grad2", [&] {
        using A = acc_t<scalar_t>;
        for_blocks<scalar_t, A>({out, in_layout_of(source, x), in_layout_of(source, dy), source, contiguous(b), dim}, block_of<A, 2>(act),
                                {static_cast<A>(alpha), static_cast<A>(gain), limit_of<A>(clamp)});
    });
    return out;
}

TORCH_LIBRARY_IMPL(m2m_stylegan, CPU, m) {
    m.impl("bias_act", bias_act);
    m.impl("bias_act_grad", bias_act_grad);
    m.impl("bias_act_grad2", bias_act_grad2);
}

}  // namespace
}  // namespace m2m_stylegan
