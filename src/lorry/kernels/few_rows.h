// Products of a few rows with a matrix that is read once, as it lies: its rows are multiplied as they stand, several at a time, and what
// comes next is fetched meanwhile.
//
// Every number is summed alone, in an order that only the width decides: a row's result depends neither on its neighbours nor on threads.
#pragma once
#include "vectors.h"

#include <algorithm>
#include <type_traits>
#include <vector>

constexpr long PANEL = 16;  // outputs a thread takes at a time
// Sums at once, each in a register: enough to hide the latency of one, and as many registers are left for what is multiplied.
constexpr int SUMS = LANES == 16 ? 16 : 8;

// Rows of inputs as `Pairing` takes them, `stride` apart.
template <typename T>
struct InputRows {
    typedef typename Pairing<T>::Input Input;
    const Input* at;
    long stride;

    inline InputRows from(long row) const { return {at + row * stride, stride}; }
};

// Rows of values made such: of another type a copy in `space`.
static inline InputRows<float> inputs_of(const float* x, long, long, long stride, std::vector<float>&) { return {x, stride}; }
template <typename T>
static inline InputRows<T> inputs_of(const T* x, long rows, long width, long stride, std::vector<typename Pairing<T>::Input>& space) {
    if constexpr (std::is_same_v<typename Pairing<T>::Input, T>) return {x, stride};
    else {
        space.resize(rows * width);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < width; i++) space[r * width + i] = wide(x[r * stride + i]);
        return {space.data(), width};
    }
}

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

// sums [ROWS, COUNT]: COUNT rows of weights, `width` apart, by ROWS rows of inputs; as much `ahead` is fetched (or nothing if null).
template <typename T, int COUNT, int ROWS, bool FETCH>
static inline void multiply_block(const T* w, const T* ahead, long width, const typename Pairing<T>::Input* x, long stride, float* sums) {
    typedef Pairing<T> P;
    Floats sum[COUNT * ROWS] = {};
    long k = 0;
    for (; k + P::STEP <= width; k += P::STEP) {
        typename P::Value inputs[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) inputs[r] = P::read(x + r * stride + k);
#pragma GCC unroll 16
        for (int o = 0; o < COUNT; o++) {
            const typename P::Value weights = P::read(w + o * width + k);
            if (FETCH) __builtin_prefetch(ahead + o * width + k, 0, 2);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) P::add(sum[r * COUNT + o], weights, inputs[r]);
        }
    }
    if (k < width) {
        typename P::Value inputs[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) inputs[r] = P::read_some(x + r * stride + k, width - k);
#pragma GCC unroll 16
        for (int o = 0; o < COUNT; o++) {
            const typename P::Value weights = P::read_some(w + o * width + k, width - k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) P::add(sum[r * COUNT + o], weights, inputs[r]);
        }
    }
    add_lanes<COUNT * ROWS>(sum, sums);
}

template <typename T, int ROWS, bool FETCH>
static inline void multiply_rows(const T* w, const T* ahead, long count, long width, const InputRows<T>& x, long row, long at, const Outputs<T>& to) {
    constexpr int COUNT = SUMS / ROWS;
    const auto* inputs = x.at + row * x.stride;
    float sums[SUMS];
    long o = 0;
    for (; o + COUNT <= count; o += COUNT) {
        multiply_block<T, COUNT, ROWS, FETCH>(w + o * width, FETCH ? ahead + o * width : nullptr, width, inputs, x.stride, sums);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < COUNT; i++) to.write(row + r, at + o + i, sums[r * COUNT + i]);
    }
    for (; o < count; o++) {
        multiply_block<T, 1, ROWS, false>(w + o * width, nullptr, width, inputs, x.stride, sums);
        for (int r = 0; r < ROWS; r++) to.write(row + r, at + o, sums[r]);
    }
}

// `count` outputs from `at` on, whose weights are w [count, width], of all rows; `more`: that as many weights lie behind them.
template <typename T>
static void multiply_panel(const T* w, long count, long width, const InputRows<T>& x, long rows, long at, const Outputs<T>& to, bool more) {
    const T* ahead = w + count * width;
    long row = 0;
    if (more) {  // once is enough
        if (rows >= 4)
            multiply_rows<T, 4, true>(w, ahead, count, width, x, 0, at, to), row = 4;
        else if (rows >= 2)
            multiply_rows<T, 2, true>(w, ahead, count, width, x, 0, at, to), row = 2;
        else
            multiply_rows<T, 1, true>(w, ahead, count, width, x, 0, at, to), row = 1;
    }
    for (; row + 4 <= rows; row += 4) multiply_rows<T, 4, false>(w, ahead, count, width, x, row, at, to);
    for (; row + 2 <= rows; row += 2) multiply_rows<T, 2, false>(w, ahead, count, width, x, row, at, to);
    for (; row < rows; row++) multiply_rows<T, 1, false>(w, ahead, count, width, x, row, at, to);
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
LORRY int lorry_amx();
LORRY int rows_product(const bf16* x, const bf16* w, const bf16* bias, bf16* y, long rows, long in, long out, long stride, long first, long add,
                       float scale);

// The same on matrix tiles, where they may be used and the width fills them.
static bool multiply_on_tiles(const bf16* w, long width, const InputRows<bf16>& x, long rows, const Outputs<bf16>& to) {
    static const bool allowed = lorry_amx();
    return allowed && !rows_product(x.at, w, to.bias, to.y, rows, width, to.outputs, x.stride, 0, to.add, to.scale);
}
#endif
template <typename T>
static bool multiply_on_tiles(const T*, long, const InputRows<T>&, long, const Outputs<T>&) { return false; }

// w [outputs, width] by `rows` rows.
template <typename T>
static void multiply_dense(const T* w, long width, const InputRows<T>& x, long rows, const Outputs<T>& to) {
    if (multiply_on_tiles(w, width, x, rows, to)) return;
#pragma omp parallel for schedule(static) if (to.outputs * width > PARALLEL)
    for (long at = 0; at < to.outputs; at += PANEL) {
        const long count = std::min(PANEL, to.outputs - at);
        multiply_panel(w + at * width, count, width, x, rows, at, to, at + 2 * PANEL <= to.outputs);
    }
}
