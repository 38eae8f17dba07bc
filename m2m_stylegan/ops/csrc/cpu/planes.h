// How the epilogue's kernels walk through [N, C, H, W] in either layout, and sum on the way.
#pragma once

#include "common.h"

namespace m2m_stylegan {

constexpr int64_t kRow = 512;      // elements that one inner loop handles, or more if there are more channels
constexpr int64_t kRows = 8;       // rows that are summed in the dtype of the arithmetic before their sum is added to a double
constexpr int64_t kChunk = 16384;  // elements of a plane that one task handles

// [N, C, H, W] as memory: per sample, channels-last is one plane of pixels with C neighbouring channels, contiguous is C planes with one.
struct Layout {
    at::MemoryFormat format;
    int64_t samples, channels, pixels, planes, neighbours;
    int64_t row_pixels, chunk_pixels, chunks;  // of a plane; chunks per plane

    explicit Layout(const Tensor& x) : format(x.suggest_memory_format()), samples(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)) {
        const bool channels_last = format == at::MemoryFormat::ChannelsLast || pixels == 1;
        planes = channels_last ? 1 : channels;
        neighbours = channels_last ? channels : 1;
        row_pixels = std::max<int64_t>(1, std::min(pixels, kRow / std::max<int64_t>(1, neighbours)));
        chunk_pixels = row_pixels * std::max<int64_t>(1, kChunk / std::max<int64_t>(1, row()));
        chunks = (pixels + chunk_pixels - 1) / chunk_pixels;
    }

    int64_t row() const { return row_pixels * neighbours; }

    // f(begin, end) over tasks; task i is chunk i % chunks of sample i / chunks, in all planes.
    template <typename F>
    void for_tasks(const F& f) const { parallel(samples * chunks, std::min(chunk_pixels, pixels) * channels, f); }

    // row(start, pixel, count) for the rows of a chunk in one plane: their first element in memory, first pixel and number of pixels.
    // after() follows every kRows rows and the last one.
    template <typename F, typename G>
    void for_rows(int64_t task, int64_t plane, const F& row, const G& after) const {
        const int64_t first = task % chunks * chunk_pixels, stop = std::min(pixels, first + chunk_pixels);
        const int64_t base = (task / chunks * planes + plane) * pixels;
        for (int64_t p = first; p < stop;) {
            const int64_t pause = std::min(stop, p + kRows * row_pixels);
            for (; p < pause; p += row_pixels) row((base + p) * neighbours, p, std::min(row_pixels, stop - p));
            after();
        }
    }
};

// One value per channel of a row, repeated for its pixels.
template <typename A>
struct Tile {
    const Layout& l;
    const A* values;  // [C] or, if `per_sample`, [N, C]; null: `otherwise` everywhere
    bool per_sample;
    std::vector<A> row;

    Tile(const Layout& layout, const OptionalTensor& t, A otherwise)
        : l(layout), values(data_or_null<A>(t)), per_sample(t.has_value() && t->dim() == 2), row(layout.row(), otherwise) {}

    const A* get(int64_t sample, int64_t plane) {
        if (values) {
            const A* source = values + (per_sample ? sample * l.channels : 0) + plane;
            if (l.neighbours == 1) {
                std::fill(row.begin(), row.end(), *source);
            } else {
                for (int64_t p = 0; p < l.row_pixels; ++p) std::copy_n(source, l.neighbours, row.data() + p * l.neighbours);
            }
        }
        return row.data();
    }
};

// Sums per channel over the pixels of each chunk: rows in A, their sums in double.
template <typename A>
struct Sums {
    const Layout& l;
    std::vector<double>& totals;  // [N, chunks, C]
    std::vector<A> row;

    Sums(const Layout& layout, std::vector<double>& chunk_totals) : l(layout), totals(chunk_totals), row(layout.row(), A(0)) {}

    void fold(int64_t task, int64_t plane) {
        double* total = totals.data() + task * l.channels + plane;
        if (l.neighbours == 1) {
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < l.row_pixels; ++p) sum += row[p];
            *total += sum;
        } else {
            for (int64_t p = 0; p < l.row_pixels; ++p)
                for (int64_t c = 0; c < l.neighbours; ++c) total[c] += row[p * l.neighbours + c];
        }
        std::fill(row.begin(), row.end(), A(0));
    }
};

// [N, chunks, C] => [N, C] (groups = N) or [C] (groups = 1).
template <typename A>
void reduce(const std::vector<double>& totals, int64_t groups, int64_t channels, const Tensor& out) {
    std::vector<double> sum(channels);
    const int64_t parts = static_cast<int64_t>(totals.size()) / std::max<int64_t>(1, groups * channels);
    for (int64_t group = 0; group < groups; ++group) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t c = 0; c < channels; ++c) sum[c] += totals[(group * parts + part) * channels + c];
        std::copy(sum.begin(), sum.end(), out.mutable_data_ptr<A>() + group * channels);
    }
}

}  // namespace m2m_stylegan
