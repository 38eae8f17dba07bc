// upfirdn2d: zero insertion, padding or cropping, FIR filter, decimation, each channel by itself. Polyphase: inserted zeros are never touched.
//
// Every output row is made of weighted sums of long runs of memory. A filter that is an outer product takes two steps: the input rows are summed into
// one padded row, and shifted copies of that row are summed into the output. Otherwise all taps of all rows are summed at once.
#include "common.h"

namespace m2m_stylegan {
namespace {

constexpr int64_t kFewNeighbours = 8;  // With fewer values per pixel, inner loops over one pixel do not pay.

struct Axis {
    int64_t in, out, up, down, pad, taps;

    // First tap that meets a sample for output o, and that sample; the next ones are `up` taps and one sample further on.
    int64_t first_tap(int64_t o) const {
        const int64_t remainder = (pad - o * down) % up;
        return remainder < 0 ? remainder + up : remainder;
    }
    int64_t first_sample(int64_t o) const { return (o * down - pad + first_tap(o)) / up; }
    int64_t taps_from(int64_t tap) const { return (taps - tap + up - 1) / up; }
};

// The filter as a correlation, gain included: the outer product of `column` and `rows[0]` if it is one (`separable`), else all its rows.
struct Filter {
    bool separable;
    std::vector<double> column;
    std::vector<std::vector<double>> rows;

    template <typename F>
    Filter(const F* f, int64_t height, int64_t width, bool flip, double gain) : column(height, 1.0), rows(height, std::vector<double>(width)) {
        int64_t py = 0, px = 0;  // of the largest tap
        for (int64_t y = 0; y < height; ++y) {
            for (int64_t x = 0; x < width; ++x) {
                rows[y][x] = gain * static_cast<double>(f[flip ? y * width + x : (height - 1 - y) * width + width - 1 - x]);
                if (std::abs(rows[y][x]) > std::abs(rows[py][px])) py = y, px = x;
            }
        }
        const double pivot = rows[py][px];
        separable = std::isfinite(pivot) && pivot != 0;
        for (int64_t y = 0; y < height; ++y) {
            for (int64_t x = 0; x < width; ++x) {
                const double a = rows[y][x] * pivot, b = rows[y][px] * rows[py][x];
                separable = separable && std::abs(a - b) <= 4 * std::numeric_limits<double>::epsilon() * std::abs(a);
            }
        }
        if (!separable) return;
        for (int64_t y = 0; y < height; ++y) column[y] = rows[y][px];
        std::vector<double> row = rows[py];
        for (double& tap : row) tap /= pivot;
        rows = {std::move(row)};
    }
};

// Runs of memory and their weights.
template <typename A>
struct Terms {
    int64_t n = 0;
    std::vector<const A*> runs;
    std::vector<A> weights;

    explicit Terms(int64_t capacity) : runs(capacity), weights(capacity) {}
    void add(const A* run, double weight) {
        runs[n] = run;
        weights[n++] = static_cast<A>(weight);
    }
};

// out[p][k] = (add ? base[p][k] : 0) + sum_i weights[i] * runs[i][p][k] for p < pixels, k < count; steps are those from one pixel to the next.
template <int n, bool add, typename A>
void sum_few(A* out, int64_t out_step, const A* base, const A* const* runs, const A* weights, int64_t step, int64_t pixels, int64_t count) {
    const A* run[n];
    A weight[n];
    for (int i = 0; i < n; ++i) {
        run[i] = runs[i];
        weight[i] = weights[i];
    }
    for (int64_t p = 0; p < pixels; ++p) {
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) {
            A sum = weight[0] * run[0][k];
            for (int i = 1; i < n; ++i) sum += weight[i] * run[i][k];
            if constexpr (add) sum += base[k];
            out[k] = sum;
        }
        out += out_step;
        for (int i = 0; i < n; ++i) run[i] += step;
    }
}

template <bool add, typename A>
void sum_up_to_four(int64_t n, A* out, int64_t out_step, const A* base, const A* const* runs, const A* weights, int64_t step, int64_t pixels,
                    int64_t count) {
    switch (n) {
        case 1: return sum_few<1, add>(out, out_step, base, runs, weights, step, pixels, count);
        case 2: return sum_few<2, add>(out, out_step, base, runs, weights, step, pixels, count);
        case 3: return sum_few<3, add>(out, out_step, base, runs, weights, step, pixels, count);
        default: return sum_few<4, add>(out, out_step, base, runs, weights, step, pixels, count);
    }
}

// The same for any number of terms: four at a time, with the sums so far in the first-level cache.
template <typename A>
void weighted_sum(A* out, int64_t out_step, const Terms<A>& terms, int64_t step, int64_t pixels, int64_t count) {
    constexpr int64_t kBlock = 512;
    const A* weights = terms.weights.data();
    if (terms.n == 0) {
        for (int64_t p = 0; p < pixels; ++p) std::fill_n(out + p * out_step, count, A(0));
    } else if (terms.n <= 4) {
        sum_up_to_four<false>(terms.n, out, out_step, weights, terms.runs.data(), weights, step, pixels, count);
    } else {
        A sums[kBlock];
        const A* runs[4];
        for (int64_t p = 0; p < pixels; ++p) {
            for (int64_t start = 0; start < count; start += kBlock) {
                const int64_t size = std::min(kBlock, count - start);
                for (int64_t i = 0; i < terms.n; i += 4) {
                    const int64_t n = std::min<int64_t>(4, terms.n - i);
                    for (int64_t j = 0; j < n; ++j) runs[j] = terms.runs[i + j] + p * step + start;
                    if (i == 0) {
                        sum_few<4, false>(sums, 0, sums, runs, weights, 0, 1, size);
                    } else if (i + 4 < terms.n) {
                        sum_few<4, true>(sums, 0, sums, runs, weights + i, 0, 1, size);
                    } else {
                        sum_up_to_four<true>(n, out + p * out_step + start, 0, sums, runs, weights + i, 0, 1, size);
                    }
                }
            }
        }
    }
}

// Pixels of `size` values dealt to `parts` runs in turn, or the other way round if `join`.
template <int parts, int size, bool join, typename T>
void deal_fixed(T* __restrict packed, T* __restrict dealt, int64_t dealt_step, int64_t pixels) {
    const int64_t rounds = pixels / parts;
    for (int64_t q = 0; q < rounds; ++q) {
        for (int i = 0; i < parts; ++i) {
            for (int k = 0; k < size; ++k) {
                T &a = packed[(q * parts + i) * size + k], &b = dealt[i * dealt_step + q * size + k];
                join ? a = b : b = a;
            }
        }
    }
    for (int64_t p = rounds * parts; p < pixels; ++p) {
        for (int k = 0; k < size; ++k) {
            T &a = packed[p * size + k], &b = dealt[p % parts * dealt_step + rounds * size + k];
            join ? a = b : b = a;
        }
    }
}

template <bool join, typename T>
void deal(T* packed, T* dealt, int64_t dealt_step, int64_t pixels, int64_t parts, int64_t size) {
    if (parts == 2 && size == 1) return deal_fixed<2, 1, join>(packed, dealt, dealt_step, pixels);
    if (parts == 2 && size == 3) return deal_fixed<2, 3, join>(packed, dealt, dealt_step, pixels);
    for (int64_t p = 0; p < pixels; ++p) {
        T *a = packed + p * size, *b = dealt + p % parts * dealt_step + p / parts * size;
        join ? std::copy_n(b, size, a) : std::copy_n(a, size, b);
    }
}

// What is the same for all rows. Samples `first` to `first + width` of a row, where there are any, are all that its outputs depend on.
struct Plan {
    Axis x, y;
    Filter filter;
    int64_t size;               // values per pixel that lie together: C in channels-last, 1 in contiguous memory
    int64_t first, width;
    bool column_only;           // nothing happens along x
    bool whole_rows;            // inner loops run over whole rows, not over single pixels
    bool dealt;                 // every down-th sample is brought together for that
    int64_t part_step;          // distance of the parts that the samples are dealt to

    Plan(Axis x_axis, Axis y_axis, Filter f, int64_t values) : x(x_axis), y(y_axis), filter(std::move(f)), size(values) {
        int64_t last = std::numeric_limits<int64_t>::min();
        first = std::numeric_limits<int64_t>::max();
        for (int64_t r = 0; r < std::min(x.up, x.out); ++r) {
            const int64_t taps = x.taps_from(x.first_tap(r));
            if (taps <= 0) continue;
            first = std::min(first, x.first_sample(r));
            last = std::max(last, x.first_sample(r) + (outputs(r) - 1) * x.down + taps - 1);
        }
        if (last < first) first = 0, last = -1;
        width = last - first + 1;
        column_only = filter.separable && x.taps == 1 && x.up == 1 && x.down == 1 && first >= 0 && last < x.in;
        whole_rows = (x.up == 1 && x.down == 1) || size < kFewNeighbours;
        dealt = whole_rows && x.down > 1;
        part_step = (width + x.down - 1) / x.down * size;
    }

    // Outputs r, r + up, r + 2 up, ... see the same taps.
    int64_t outputs(int64_t r) const { return (x.out - r + x.up - 1) / x.up; }
    int64_t row_size() const { return dealt ? part_step * x.down : width * size; }
    int64_t max_rows() const { return filter.separable ? 1 : y.taps_from(0); }
    // Where sample first + i, and every down-th after it, is found in a padded row.
    int64_t place(int64_t i) const { return dealt ? i % x.down * part_step + i / x.down * size : i * size; }
};

// Makes output rows, with buffers of its own.
template <typename A>
class RowFilter {
public:
    explicit RowFilter(const Plan& plan)
        : p(plan), begin(std::max<int64_t>(p.first, 0)), end(std::min(p.first + p.width, p.x.in)), padded(p.max_rows() * p.row_size(), A(0)),
          packed(p.dealt ? p.width * p.size : 0, A(0)), joined(p.whole_rows && p.x.up > 1 ? p.x.up * p.outputs(0) * p.size : 0),
          held(p.max_rows(), nullptr), column(p.y.taps_from(0)), phases(p.x.up, Terms<A>(p.max_rows() * p.x.taps_from(0))) {
        if (p.filter.separable) add_phases(padded.data(), p.filter.rows[0]);
    }

    // Output row `o` of the plane of which `in` is the first row.
    void operator()(A* out, const A* in, int64_t row_stride, int64_t o) {
        column.n = 0;
        if (!p.filter.separable) clear_phases();
        int64_t sample = p.y.first_sample(o);
        for (int64_t tap = p.y.first_tap(o); tap < p.y.taps && begin < end; tap += p.y.up, ++sample) {
            if (sample < 0 || sample >= p.y.in) continue;
            const A* row = in + sample * row_stride + begin * p.size;
            column.add(row, p.filter.column[tap]);
            if (!p.filter.separable) add_phases(hold(row, sample), p.filter.rows[tap]);
        }
        if (column.n == 0 || p.column_only) return weighted_sum(out, 0, column, 0, 1, p.x.out * p.size);
        if (p.filter.separable) fill(padded.data(), column);
        for (int64_t r = 0; r < std::min(p.x.up, p.x.out); ++r) {
            const int64_t outputs = p.outputs(r);
            if (!p.whole_rows) {
                weighted_sum(out + r * p.size, p.x.up * p.size, phases[r], p.x.down * p.size, outputs, p.size);
            } else {
                weighted_sum(p.x.up == 1 ? out : joined.data() + r * p.outputs(0) * p.size, 0, phases[r], 0, 1, outputs * p.size);
            }
        }
        if (p.whole_rows && p.x.up > 1) deal<true>(out, joined.data(), p.outputs(0) * p.size, p.x.out, p.x.up, p.size);
    }

private:
    // Makes a padded row from the sum of some terms.
    void fill(A* row, const Terms<A>& terms) {
        weighted_sum((p.dealt ? packed.data() : row) + (begin - p.first) * p.size, 0, terms, 0, 1, (end - begin) * p.size);
        if (p.dealt) deal<false>(packed.data(), row, p.part_step, p.width, p.x.down, p.size);
    }

    // The padded copy of an input row; the next output rows find it there.
    const A* hold(const A* row, int64_t sample) {
        const int64_t slot = sample % p.max_rows();
        A* copy = padded.data() + slot * p.row_size();
        if (held[slot] != row) {
            Terms<A> term(1);
            term.add(row, 1);
            fill(copy, term);
            held[slot] = row;
        }
        return copy;
    }

    void clear_phases() {
        for (auto& phase : phases) phase.n = 0;
    }

    // Adds the terms that a padded row contributes to the outputs.
    void add_phases(const A* row, const std::vector<double>& taps) {
        for (int64_t r = 0; r < p.x.up; ++r) {
            int64_t sample = p.x.first_sample(r) - p.first;
            for (int64_t tap = p.x.first_tap(r); tap < p.x.taps; tap += p.x.up, ++sample) phases[r].add(row + p.place(sample), taps[tap]);
        }
    }

    const Plan& p;
    int64_t begin, end;  // samples of a row that are needed
    std::vector<A> padded, packed, joined;
    std::vector<const A*> held;
    Terms<A> column;
    std::vector<Terms<A>> phases;
};

// f [taps_y, taps_x], contiguous
Filter make_filter(const Tensor& f, bool flip, double gain) {
    if (f.scalar_type() == at::kDouble) return Filter(f.const_data_ptr<double>(), f.size(0), f.size(1), flip, gain);
    return Filter(f.const_data_ptr<float>(), f.size(0), f.size(1), flip, gain);
}

Axis make_axis(int64_t in, int64_t up, int64_t down, int64_t pad0, int64_t pad1, int64_t taps) {
    const int64_t padded = in * up + pad0 + pad1;
    return {in, padded < taps ? 0 : (padded - taps) / down + 1, up, down, pad0, taps};
}

Tensor upfirdn2d(const Tensor& x_any, const Tensor& f, int64_t upx, int64_t upy, int64_t downx, int64_t downy, int64_t padx0, int64_t padx1,
                 int64_t pady0, int64_t pady1, bool flip, double gain) {
    TORCH_CHECK(x_any.dim() == 4, "upfirdn2d: expected x [N, C, H, W], found shape ", x_any.sizes());
    check_dtype("upfirdn2d", "x", x_any);
    TORCH_CHECK(f.dim() == 2 && f.numel() > 0 && (f.scalar_type() == at::kFloat || f.scalar_type() == at::kDouble),
                "upfirdn2d: expected a filter [taps_y, taps_x] Float or Double, found ", f.sizes(), " ", f.scalar_type());
    TORCH_CHECK(upx >= 1 && upy >= 1 && downx >= 1 && downy >= 1, "upfirdn2d: expected up and down of at least 1, found up (x, y) = (", upx,
                ", ", upy, "), down (x, y) = (", downx, ", ", downy, ")");
    const Axis ax = make_axis(x_any.size(3), upx, downx, padx0, padx1, f.size(1)), ay = make_axis(x_any.size(2), upy, downy, pady0, pady1, f.size(0));
    TORCH_CHECK(ax.out > 0 && ay.out > 0, "upfirdn2d: expected a padded input of at least ", f.size(0), " x ", f.size(1),
                " (height x width), the size of the filter, found ", ay.in * upy + pady0 + pady1, " x ", ax.in * upx + padx0 + padx1);

    const auto format = x_any.suggest_memory_format();
    const bool channels_last = format == at::MemoryFormat::ChannelsLast;
    const int64_t channels = x_any.size(1), size = channels_last ? channels : 1, planes = channels_last ? 1 : channels;
    // Only the pixels of one row must be neighbours: a cropped view needs no copy.
    const Tensor wide = widen(x_any);
    const bool rows_are_dense = wide.stride(3) == size && (!channels_last || wide.stride(1) == 1);
    const Tensor x = rows_are_dense ? wide : wide.contiguous(format);
    const Tensor out = at::empty({x.size(0), channels, ay.out, ax.out}, x.options(), format);
    if (out.numel() == 0) return cast(out, x_any.scalar_type());
    const Plan plan(ax, ay, make_filter(f.contiguous(), flip, gain), size);
    M2M_DISPATCH(x, "upfirdn2d", [&] {
        const scalar_t* in_data = x.const_data_ptr<scalar_t>();
        scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
        parallel(x.size(0) * planes * ay.out, ax.out * size, [&](int64_t begin, int64_t end) {
            RowFilter<scalar_t> filter(plan);
            for (int64_t row = begin; row < end; ++row) {
                const int64_t plane = row / ay.out;
                const scalar_t* in = in_data + plane / planes * x.stride(0) + plane % planes * x.stride(1);
                filter(out_data + row * ax.out * size, in, x.stride(2), row % ay.out);
            }
        });
    });
    return cast(out, x_any.scalar_type());
}

TORCH_LIBRARY_IMPL(m2m_stylegan, CPU, m) { m.impl("upfirdn2d", upfirdn2d); }

}  // namespace
}  // namespace m2m_stylegan
