// The CUDA kernels as torch operators: checks, layouts, allocation, device and stream. Headers are narrow, see csrc/cpu/common.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace m2m_stylegan {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

cuda::Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kHalf: return cuda::Dtype::half;
        case at::kBFloat16: return cuda::Dtype::bfloat16;
        case at::kFloat: return cuda::Dtype::float32;
        case at::kDouble: return cuda::Dtype::float64;
        default: TORCH_CHECK(false, op, ": expected ", name, " of dtype Float, Double, Half or BFloat16, found ", t.scalar_type());
    }
}

at::ScalarType acc_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// launcher(p) on the current stream of x's device.
template <typename P>
void run(int (*launcher)(const P&, void*), const P& p, const Tensor& x) {
    const c10::cuda::CUDAGuard guard(x.device());
    C10_CUDA_CHECK(static_cast<cudaError_t>(launcher(p, c10::cuda::getCurrentCUDAStream().stream())));
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
    TORCH_CHECK(t.device() == x.device(), op, ": expected all tensors on ", x.device(), ", found ", name, " on ", t.device());
}

void check_same(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
    TORCH_CHECK(t.sizes() == like.sizes() && t.scalar_type() == like.scalar_type(), op, ": expected ", name, " of the shape and dtype of ", like_name, ", ",
                like.sizes(), " ", like.scalar_type(), ", found ", t.sizes(), " ", t.scalar_type());
    check_device(op, name, t, like);
}

// Only then do sign and size of a result tell the slope.
void check_rectifier(const char* op, double alpha, double gain) {
    TORCH_CHECK(alpha >= 0 && gain > 0, op, ": expected alpha >= 0 and gain > 0, found alpha = ", alpha, ", gain = ", gain);
}

OptionalTensor contiguous(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->contiguous()) : t; }

const void* data(const Tensor& t) { return t.const_data_ptr(); }
const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

void* wanted(bool want, const Tensor& t) { return want ? t.mutable_data_ptr() : nullptr; }

cuda::Axis make_axis(int64_t in, int64_t up, int64_t down, int64_t pad0, int64_t pad1, int64_t taps) {
    for (int64_t value : {in, up, down, pad0, pad1, taps})
        TORCH_CHECK(std::abs(value) < int64_t{1} << 31, "upfirdn2d: expected sizes, factors and padding below 2^31, found ", value);
    const int64_t padded = in * up + pad0 + pad1, largest = in * up + std::max<int64_t>(pad0, 0) + std::max<int64_t>(pad1, 0);
    TORCH_CHECK(largest < int64_t{1} << 31, "upfirdn2d: expected a padded size below 2^31, found ", largest);
    return {in, padded < taps ? 0 : (padded - taps) / down + 1, taps, up, down, pad0};
}

Tensor upfirdn2d(const Tensor& x, const Tensor& f, int64_t upx, int64_t upy, int64_t downx, int64_t downy, int64_t padx0, int64_t padx1, int64_t pady0,
                 int64_t pady1, bool flip, double gain) {
    TORCH_CHECK(x.dim() == 4, "upfirdn2d: expected x [N, C, H, W], found shape ", x.sizes());
    cuda::Upfirdn2d p{};
    p.dtype = dtype_of("upfirdn2d", "x", x);
    TORCH_CHECK(f.dim() == 2 && f.numel() > 0 && (f.scalar_type() == at::kFloat || f.scalar_type() == at::kDouble),
                "upfirdn2d: expected a filter [taps_y, taps_x] Float or Double, found ", f.sizes(), " ", f.scalar_type());
    check_device("upfirdn2d", "the filter", f, x);
    TORCH_CHECK(upx >= 1 && upy >= 1 && downx >= 1 && downy >= 1, "upfirdn2d: expected up and down of at least 1, found up (x, y) = (", upx, ", ", upy,
                "), down (x, y) = (", downx, ", ", downy, ")");
    p.x = make_axis(x.size(3), upx, downx, padx0, padx1, f.size(1));
    p.y = make_axis(x.size(2), upy, downy, pady0, pady1, f.size(0));
    TORCH_CHECK(p.x.out > 0 && p.y.out > 0, "upfirdn2d: expected a padded input of at least ", f.size(0), " x ", f.size(1),
                " (height x width), the size of the filter, found ", p.y.in * upy + pady0 + pady1, " x ", p.x.in * upx + padx0 + padx1);
    const auto format = x.suggest_memory_format();
    const Tensor filter = f.contiguous(), y = at::empty({x.size(0), x.size(1), p.y.out, p.x.out}, x.options(), format);
    if (y.numel() == 0) return y;
    p.samples = x.size(0), p.channels = x.size(1);
    p.input = data(x), p.filter = data(filter), p.output = y.mutable_data_ptr();
    std::copy(x.strides().begin(), x.strides().end(), p.input_stride);  // Views need no copy.
    p.filter_is_double = f.scalar_type() == at::kDouble, p.flip = flip, p.gain = gain;
    p.channels_last = format == at::MemoryFormat::ChannelsLast;
    run(cuda::upfirdn2d, p, x);
    return y;
}

Tensor dense(const Tensor& t) { return t.is_non_overlapping_and_dense() ? t : t.clone(); }

// t in the memory layout of `like`, which is dense.
Tensor in_layout_of(const Tensor& like, const Tensor& t) {
    bool same = true;
    for (int64_t d = 0; d < t.dim(); ++d) same &= t.size(d) == 1 || t.stride(d) == like.stride(d);
    return same ? t : at::empty_like(like).copy_(t);
}

double slope_of(int64_t act, double alpha) { return act == cuda::kLinear ? 1 : act == cuda::kRelu ? 0 : alpha; }

void check_args(const char* op, const char* name, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, int64_t first_act) {
    dtype_of(op, name, x);
    TORCH_CHECK(act >= first_act && act < cuda::kActs, op, ": expected an activation index from ", first_act, " to ", cuda::kActs - 1, ", found ", act);
    if (!b.has_value()) return;
    TORCH_CHECK(dim >= 0 && dim < x.dim(), op, ": expected a dimension of x ", x.sizes(), " for the bias, found ", dim);
    TORCH_CHECK(b->dim() == 1 && b->size(0) == x.size(dim) && b->scalar_type() == x.scalar_type(), op, ": expected b [", x.size(dim), "] ", x.scalar_type(),
                " for dimension ", dim, " of x ", x.sizes(), ", found ", b->sizes(), " ", b->scalar_type());
    check_device(op, "b", *b, x);
}

// x, which is dense, decides on the layout.
Tensor run_bias_act(const char* op, const Tensor& x, const OptionalTensor& dy, const OptionalTensor& ddx, const OptionalTensor& b_any, int64_t dim, int64_t act,
                    double alpha, double gain, double clamp) {
    const Tensor out = at::empty_like(x);
    if (out.numel() == 0) return out;
    const OptionalTensor b = contiguous(b_any);
    const bool several = b.has_value() && b->size(0) > 1;
    run(cuda::bias_act,
        cuda::BiasAct{dtype_of(op, "x", x), static_cast<int>(act), slope_of(act, alpha), gain, clamp, x.numel(), data(x), data(dy), data(ddx), data(b), several ? b->size(0) : 1,
                      several ? x.stride(dim) : 1, out.mutable_data_ptr()},
        x);
    return out;
}

Tensor bias_act(const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain, double clamp) {
    check_args("bias_act", "x", x, b, dim, act, 0);
    return run_bias_act("bias_act", dense(x), {}, {}, b, dim, act, alpha, gain, clamp);
}

Tensor bias_act_grad(const Tensor& dy_any, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& y, int64_t dim, int64_t act, double alpha,
                     double gain, double clamp) {
    const bool rectifier = act <= cuda::kLrelu;
    const OptionalTensor &saved = rectifier ? y : x, bias = rectifier ? OptionalTensor() : b;
    check_args("bias_act_grad", "dy", dy_any, bias, dim, act, 0);
    TORCH_CHECK(saved.has_value(), "bias_act_grad: expected ", rectifier ? "y" : "x", " for activation ", act, ", found None");
    check_same("bias_act_grad", rectifier ? "y" : "x", *saved, "dy", dy_any);
    if (rectifier) check_rectifier("bias_act_grad", slope_of(act, alpha), gain);
    const Tensor dy = dense(dy_any);
    return run_bias_act("bias_act_grad", in_layout_of(dy, *saved), dy, {}, bias, dim, act, alpha, gain, clamp);
}

Tensor bias_act_grad2(const Tensor& ddx_any, const Tensor& dy, const Tensor& x, const OptionalTensor& b, int64_t dim, int64_t act, double alpha, double gain,
                      double clamp) {
    check_args("bias_act_grad2", "x", x, b, dim, act, cuda::kTanh);
    check_same("bias_act_grad2", "dy", dy, "ddx", ddx_any);
    check_same("bias_act_grad2", "x", x, "ddx", ddx_any);
    const Tensor ddx = dense(ddx_any);
    return run_bias_act("bias_act_grad2", in_layout_of(ddx, x), in_layout_of(ddx, dy), ddx, b, dim, act, alpha, gain, clamp);
}

void check_small(const char* op, const char* name, const OptionalTensor& t, at::IntArrayRef shape, const Tensor& x) {
    if (!t.has_value()) return;
    TORCH_CHECK(t->sizes() == shape && t->scalar_type() == acc_type(x), op, ": expected ", name, " ", shape, " ", acc_type(x), " for features ", x.sizes(),
                " ", x.scalar_type(), ", found ", t->sizes(), " ", t->scalar_type());
    check_device(op, name, *t, x);
}

void check_features(const char* op, const char* name, const Tensor& x, const OptionalTensor& scale) {
    TORCH_CHECK(x.dim() == 4, op, ": expected ", name, " [N, C, H, W], found shape ", x.sizes());
    dtype_of(op, name, x);
    check_small(op, "scale", scale, {x.size(0), x.size(1)}, x);
}

void check_noise(const char* op, const Tensor& x, const OptionalTensor& noise, const OptionalTensor& strength) {
    check_small(op, "strength", strength, {}, x);
    TORCH_CHECK(noise.has_value() || !strength.has_value(), op, ": expected noise with strength, found None");
    if (!noise.has_value()) return;
    const bool fits = noise->dim() == 4 && (noise->size(0) == x.size(0) || noise->size(0) == 1) && noise->size(1) == 1 && noise->size(2) == x.size(2) &&
                      noise->size(3) == x.size(3);
    TORCH_CHECK(fits && noise->scalar_type() == acc_type(x), op, ": expected noise [N or 1, 1, H, W] ", acc_type(x), " for features ", x.sizes(), " ",
                x.scalar_type(), ", found ", noise->sizes(), " ", noise->scalar_type());
    check_device(op, "noise", *noise, x);
}

// A tensor of the shape and dtype of dy, in the given layout. It may be missing only if it is not needed.
OptionalTensor operand(const char* op, const char* name, const OptionalTensor& t, const Tensor& dy, at::MemoryFormat format, bool needed) {
    TORCH_CHECK(t.has_value() || !needed, op, ": expected ", name, ", found None");
    if (!t.has_value()) return t;
    check_same(op, name, *t, "dy", dy);
    return t->contiguous(format);
}

bool is_per_sample(const OptionalTensor& noise) { return noise.has_value() && noise->size(0) > 1; }

// The slope is the same on both sides and nothing is clamped: y is not needed.
bool is_linear(double alpha, double clamp) { return alpha == 1 && clamp < 0; }

cuda::Features features(const char* op, const Tensor& x, at::MemoryFormat format, double alpha, double gain, double clamp) {
    return {dtype_of(op, "x", x), format == at::MemoryFormat::ChannelsLast, x.size(0), x.size(1), x.size(2) * x.size(3), alpha, gain, clamp};
}

Tensor workspace(const cuda::Features& f, bool needed, const Tensor& x) {
    return at::empty({needed ? cuda::workspace_bytes(f) : 0}, x.options().dtype(at::kByte));
}

Tensor epilogue(const Tensor& x_any, const OptionalTensor& scale_any, const OptionalTensor& noise_any, const OptionalTensor& strength,
                const OptionalTensor& b_any, double alpha, double gain, double clamp) {
    constexpr const char* op = "epilogue";
    check_features(op, "x", x_any, scale_any);
    check_noise(op, x_any, noise_any, strength);
    check_small(op, "b", b_any, {x_any.size(1)}, x_any);
    const auto format = x_any.suggest_memory_format();
    const Tensor x = x_any.contiguous(format), y = at::empty(x.sizes(), x.options(), format);
    const OptionalTensor scale = contiguous(scale_any), noise = contiguous(noise_any), b = contiguous(b_any);
    const cuda::Features f = features(op, x, format, alpha, gain, clamp);
    if (y.numel() == 0) return y;
    run(cuda::epilogue, cuda::Epilogue{f, data(x), data(scale), data(noise), data(strength), data(b), is_per_sample(noise), y.mutable_data_ptr()}, x);
    return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> epilogue_grad(const Tensor& dy_any, const OptionalTensor& x_any, const OptionalTensor& y_any,
                                                                 const OptionalTensor& scale_any, const OptionalTensor& noise_any,
                                                                 const OptionalTensor& strength, double alpha, double gain, double clamp,
                                                                 std::array<bool, 5> mask) {
    constexpr const char* op = "epilogue_grad";
    const auto [want_x, want_scale, want_noise, want_strength, want_b] = mask;
    check_features(op, "dy", dy_any, scale_any);
    check_noise(op, dy_any, noise_any, strength);
    TORCH_CHECK(noise_any.has_value() || !(want_noise || want_strength), op,
                ": expected noise, whose or whose strength's gradient is asked for, found None");
    check_rectifier(op, alpha, gain);
    const auto format = dy_any.suggest_memory_format();
    const Tensor dy = dy_any.contiguous(format);
    const OptionalTensor x = operand(op, "x", x_any, dy, format, want_scale), y = operand(op, "y", y_any, dy, format, !is_linear(alpha, clamp));
    const OptionalTensor scale = contiguous(scale_any), noise = contiguous(noise_any);

    const auto small = dy.options().dtype(acc_type(dy));
    const Tensor dx = want_x ? at::empty(dy.sizes(), dy.options(), format) : at::empty({0}, dy.options());
    const Tensor dscale = at::empty(want_scale ? at::DimVector({dy.size(0), dy.size(1)}) : at::DimVector({0}), small);
    const Tensor dnoise = want_noise ? at::empty(noise->sizes(), small) : at::empty({0}, small);
    const Tensor dstrength = want_strength ? at::empty({}, small) : at::empty({0}, small);
    const Tensor db = at::empty({want_b ? dy.size(1) : 0}, small);
    const cuda::Features f = features(op, dy, format, alpha, gain, clamp);
    if (dy.numel() == 0) {
        for (const Tensor& sum : {dscale, dnoise, dstrength, db}) sum.zero_();
    } else {
        const Tensor scratch = workspace(f, want_scale || want_strength || want_b, dy);
        run(cuda::epilogue_grad,
            cuda::EpilogueGrad{f, data(dy), data(x), data(y), data(scale), data(noise), data(strength), is_per_sample(noise), wanted(want_x, dx),
                               wanted(want_scale, dscale), wanted(want_noise, dnoise), wanted(want_strength, dstrength), wanted(want_b, db),
                               scratch.mutable_data_ptr()},
            dy);
    }
    return {dx, dscale, dnoise, dstrength, db};
}

std::tuple<Tensor, Tensor, Tensor> epilogue_grad2(const Tensor& ddx_any, const OptionalTensor& ddscale_any, const Tensor& dy_any,
                                                  const OptionalTensor& x_any, const OptionalTensor& y_any, const OptionalTensor& scale_any, double alpha,
                                                  double gain, double clamp, std::array<bool, 3> mask) {
    constexpr const char* op = "epilogue_grad2";
    const auto [want_dy, want_x, want_scale] = mask;
    check_features(op, "dy", dy_any, scale_any);
    check_small(op, "ddscale", ddscale_any, {dy_any.size(0), dy_any.size(1)}, dy_any);
    TORCH_CHECK(ddscale_any.has_value() || !want_x, op, ": expected ddscale for the gradient of x, found None");
    check_rectifier(op, alpha, gain);
    check_same(op, "ddx", ddx_any, "dy", dy_any);
    const auto format = dy_any.suggest_memory_format();
    const Tensor dy = dy_any.contiguous(format), ddx = ddx_any.contiguous(format);
    const OptionalTensor x = operand(op, "x", x_any, dy, format, ddscale_any.has_value());
    const OptionalTensor y = operand(op, "y", y_any, dy, format, !is_linear(alpha, clamp));
    const OptionalTensor scale = contiguous(scale_any), ddscale = contiguous(ddscale_any);

    const Tensor gdy = want_dy ? at::empty(dy.sizes(), dy.options(), format) : at::empty({0}, dy.options());
    const Tensor gx = want_x ? at::empty(dy.sizes(), dy.options(), format) : at::empty({0}, dy.options());
    const Tensor gscale = at::empty(want_scale ? at::DimVector({dy.size(0), dy.size(1)}) : at::DimVector({0}), dy.options().dtype(acc_type(dy)));
    const cuda::Features f = features(op, dy, format, alpha, gain, clamp);
    if (dy.numel() == 0) {
        gscale.zero_();
    } else {
        const Tensor scratch = workspace(f, want_scale, dy);
        run(cuda::epilogue_grad2,
            cuda::EpilogueGrad2{f, data(ddx), data(ddscale), data(dy), data(x), data(y), data(scale), wanted(want_dy, gdy), wanted(want_x, gx),
                                wanted(want_scale, gscale), scratch.mutable_data_ptr()},
            dy);
    }
    return {gdy, gx, gscale};
}

TORCH_LIBRARY_IMPL(m2m_stylegan, CUDA, m) {
    m.impl("upfirdn2d", upfirdn2d);
    m.impl("bias_act", bias_act);
    m.impl("bias_act_grad", bias_act_grad);
    m.impl("bias_act_grad2", bias_act_grad2);
    m.impl("epilogue", epilogue);
    m.impl("epilogue_grad", epilogue_grad);
    m.impl("epilogue_grad2", epilogue_grad2);
}

}  // namespace
}  // namespace m2m_stylegan
