// What the CPU kernels share. Headers are narrow: torch/extension.h or ATen/ATen.h would multiply the time of the build.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace m2m_stylegan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The dtype of the arithmetic. Half precision is stored but not computed with: on a CPU it is rare, and not worth kernels of its own.
// Its operands are widened (no copy for the others), and results rounded once.
inline at::ScalarType acc_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
inline Tensor cast(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }  // spares the dispatcher
inline Tensor widen(const Tensor& t) { return cast(t, acc_type(t)); }

#define M2M_DISPATCH(tensor, name, ...) AT_DISPATCH_FLOATING_TYPES(acc_type(tensor), name, __VA_ARGS__)

// f(begin, end) over [0, tasks), in the calling thread if there are too few elements for waking others to pay.
template <typename F>
void parallel(int64_t tasks, int64_t elements_per_task, const F& f) {
    constexpr int64_t kGrain = 32768;
    at::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_task)), f);
}

template <typename T>
const T* data_or_null(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr<T>() : nullptr; }

// max(min(y, limit), -limit) that lets NaN through; limit may be infinite.
template <typename A>
A clamped(A y, A limit) {
    y = y > limit ? limit : y;
    return y < -limit ? -limit : y;
}

// The product is formed in any case: arithmetic inside a branch may trap, which keeps compilers from vectorising it.
template <typename A>
A leaky(A x, A alpha) {
    const A negative = alpha * x;
    return x > 0 ? x : negative;
}

// d clamp(gain * leaky(x)) / dx from the value y: its sign and size tell all.
template <typename A>
struct RectifierSlope {
    A positive, negative, limit;  // NaN as limit means none: no y compares greater or equal

    A operator()(A y) const {
        const A slope = y > 0 ? positive : negative;
        return std::abs(y) >= limit ? A(0) : slope;
    }
};

// For y in `dtype`: a clamped y has been rounded to it, and so has the limit here.
template <typename A>
RectifierSlope<A> rectifier_slope(double alpha, double gain, double clamp, at::ScalarType dtype) {
    A limit = clamp < 0 ? std::numeric_limits<A>::quiet_NaN() : static_cast<A>(clamp);
    if (dtype == at::kHalf) limit = static_cast<A>(static_cast<at::Half>(static_cast<float>(limit)));
    if (dtype == at::kBFloat16) limit = static_cast<A>(static_cast<at::BFloat16>(static_cast<float>(limit)));
    return {static_cast<A>(gain), static_cast<A>(gain * alpha), limit};
}

template <typename A>
A limit_of(double clamp) { return clamp < 0 ? std::numeric_limits<A>::infinity() : static_cast<A>(clamp); }

// Only then do sign and size of a result tell the slope.
inline void check_rectifier(const char* op, double alpha, double gain) {
    TORCH_CHECK(alpha >= 0 && gain > 0, op, ": expected alpha >= 0 and gain > 0, found alpha = ", alpha, ", gain = ", gain);
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
    const auto dtype = t.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, op, ": expected ", name,
                " of dtype Float, Double, Half or BFloat16, found ", dtype);
}

inline void check_same(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
    TORCH_CHECK(t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), op, ": expected ", name, " of the shape and dtype of ",
                like_name, ", ", like.sizes(), " ", like.scalar_type(), ", found ", t.sizes(), " ", t.scalar_type());
}

}  // namespace m2m_stylegan
