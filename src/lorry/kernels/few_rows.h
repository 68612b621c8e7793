// Products of a few rows with a matrix that is read once, as it lies: its rows are multiplied as they stand, several at a time, and what
// comes next is fetched meanwhile.
//
// Every number is summed alone, in an order that only the width decides: a row's result depends neither on its neighbours nor on threads.
#pragma once
#include "vectors.h"

#include <algorithm>
#include <vector>

constexpr long PANEL = 16;  // outputs a thread takes at a time
// Sums at once, each in a register: enough to hide the latency of one, and as many registers are left for what is multiplied.
constexpr int SUMS = LANES == 16 ? 16 : 8;

// Rows of floats, `stride` apart.
struct FloatRows {
    const float* at;
    long stride;
    inline FloatRows from(long row) const { return {at + row * stride, stride}; }
};

// Rows that are multiplied: x [rows, width], `stride` apart, and in floats as weights want them, made when first asked for.
template <typename T>
class Inputs {
   public:
    const T* const x;
    const long rows, width, stride;

    Inputs(const T* x, long rows, long width, long stride) : x(x), rows(rows), width(width), stride(stride) {}
    Inputs(const Inputs&) = delete;

    // In order.
    FloatRows plain() const {
        if constexpr (sizeof(T) == sizeof(float)) return {x, stride};
        if (ordered.empty()) {
            ordered.resize(rows * width);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < width; i++) ordered[r * width + i] = wide(x[r * stride + i]);
        }
        return {ordered.data(), width};
    }

    // Of every 2 * LANES the even places, then the odd ones; zeros fill the last.
    FloatRows paired() const {
        const long padded = (width + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        if (pairs.empty()) {
            pairs.assign(rows * padded, 0.0f);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < width; i++) pairs[r * padded + i / (2 * LANES) * 2 * LANES + i % 2 * LANES + i % (2 * LANES) / 2] = wide(x[r * stride + i]);
        }
        return {pairs.data(), padded};
    }

    // As `open` gives weights.
    FloatRows as_opened() const {
        if constexpr (Opened<T>::VECTORS == 1) return plain();
        else return paired();
    }

   private:
    mutable std::vector<float> ordered, pairs;
};

// Where sums go: y [rows, outputs] = scale * sum + bias (or null), or y += scale * sum; rounded once.
template <typename T>
struct Outputs {
    T* y;
    const T* bias;
    long outputs;
    bool add;
    float scale;

    inline void write(long row, long output, float sum) const {
        T& to = y[row * outputs + output];
        put(to, sum * scale + (add ? wide(to) : bias ? wide(bias[output]) : 0.0f));
    }
};

// sums [ROWS, COUNT]: COUNT rows of weights, `width` apart, by ROWS rows of inputs; with FETCH as many weights `ahead` are fetched.
template <typename T, int COUNT, int ROWS, bool FETCH>
static inline void multiply_block(const T* w, const T* ahead, long width, FloatRows x, float* sums) {
    constexpr int VECTORS = Opened<T>::VECTORS;
    constexpr long STEP = Opened<T>::STEP;
    Floats sum[COUNT * ROWS] = {};
    const auto step = [&](const T* weights, long apart, const float* inputs, long inputs_apart) __attribute__((always_inline)) {
        Floats in[ROWS][VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) in[r][v] = load(inputs + r * inputs_apart + v * LANES);
#pragma GCC unroll 16
        for (int o = 0; o < COUNT; o++) {
            Floats opened[VECTORS];
            open(weights + o * apart, opened);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) sum[r * COUNT + o] += opened[v] * in[r][v];
        }
    };
    long k = 0;
    for (; k + STEP <= width; k += STEP) {
        if (FETCH)
#pragma GCC unroll 16
            for (int o = 0; o < COUNT; o++) __builtin_prefetch(ahead + o * width + k, 0, 2);
        step(w + k, width, x.at + k, x.stride);
    }
    if (k < width) {
        T weights[COUNT][STEP] = {};
        float inputs[ROWS][VECTORS * LANES] = {};
        for (int o = 0; o < COUNT; o++) std::copy_n(w + o * width + k, width - k, weights[o]);
        for (int r = 0; r < ROWS; r++) std::copy_n(x.at + r * x.stride + k, VECTORS == 1 ? width - k : STEP, inputs[r]);
        step(weights[0], STEP, inputs[0], VECTORS * LANES);
    }
    add_lanes<COUNT * ROWS>(sum, sums);
}

template <typename T, int ROWS, bool FETCH>
static inline void multiply_rows(const T* w, long count, long width, FloatRows x, long row, long at, const Outputs<T>& to) {
    constexpr int COUNT = SUMS / ROWS;
    const T* ahead = w + count * width;
    float sums[SUMS];
    const long whole = count / COUNT * COUNT;
    for (long o = 0; o < whole; o += COUNT) {
        multiply_block<T, COUNT, ROWS, FETCH>(w + o * width, ahead + o * width, width, x.from(row), sums);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < COUNT; i++) to.write(row + r, at + o + i, sums[r * COUNT + i]);
    }
    for (long o = whole; o < count; o++) {
        multiply_block<T, 1, ROWS, false>(w + o * width, nullptr, width, x.from(row), sums);
        for (int r = 0; r < ROWS; r++) to.write(row + r, at + o, sums[r]);
    }
}

// `count` outputs from `at` on, whose weights are w [count, width], of all rows; with FETCH as many weights lie behind them.
template <typename T, bool FETCH>
static void multiply_panel(const T* w, long count, long width, FloatRows x, long rows, long at, const Outputs<T>& to) {
    long row = 0;
    // what is ahead is fetched once, along with the first rows
    if (FETCH && rows >= 4)
        multiply_rows<T, 4, true>(w, count, width, x, 0, at, to), row = 4;
    else if (FETCH && rows >= 2)
        multiply_rows<T, 2, true>(w, count, width, x, 0, at, to), row = 2;
    else if (FETCH)
        multiply_rows<T, 1, true>(w, count, width, x, 0, at, to), row = 1;
    for (; row + 4 <= rows; row += 4) multiply_rows<T, 4, false>(w, count, width, x, row, at, to);
    for (; row + 2 <= rows; row += 2) multiply_rows<T, 2, false>(w, count, width, x, row, at, to);
    for (; row < rows; row++) multiply_rows<T, 1, false>(w, count, width, x, row, at, to);
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
LORRY int lorry_amx();
LORRY int rows_product(const bf16* x, const bf16* w, const bf16* bias, bf16* y, long rows, long in, long out, long stride, long first, long add,
                       float scale);

// The same on matrix tiles, where they may be used and the width fills them.
static bool multiply_on_tiles(const bf16* w, const Inputs<bf16>& x, const Outputs<bf16>& to) {
    static const bool allowed = lorry_amx();
    return allowed && !rows_product(x.x, w, to.bias, to.y, x.rows, x.width, to.outputs, x.stride, 0, to.add, to.scale);
}
#endif
template <typename T>
static bool multiply_on_tiles(const T*, const Inputs<T>&, const Outputs<T>&) { return false; }

// w [outputs, width] by all rows of x.
template <typename T>
static void multiply_dense(const T* w, const Inputs<T>& x, const Outputs<T>& to) {
    if (multiply_on_tiles(w, x, to)) return;
    const FloatRows rows = x.as_opened();
    const long width = x.width;
#pragma omp parallel for schedule(static) if (to.outputs * width > PARALLEL)
    for (long at = 0; at < to.outputs; at += PANEL) {
        const T* here = w + at * width;
        if (at + 2 * PANEL <= to.outputs)
            multiply_panel<T, true>(here, PANEL, width, rows, x.rows, at, to);
        else
            multiply_panel<T, false>(here, std::min(PANEL, to.outputs - at), width, rows, x.rows, at, to);
    }
}
