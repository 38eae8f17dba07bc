// epilogue: what follows a modulated convolution, clamp(gain * lrelu(x * scale + noise * strength + b)), and its gradients, each in one pass over
// memory. The order of all sums depends on shapes alone, so results are the same for any number of threads.
#include <array>
#include <tuple>

#include "planes.h"

namespace m2m_stylegan {
namespace {

template <typename A>
void forward_row(A* __restrict y, const A* __restrict x, const A* __restrict scale, const A* __restrict offset, A alpha, A gain, A limit,
                 int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        y[i] = clamped(gain * leaky(x[i] * scale[i] + offset[i], alpha), limit);
    }
}

// out = bias + noise * factor, the noise being the same for all channels of a pixel.
template <typename A>
void add_noise(A* __restrict out, const A* __restrict bias, const A* __restrict noise, A factor, int64_t pixels, int64_t neighbours) {
    if (neighbours == 1) {
        for (int64_t p = 0; p < pixels; ++p) out[p] = bias[p] + noise[p] * factor;
        return;
    }
    for (int64_t p = 0; p < pixels; ++p) {
        const A offset = noise[p] * factor;
        for (int64_t c = 0; c < neighbours; ++c) out[p * neighbours + c] = bias[p * neighbours + c] + offset;
    }
}

// g = dy * slope, and all that is summed or made of it; `g` is kept for the noise.
template <bool with_x, bool with_noise, typename A>
void grad_row(A* __restrict dx, A* __restrict sum_g, A* __restrict sum_gx, A* __restrict g, const A* dy, const A* y, const A* __restrict x,
              const A* __restrict scale, RectifierSlope<A> slope, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const A value = dy[i] * slope(y[i]);
        dx[i] = value * scale[i];
        sum_g[i] += value;
        if constexpr (with_x) sum_gx[i] += value * x[i];
        if constexpr (with_noise) g[i] = value;
    }
}

// Sums over the channels of each pixel.
template <typename A>
void add_pixels(double* __restrict sums, const A* __restrict g, int64_t pixels, int64_t neighbours) {
    if (neighbours == 1) {
        for (int64_t p = 0; p < pixels; ++p) sums[p] += g[p];
        return;
    }
    for (int64_t p = 0; p < pixels; ++p) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < neighbours; ++c) sum += g[p * neighbours + c];
        sums[p] += sum;
    }
}

template <bool with_x, typename A>
void grad2_row(A* __restrict gdy, A* __restrict gx, A* __restrict sum, const A* __restrict ddx, const A* dy, const A* y, const A* __restrict x,
               const A* __restrict scale, const A* __restrict ddscale, RectifierSlope<A> slope, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const A r = slope(y[i]), g = dy[i] * r, v = ddx[i];
        if constexpr (with_x) {
            gdy[i] = r * (v * scale[i] + ddscale[i] * x[i]);
            gx[i] = g * ddscale[i];
        } else {
            gdy[i] = r * (v * scale[i]);
        }
        sum[i] += g * v;
    }
}

void check_small(const char* op, const char* name, const OptionalTensor& t, at::IntArrayRef shape, const Tensor& x) {
    if (!t.has_value()) return;
    TORCH_CHECK(t->sizes() == shape && t->scalar_type() == acc_type(x), op, ": expected ", name, " ", shape, " ", acc_type(x), " for features ",
                x.sizes(), " ", x.scalar_type(), ", found ", t->sizes(), " ", t->scalar_type());
}

void check_args(const char* op, const char* name, const Tensor& x, const OptionalTensor& scale) {
    TORCH_CHECK(x.dim() == 4, op, ": expected ", name, " [N, C, H, W], found shape ", x.sizes());
    check_dtype(op, name, x);
    check_small(op, "scale", scale, {x.size(0), x.size(1)}, x);
}

void check_noise(const char* op, const Tensor& x, const OptionalTensor& noise, const OptionalTensor& strength) {
    check_small(op, "strength", strength, {}, x);
    TORCH_CHECK(noise.has_value() || !strength.has_value(), op, ": expected noise with strength, found None");
    if (!noise.has_value()) return;
    const bool fits = noise->dim() == 4 && (noise->size(0) == x.size(0) || noise->size(0) == 1) && noise->size(1) == 1 &&
                      noise->size(2) == x.size(2) && noise->size(3) == x.size(3);
    TORCH_CHECK(fits && noise->scalar_type() == acc_type(x), op, ": expected noise [N or 1, 1, H, W] ", acc_type(x), " for features ", x.sizes(), " ",
                x.scalar_type(), ", found ", noise->sizes(), " ", noise->scalar_type());
}

// A tensor of the shape and dtype of dy, widened and in layout l. It may be missing only if it is not needed.
OptionalTensor operand(const char* op, const char* name, const OptionalTensor& t, const Tensor& dy, const Layout& l, bool needed) {
    TORCH_CHECK(t.has_value() || !needed, op, ": expected ", name, ", found None");
    if (!t.has_value()) return t;
    check_same(op, name, *t, "dy", dy);
    return widen(*t).contiguous(l.format);
}

OptionalTensor contiguous(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(t->contiguous()) : t; }

template <typename A>
A value_or_one(const OptionalTensor& t) { return t.has_value() ? *t->const_data_ptr<A>() : A(1); }

// The slope is the same on both sides and nothing is clamped: y is not needed, and any number does in its place.
bool is_linear(double alpha, double clamp) { return alpha == 1 && clamp < 0; }

Tensor epilogue(const Tensor& x_any, const OptionalTensor& scale_any, const OptionalTensor& noise_any, const OptionalTensor& strength,
                const OptionalTensor& b_any, double alpha, double gain, double clamp) {
    check_args("epilogue", "x", x_any, scale_any);
    check_noise("epilogue", x_any, noise_any, strength);
    check_small("epilogue", "b", b_any, {x_any.size(1)}, x_any);
    const Layout l(x_any);
    const Tensor x = widen(x_any).contiguous(l.format), y = at::empty(x.sizes(), x.options(), l.format);
    const OptionalTensor scale = contiguous(scale_any), noise = contiguous(noise_any), b = contiguous(b_any);
    M2M_DISPATCH(x, "epilogue", [&] {
        using A = scalar_t;
        const A* x_data = x.const_data_ptr<A>();
        A* y_data = y.mutable_data_ptr<A>();
        const A* noise_data = data_or_null<A>(noise);
        const int64_t noise_step = noise.has_value() && noise->size(0) > 1 ? l.pixels : 0;
        const A factor = value_or_one<A>(strength), slope = static_cast<A>(alpha), gain_a = static_cast<A>(gain), limit = limit_of<A>(clamp);
        l.for_tasks([&](int64_t begin, int64_t end) {
            Tile<A> scales(l, scale, 1), biases(l, b, 0);
            std::vector<A> noisy(noise_data ? l.row() : 0);
            for (int64_t task = begin; task < end; ++task) {
                const int64_t n = task / l.chunks;
                for (int64_t plane = 0; plane < l.planes; ++plane) {
                    const A *scale_row = scales.get(n, plane), *bias_row = biases.get(n, plane);
                    const auto row = [&](int64_t start, int64_t pixel, int64_t count) {
                        if (noise_data) add_noise(noisy.data(), bias_row, noise_data + n * noise_step + pixel, factor, count, l.neighbours);
                        forward_row(y_data + start, x_data + start, scale_row, noise_data ? noisy.data() : bias_row, slope, gain_a, limit,
                                    count * l.neighbours);
                    };
                    l.for_rows(task, plane, row, [] {});
                }
            }
        });
    });
    return cast(y, x_any.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> epilogue_grad(const Tensor& dy_any, const OptionalTensor& x_any, const OptionalTensor& y_any,
                                                                 const OptionalTensor& scale_any, const OptionalTensor& noise_any,
                                                                 const OptionalTensor& strength, double alpha, double gain, double clamp,
                                                                 std::array<bool, 5> mask) {
    constexpr const char* op = "epilogue_grad";
    const bool want_x = mask[0], want_scale = mask[1], want_noise = mask[2], want_strength = mask[3], want_b = mask[4];
    const bool sum_pixels = want_noise || want_strength;
    check_args(op, "dy", dy_any, scale_any);
    check_noise(op, dy_any, noise_any, strength);
    TORCH_CHECK(noise_any.has_value() || !sum_pixels, op, ": expected noise, whose or whose strength's gradient is asked for, found None");
    check_rectifier(op, alpha, gain);
    const Layout l(dy_any);
    const bool linear = is_linear(alpha, clamp);
    const Tensor dy = widen(dy_any).contiguous(l.format);
    const OptionalTensor x = operand(op, "x", x_any, dy_any, l, want_scale), y = operand(op, "y", y_any, dy_any, l, !linear);
    const OptionalTensor scale = contiguous(scale_any), noise = contiguous(noise_any);

    const Tensor dx = want_x ? at::empty(dy.sizes(), dy.options(), l.format) : at::empty({0}, dy.options());
    const Tensor dscale = at::empty(want_scale ? at::DimVector({l.samples, l.channels}) : at::DimVector({0}), dy.options());
    const Tensor dnoise = want_noise ? at::empty(noise->sizes(), dy.options()) : at::empty({0}, dy.options());
    const Tensor dstrength = want_strength ? at::empty({}, dy.options()) : at::empty({0}, dy.options());
    const Tensor db = at::empty({want_b ? l.channels : 0}, dy.options());

    std::vector<double> totals_g(l.samples * l.chunks * l.channels), totals_gx(want_scale ? totals_g.size() : 0);
    std::vector<double> pixel_sums(sum_pixels ? std::max<int64_t>(1, l.samples) * l.pixels : 0);
    M2M_DISPATCH(dy, op, [&] {
        using A = scalar_t;
        const A *dy_data = dy.const_data_ptr<A>(), *x_data = data_or_null<A>(x);
        const A* y_data = linear ? dy_data : y->const_data_ptr<A>();
        A* dx_data = dx.mutable_data_ptr<A>();
        const auto slope = rectifier_slope<A>(alpha, gain, clamp, dy_any.scalar_type());
        const auto one_row = want_scale ? (sum_pixels ? grad_row<true, true, A> : grad_row<true, false, A>)
                                        : (sum_pixels ? grad_row<false, true, A> : grad_row<false, false, A>);
        l.for_tasks([&](int64_t begin, int64_t end) {
            Tile<A> scales(l, scale, 1);
            Sums<A> sum_g(l, totals_g), sum_gx(l, totals_gx);
            std::vector<A> g(l.row());
            std::vector<A> unwanted(l.row());
            for (int64_t task = begin; task < end; ++task) {
                const int64_t n = task / l.chunks;
                for (int64_t plane = 0; plane < l.planes; ++plane) {
                    const A* scale_row = scales.get(n, plane);
                    const auto row = [&](int64_t start, int64_t pixel, int64_t count) {
                        one_row(want_x ? dx_data + start : unwanted.data(), sum_g.row.data(), sum_gx.row.data(), g.data(), dy_data + start,
                                y_data + start, want_scale ? x_data + start : nullptr, scale_row, slope, count * l.neighbours);
                        if (sum_pixels) add_pixels(pixel_sums.data() + n * l.pixels + pixel, g.data(), count, l.neighbours);
                    };
                    l.for_rows(task, plane, row, [&] {
                        sum_g.fold(task, plane);
                        if (want_scale) sum_gx.fold(task, plane);
                    });
                }
            }
        });
        if (want_scale) reduce<A>(totals_gx, l.samples, l.channels, dscale);
        if (want_b) reduce<A>(totals_g, 1, l.channels, db);
        if (sum_pixels) {
            const bool per_sample = noise->size(0) > 1;
            const A *noise_data = noise->const_data_ptr<A>(), factor = value_or_one<A>(strength);
            double sum = 0;
            for (int64_t i = 0; i < l.samples * l.pixels; ++i) sum += pixel_sums[i] * noise_data[per_sample ? i : i % l.pixels];
            if (want_strength) *dstrength.mutable_data_ptr<A>() = static_cast<A>(sum);
            if (want_noise && !per_sample)
                for (int64_t i = l.pixels; i < l.samples * l.pixels; ++i) pixel_sums[i % l.pixels] += pixel_sums[i];
            if (want_noise)
                for (int64_t i = 0; i < noise->numel(); ++i) dnoise.mutable_data_ptr<A>()[i] = static_cast<A>(factor * pixel_sums[i]);
        }
    });
    return {cast(dx, dy_any.scalar_type()), dscale, dnoise, dstrength, db};
}

std::tuple<Tensor, Tensor, Tensor> epilogue_grad2(const Tensor& ddx_any, const OptionalTensor& ddscale_any, const Tensor& dy_any,
                                                  const OptionalTensor& x_any, const OptionalTensor& y_any, const OptionalTensor& scale_any,
                                                  double alpha, double gain, double clamp, std::array<bool, 3> mask) {
    constexpr const char* op = "epilogue_grad2";
    const bool want_dy = mask[0], want_x = mask[1], want_scale = mask[2];
    check_args(op, "dy", dy_any, scale_any);
    check_small(op, "ddscale", ddscale_any, {dy_any.size(0), dy_any.size(1)}, dy_any);
    TORCH_CHECK(ddscale_any.has_value() || !want_x, op, ": expected ddscale for the gradient of x, found None");
    check_rectifier(op, alpha, gain);
    const Layout l(dy_any);
    const bool linear = is_linear(alpha, clamp), with_x = ddscale_any.has_value();
    check_same(op, "ddx", ddx_any, "dy", dy_any);
    const Tensor dy = widen(dy_any).contiguous(l.format), ddx = widen(ddx_any).contiguous(l.format);
    const OptionalTensor x = operand(op, "x", x_any, dy_any, l, with_x), y = operand(op, "y", y_any, dy_any, l, !linear);
    const OptionalTensor scale = contiguous(scale_any), ddscale = contiguous(ddscale_any);

    const Tensor gdy = want_dy ? at::empty(dy.sizes(), dy.options(), l.format) : at::empty({0}, dy.options());
    const Tensor gx = want_x ? at::empty(dy.sizes(), dy.options(), l.format) : at::empty({0}, dy.options());
    const Tensor gscale = at::empty(want_scale ? at::DimVector({l.samples, l.channels}) : at::DimVector({0}), dy.options());

    std::vector<double> totals(l.samples * l.chunks * l.channels);
    M2M_DISPATCH(dy, op, [&] {
        using A = scalar_t;
        const A *dy_data = dy.const_data_ptr<A>(), *ddx_data = ddx.const_data_ptr<A>(), *x_data = data_or_null<A>(x);
        const A* y_data = linear ? dy_data : y->const_data_ptr<A>();
        A *gdy_data = gdy.mutable_data_ptr<A>(), *gx_data = gx.mutable_data_ptr<A>();
        const auto slope = rectifier_slope<A>(alpha, gain, clamp, dy_any.scalar_type());
        const auto one_row = with_x ? grad2_row<true, A> : grad2_row<false, A>;
        l.for_tasks([&](int64_t begin, int64_t end) {
            Tile<A> scales(l, scale, 1), ddscales(l, ddscale, 0);
            Sums<A> sums(l, totals);
            std::vector<A> unwanted_dy(l.row()), unwanted_x(l.row());
            for (int64_t task = begin; task < end; ++task) {
                for (int64_t plane = 0; plane < l.planes; ++plane) {
                    const A *scale_row = scales.get(task / l.chunks, plane), *ddscale_row = ddscales.get(task / l.chunks, plane);
                    const auto row = [&](int64_t start, int64_t, int64_t count) {
                        one_row(want_dy ? gdy_data + start : unwanted_dy.data(), want_x ? gx_data + start : unwanted_x.data(), sums.row.data(),
                                ddx_data + start, dy_data + start, y_data + start, with_x ? x_data + start : nullptr, scale_row, ddscale_row, slope,
                                count * l.neighbours);
                    };
                    l.for_rows(task, plane, row, [&] { sums.fold(task, plane); });
                }
            }
        });
        if (want_scale) reduce<A>(totals, l.samples, l.channels, gscale);
    });
    return {cast(gdy, dy_any.scalar_type()), cast(gx, dy_any.scalar_type()), gscale};
}

TORCH_LIBRARY_IMPL(m2m_stylegan, CPU, m) {
    m.impl("epilogue", epilogue);
    m.impl("epilogue_grad", epilogue_grad);
    m.impl("epilogue_grad2", epilogue_grad2);
}

}  // namespace
}  // namespace m2m_stylegan
