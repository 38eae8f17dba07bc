// The epilogue and its two derivatives as operations of the passes in features.cuh. g = dy * slope(y).
#pragma once

#include "features.cuh"

namespace m2m_stylegan::cuda {

template <typename T>
struct Forward {
    using Scalar = T;
    using A = acc_t<T>;
    static constexpr int kSums = 0, kUnroll = 2;
    int64_t samples, channels, pixels, noise_step;
    const T* x;
    const A *scale, *noise, *strength, *b;
    T* y;
    A alpha, gain, limit;

    template <int W>
    struct Coefficients {
        A scale[W], b[W], strength;
    };
    template <int V, int P>
    struct Tile {
        Vec<T, V> x;
        A noise[P];
    };

    template <int W>
    __device__ Coefficients<W> coefficients(int64_t nc, int64_t c) const {
        Coefficients<W> result;
        load_small(result.scale, scale, nc, A(1));
        load_small(result.b, b, c, A(0));
        result.strength = strength ? *strength : A(1);
        return result;
    }

    template <int V, int P>
    __device__ Tile<V, P> load(int64_t i, int64_t noise_i) const {
        Tile<V, P> tile;
        tile.x = cuda::load<V>(x + i);
        load_small(tile.noise, noise, noise_i, A(0));
        return tile;
    }

    template <int V, int W, int P>
    __device__ void apply(int64_t i, const Tile<V, P>& tile, const Coefficients<W>& k, A (&)[1][W]) const {
        Vec<T, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A t = to_acc(tile.x.v[e]) * k.scale[e % W] + (tile.noise[e % P] * k.strength + k.b[e % W]);
            out.v[e] = from_acc<T>(clamped(gain * (t > 0 ? t : t * alpha), limit));
        }
        store(y + i, out);
    }
};

template <typename T>
struct Grad {
    using Scalar = T;
    using A = acc_t<T>;
    static constexpr int kSums = 3, kUnroll = 1;  // g * x, g, g * noise
    int64_t samples, channels, pixels, noise_step;
    const T *dy, *x, *y;  // x only for the sum
    const A *scale, *noise;
    T* dx;
    RectifierSlope<A> slope;

    template <int W>
    struct Coefficients {
        A scale[W];
    };
    template <int V, int P>
    struct Tile {
        Vec<T, V> dy, x, y;
        A noise[P];
    };

    template <int W>
    __device__ Coefficients<W> coefficients(int64_t nc, int64_t) const {
        Coefficients<W> result;
        load_small(result.scale, scale, nc, A(1));
        return result;
    }

    template <int V, int P>
    __device__ Tile<V, P> load(int64_t i, int64_t noise_i) const {
        Tile<V, P> tile{};
        tile.dy = cuda::load<V>(dy + i);
        if (y) tile.y = cuda::load<V>(y + i);
        if (x) tile.x = cuda::load<V>(x + i);
        load_small(tile.noise, noise, noise_i, A(0));
        return tile;
    }

    template <int V, int W, int P>
    __device__ void apply(int64_t i, const Tile<V, P>& tile, const Coefficients<W>& k, A (&sums)[3][W]) const {
        Vec<T, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A g = slope.times(to_acc(tile.dy.v[e]), to_acc(tile.y.v[e]));
            out.v[e] = from_acc<T>(g * k.scale[e % W]);
            sums[0][e % W] += g * to_acc(tile.x.v[e]);
            sums[1][e % W] += g;
            sums[2][e % W] += g * tile.noise[e % P];
        }
        if (dx) store(dx + i, out);
    }
};

template <typename T>
struct Grad2 {
    using Scalar = T;
    using A = acc_t<T>;
    static constexpr int kSums = 1, kUnroll = 1;  // g * ddx
    static constexpr int64_t noise_step = 0;
    int64_t samples, channels, pixels;
    const T *ddx, *dy, *x, *y;
    const A *scale, *ddscale;
    T *gdy, *gx;
    RectifierSlope<A> slope;

    template <int W>
    struct Coefficients {
        A scale[W], ddscale[W];
    };
    template <int V, int>
    struct Tile {
        Vec<T, V> ddx, dy, x, y;
    };

    template <int W>
    __device__ Coefficients<W> coefficients(int64_t nc, int64_t) const {
        Coefficients<W> result;
        load_small(result.scale, scale, nc, A(1));
        load_small(result.ddscale, ddscale, nc, A(0));
        return result;
    }

    template <int V, int P>
    __device__ Tile<V, P> load(int64_t i, int64_t) const {
        Tile<V, P> tile{};
        tile.ddx = cuda::load<V>(ddx + i);
        tile.dy = cuda::load<V>(dy + i);
        if (y) tile.y = cuda::load<V>(y + i);
        if (x) tile.x = cuda::load<V>(x + i);
        return tile;
    }

    template <int V, int W, int P>
    __device__ void apply(int64_t i, const Tile<V, P>& tile, const Coefficients<W>& k, A (&sums)[1][W]) const {
        Vec<T, V> out_dy, out_x;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const A v = to_acc(tile.ddx.v[e]), result = to_acc(tile.y.v[e]);
            const A g = slope.times(to_acc(tile.dy.v[e]), result);
            out_dy.v[e] = from_acc<T>(slope.times(v * k.scale[e % W] + k.ddscale[e % W] * to_acc(tile.x.v[e]), result));
            out_x.v[e] = from_acc<T>(g * k.ddscale[e % W]);
            sums[0][e % W] += g * v;
        }
        if (gdy) store(gdy + i, out_dy);
        if (gx) store(gx + i, out_x);
    }
};

}  // namespace m2m_stylegan::cuda
