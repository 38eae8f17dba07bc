// bias_act: clamp(gain * act(x + b)) and its first two derivatives, element by element, in one pass over memory.
#include "common.h"

#include <cstdint>
#include <cstring>

namespace m2m_stylegan {
namespace {

constexpr int64_t kBlock = 1024;  // elements handled at a time: fits into the first-level cache with all its operands

// Indices of ops/reference.py ACTIVATIONS.
enum Act { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish, kActs };

// exp(x) = scale * (1 + rest): scale is a power of two and rest = exp(r) - 1 for |r| <= ln(2) / 2. Written out because the C library's functions
// are not vectorised. Good to a few units in the last place; results below the normal range are zero.
template <typename A>
struct Exp {
    static constexpr bool kDouble = std::is_same_v<A, double>;
    static constexpr int kMantissa = kDouble ? 52 : 23, kBias = kDouble ? 1023 : 127, kTerms = kDouble ? 13 : 7;
    using Bits = std::conditional_t<kDouble, uint64_t, uint32_t>;

    A scale, rest;

    explicit Exp(A x) {
        constexpr A kLog2e = A(1.4426950408889634), kRound = A(1.5) * (Bits(1) << kMantissa);  // adding kRound rounds to an integer, in the low bits
        constexpr A kLn2High = kDouble ? A(6.93147180369123816490e-01) : A(0.693359375);
        constexpr A kLn2Low = kDouble ? A(1.90821492927058770002e-10) : A(-2.12194440054690583e-4);
        constexpr A kMax = A(kBias + 1) / kLog2e, kMin = -A(kBias) / kLog2e;  // where scale becomes infinite and zero
        x = x > kMax ? kMax : x;
        x = x < kMin ? kMin : x;
        const A rounded = x * kLog2e + kRound, n = rounded - kRound, r = (x - n * kLn2High) - n * kLn2Low;
        Bits bits;
        std::memcpy(&bits, &rounded, sizeof(bits));
        bits = (bits + kBias) << kMantissa;
        std::memcpy(&scale, &bits, sizeof(bits));
        rest = 1;
        for (int k = kTerms; k > 1; --k) rest = 1 + rest * (r * (1 / A(k)));  // Taylor
        rest *= r;
    }

    A value() const { return scale * (1 + rest); }
    A minus_one() const { return scale * rest + (scale - 1); }  // x <= 0
};

// log(1 + u) for 0 <= u <= 1 as 2 artanh(u / (2 + u)).
template <typename A>
A log1p(A u) {
    const A z = u / (2 + u), z2 = z * z;
    A sum = 0;
    for (int k = std::is_same_v<A, double> ? 31 : 13; k > 0; k -= 2) sum = sum * z2 + 1 / A(k);
    return 2 * z * sum;
}

// A function of x and its first two derivatives. Both sides of a choice are computed before it: a loop with branches is not vectorised.
template <typename A>
struct Jet {
    A value, d1, d2;
};

template <typename A>
struct Tanh {
    static Jet<A> at(A x) {
        const Exp<A> exp(-2 * std::abs(x));
        const A e = exp.minus_one(), f = 1 / (2 + e), t = std::copysign(-e * f, x), d1 = 4 * exp.value() * f * f;  // 1 - t * t would cancel
        return {t, d1, -2 * t * d1};
    }
};

template <typename A>
struct Sigmoid {
    static Jet<A> at(A x) {
        const A s = 1 / (1 + Exp<A>(-x).value()), d1 = s * (1 - s);
        return {s, d1, d1 * (1 - 2 * s)};
    }
};

template <typename A>
struct Elu {
    static Jet<A> at(A x) {
        const Exp<A> e(x);
        const A exp = e.value(), minus_one = e.minus_one();
        return {x > 0 ? x : minus_one, x > 0 ? A(1) : exp, x >= 0 ? A(0) : exp};
    }
};

template <typename A>
struct Selu {  // Klambauer et al., arXiv 1706.02515, eq. 14
    static Jet<A> at(A x) {
        constexpr A kScale = A(1.0507009873554804934193349852946), kAlpha = A(1.6732632423543772848170429916717);
        const Exp<A> e(x);
        const A exp = kScale * kAlpha * e.value(), minus_one = kScale * kAlpha * e.minus_one();
        return {x > 0 ? kScale * x : minus_one, x > 0 ? kScale : exp, x >= 0 ? A(0) : exp};
    }
};

template <typename A>
struct Softplus {  // torch takes it for linear above 20
    static Jet<A> at(A x) {
        const A u = Exp<A>(-std::abs(x)).value(), y = (x > 0 ? x : A(0)) + log1p(u), s = (x > 0 ? A(1) : u) / (1 + u), d2 = s * (1 - s);
        return {x > 20 ? x : y, x > 20 ? A(1) : s, x > 20 ? A(0) : d2};
    }
};

template <typename A>
struct Swish {
    static Jet<A> at(A x) {
        const Jet<A> s = Sigmoid<A>::at(x);
        return {x * s.value, s.value + x * s.d1, 2 * s.d1 + x * s.d2};
    }
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
void smooth(A* __restrict out, const A* __restrict x, const A* __restrict b, const A* __restrict dy, const A* __restrict ddx, int64_t count,
            Scalars<A> k) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const Jet<A> f = F::at(x[i] + b[i]);
        const A y = k.gain * f.value;
        if constexpr (order == 0) {
            out[i] = clamped(y, k.limit);
        } else {
            const A factor = dy[i] * k.gain * (order == 1 ? f.d1 : ddx[i] * f.d2);
            out[i] = std::abs(y) > k.limit ? A(0) : factor;
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

struct Operands {
    Tensor out, x;  // all of one dense layout; x is y for rectify_grad
    OptionalTensor dy, ddx, b;
    int64_t dim;
};

// Runs `block` over dense memory, whatever the order of its dimensions: the bias of element i is b[i / inner % channels].
template <typename A>
void for_blocks(const Operands& op, Block<A> block, Scalars<A> k) {
    const A *x = op.x.const_data_ptr<A>(), *dy = data_or_null<A>(op.dy), *ddx = data_or_null<A>(op.ddx), *b = data_or_null<A>(op.b);
    A* out = op.out.mutable_data_ptr<A>();
    const int64_t numel = op.x.numel();
    if (numel == 0) return;
    const int64_t channels = b ? op.x.size(op.dim) : 1;
    const int64_t inner = channels > 1 ? op.x.stride(op.dim) : 1;
    // Rows begin with the same bias (channels are neighbours: one or several pixels), or have one bias each.
    const int64_t row = inner > 1 ? inner : channels * std::max<int64_t>(1, kBlock / channels);
    parallel((numel + row - 1) / row, row, [&](int64_t begin, int64_t end) {
        std::vector<A> biases(inner > 1 ? std::min(row, kBlock) : row, A(0));
        if (inner == 1 && b)
            for (int64_t i = 0; i < row; ++i) biases[i] = b[i % channels];
        for (int64_t r = begin; r < end; ++r) {
            if (inner > 1) std::fill(biases.begin(), biases.end(), b[r % channels]);
            const int64_t stop = std::min(numel, (r + 1) * row);
            for (int64_t i = r * row; i < stop; i += kBlock) {
                const A* block_b = biases.data() + (inner > 1 ? 0 : i - r * row);
                block(out + i, x + i, block_b, dy ? dy + i : nullptr, ddx ? ddx + i : nullptr, std::min(kBlock, stop - i), k);
            }
        }
    });
}

// t as the kernels take it: dense.
Tensor prepared(const Tensor& t) { return t.is_non_overlapping_and_dense() ? widen(t) : widen(t.clone()); }

// t in the memory layout and dtype of `like`, which is prepared.
Tensor prepared_like(const Tensor& like, const Tensor& t) {
    bool same = t.scalar_type() == like.scalar_type();
    for (int64_t d = 0; d < t.dim(); ++d) same &= t.size(d) == 1 || t.stride(d) == like.stride(d);
    return same ? t : at::empty_like(like).copy_(t);
}

void check_args(const char* op, const char* name, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, int64_t first_act) {
    check_dtype(op, name, x);
    TORCH_CHECK(act >= first_act && act < kActs, op, ": expected an activation index from ", first_act, " to ", kActs - 1, ", found ", act);
    if (!b.has_value()) return;
    TORCH_CHECK(dim >= 0 && dim < x.dim(), op, ": expected a dimension of x ", x.sizes(), " for the bias, found ", dim);
    TORCH_CHECK(b->dim() == 1 && b->size(0) == x.size(dim) && b->scalar_type() == x.scalar_type(), op, ": expected b [", x.size(dim), "] ",
                x.scalar_type(), " for dimension ", dim, " of x ", x.sizes(), ", found ", b->sizes(), " ", b->scalar_type());
}

// The bias as the kernels take it.
OptionalTensor prepared(const OptionalTensor& b) { return b.has_value() ? OptionalTensor(widen(*b).contiguous()) : b; }

double slope_of(int64_t act, double alpha) { return act == kLinear ? 1 : act == kRelu ? 0 : alpha; }

Tensor bias_act(const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
    check_args("bias_act", "x", x, b, dim, act, 0);
    const Tensor source = prepared(x), y = at::empty_like(source);
    M2M_DISPATCH(x, "bias_act", [&] {
        for_blocks<scalar_t>({y, source, {}, {}, prepared(b), dim}, block_of<scalar_t, 0>(act),
                             {static_cast<scalar_t>(slope_of(act, alpha)), static_cast<scalar_t>(gain), limit_of<scalar_t>(clamp)});
    });
    return cast(y, x.scalar_type());
}

Tensor bias_act_grad(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& y, int64_t dim, int64_t act,
                     double alpha, double gain, double clamp) {
    const bool rectifier = act <= kLrelu;
    const OptionalTensor& saved = rectifier ? y : x;
    const OptionalTensor bias = rectifier ? OptionalTensor() : b;
    check_args("bias_act_grad", "dy", dy, bias, dim, act, 0);
    TORCH_CHECK(saved.has_value(), "bias_act_grad: expected ", rectifier ? "y" : "x", " for activation ", act, ", found None");
    check_same("bias_act_grad", rectifier ? "y" : "x", *saved, "dy", dy);
    if (rectifier) check_rectifier("bias_act_grad", slope_of(act, alpha), gain);
    const Tensor source = prepared(dy), dx = at::empty_like(source);
    M2M_DISPATCH(dy, "bias_act_grad", [&] {
        const auto slope = rectifier_slope<scalar_t>(slope_of(act, alpha), gain, clamp, dy.scalar_type());
        for_blocks<scalar_t>({dx, prepared_like(source, *saved), source, {}, prepared(bias), dim}, block_of<scalar_t, 1>(act),
                             {static_cast<scalar_t>(slope_of(act, alpha)), slope.positive, rectifier ? slope.limit : limit_of<scalar_t>(clamp)});
    });
    return cast(dx, dy.scalar_type());
}

Tensor bias_act_grad2(const Tensor& ddx, const Tensor& dy, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha,
                      double gain, double clamp) {
    check_args("bias_act_grad2", "x", x, b, dim, act, kTanh);
    check_same("bias_act_grad2", "dy", dy, "ddx", ddx);
    check_same("bias_act_grad2", "x", x, "ddx", ddx);
    const Tensor source = prepared(ddx), out = at::empty_like(source);
    M2M_DISPATCH(x, "bias_act_grad2", [&] {
        for_blocks<scalar_t>({out, prepared_like(source, x), prepared_like(source, dy), source, prepared(b), dim}, block_of<scalar_t, 2>(act),
                             {static_cast<scalar_t>(alpha), static_cast<scalar_t>(gain), limit_of<scalar_t>(clamp)});
    });
    return cast(out, x.scalar_type());
}

TORCH_LIBRARY_IMPL(m2m_stylegan, CPU, m) {
    m.impl("bias_act", bias_act);
    m.impl("bias_act_grad", bias_act_grad);
    m.impl("bias_act_grad2", bias_act_grad2);
}

}  // namespace
}  // namespace m2m_stylegan
