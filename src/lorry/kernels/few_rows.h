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
constexpr int MOST_ROWS = 4;  // rows at once: with 8, and half as many outputs, 32 rows took a third longer

// Numbers in rows, `stride` apart.
template <typename N>
struct Strided {
    const N* at;
    long stride;
    inline Strided from(long row) const { return {at + row * stride, stride}; }
};
typedef Strided<float> FloatRows;

// What weights of a type are multiplied as, and the inputs beside them, STEP of each at a time: floats, as `open` gives them.
template <typename T>
struct Factors {
    typedef Floats Vector;
    typedef float Number;
    static constexpr int VECTORS = Opened<T>::VECTORS;
    static constexpr long STEP = Opened<T>::STEP;
};
#if DOTS
// Where dot products of bfloat16 pairs are fast, pairs as they lie: an instruction multiplies twice as many of them as of floats, and
// nothing is opened.
template <>
struct Factors<bf16> {
    typedef __m512bh Vector;
    typedef bf16 Number;
    static constexpr int VECTORS = 1;
    static constexpr long STEP = 2 * LANES;
};
static inline void open(const bf16* from, __m512bh (&to)[1]) { to[0] = (__m512bh)_mm512_loadu_si512(from); }
static inline Floats fused(__m512bh a, __m512bh b, Floats c) { return (Floats)_mm512_dpbf16_ps((__m512)c, a, b); }
#endif

// Rows that are multiplied: x [rows, width], `stride` apart, and in floats as weights want them, made when first asked for.
template <typename T>
class Inputs {
   public:
    const T* const x;
    const long rows, width, stride;

    Inputs(const T* x, long rows, long width, long stride) : x(x), rows(rows), width(width), stride(stride) {}
    // `count` rows of others from the `first` on; floats are made once for all of those.
    Inputs(const Inputs& all, long first, long count)
        : x(all.x + first * all.stride), rows(count), width(all.width), stride(all.stride), all(&all), first(first) {}
    Inputs(const Inputs&) = delete;

    // In order.
    FloatRows plain() const {
        if constexpr (sizeof(T) == sizeof(float)) return {x, stride};
        if (all) return all->plain().from(first);
        if (ordered.empty()) {
            ordered.resize(rows * width);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < width; i++) ordered[r * width + i] = wide(x[r * stride + i]);
        }
        return {ordered.data(), width};
    }

    // Of every 2 * LANES the even places, then the odd ones; zeros fill the last.
    FloatRows paired() const {
        if (all) return all->paired().from(first);
        const long padded = (width + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
        if (pairs.empty()) {
            pairs.assign(rows * padded, 0.0f);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < width; i += 2 * LANES) pair(x + r * stride + i, std::min(width - i, 2L * LANES), pairs.data() + r * padded + i);
        }
        return {pairs.data(), padded};
    }

    // As weights are multiplied.
    Strided<typename Factors<T>::Number> as_factors() const {
        if constexpr (Factors<T>::VECTORS == 1) return {x, stride};
        else return paired();
    }

   private:
    const Inputs* const all = nullptr;
    const long first = 0;
    mutable std::vector<float> ordered, pairs;

    static inline void pair(const T* from, long count, float* to) {
        if (count < 2 * LANES) {
            for (long i = 0; i < count; i++) to[i % 2 * LANES + i / 2] = wide(from[i]);
            return;
        }
        for (long i = 0; i < LANES; i++) {
            to[i] = wide(from[2 * i]);
            to[LANES + i] = wide(from[2 * i + 1]);
        }
    }
};

// Where sums go: y [rows, outputs] = scale * sum + bias (or null), or y += scale * sum; rounded once.
template <typename T>
struct Outputs {
    T* y;
    const T* bias;
    long outputs;
    bool add;
    float scale;

    // sums [count] of a row's outputs from the `first` on.
    inline void write(long row, long first, const float* sums, long count) const {
        T* to = y + row * outputs + first;
        if (add) {
#pragma omp simd
            for (long i = 0; i < count; i++) put(to[i], sums[i] * scale + wide(to[i]));
        } else if (bias) {
#pragma omp simd
            for (long i = 0; i < count; i++) put(to[i], sums[i] * scale + wide(bias[first + i]));
        } else {
#pragma omp simd
            for (long i = 0; i < count; i++) put(to[i], sums[i] * scale);
        }
    }
};

// The last weights of a row, `count` of them and fewer than a STEP, as `open` gives them; and inputs for these: zeros behind.
template <typename T>
static inline void open_some(const T* from, long count, Floats (&to)[Opened<T>::VECTORS]) {
    T some[Opened<T>::STEP] = {};
    std::copy_n(from, count, some);
    open(some, to);
}
#if defined(__AVX512BW__)
static inline void open_some(const float* from, long count, Floats (&to)[1]) {
    to[0] = (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}
static inline void open_some(const bf16* from, long count, Floats (&to)[2]) {
    const __m512i both = _mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
    to[0] = (Floats)_mm512_slli_epi32(both, 16);
    to[1] = (Floats)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
}
#endif
#if DOTS
static inline void open_some(const bf16* from, long count, __m512bh (&to)[1]) {
    to[0] = (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
}
#endif

// sums [ROWS, COUNT]: COUNT rows of weights, `width` apart, by ROWS rows of inputs; with FETCH as many weights `ahead` are fetched.
template <typename T, int COUNT, int ROWS, bool FETCH>
static inline void multiply_block(const T* w, const T* ahead, long width, Strided<typename Factors<T>::Number> x, float* sums) {
    typedef typename Factors<T>::Vector Vector;
    constexpr int VECTORS = Factors<T>::VECTORS;
    constexpr long STEP = Factors<T>::STEP;
    Floats sum[COUNT * ROWS] = {};
    // what there is less of stays in registers
    const auto step = [&](const auto& weights, const auto& inputs) __attribute__((always_inline)) {
        if constexpr (COUNT >= ROWS) {
            Vector in[ROWS][VECTORS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) inputs(r, in[r]);
#pragma GCC unroll 16
            for (int o = 0; o < COUNT; o++) {
                Vector opened[VECTORS];
                weights(o, opened);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; v++) sum[r * COUNT + o] = fused(opened[v], in[r][v], sum[r * COUNT + o]);
            }
        } else {
            Vector opened[COUNT][VECTORS];
#pragma GCC unroll 8
            for (int o = 0; o < COUNT; o++) weights(o, opened[o]);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                Vector in[VECTORS];
                inputs(r, in);
#pragma GCC unroll 8
                for (int o = 0; o < COUNT; o++)
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; v++) sum[r * COUNT + o] = fused(opened[o][v], in[v], sum[r * COUNT + o]);
            }
        }
    };
    long k = 0;
    for (; k + STEP <= width; k += STEP) {
        if (FETCH)
#pragma GCC unroll 16
            for (int o = 0; o < COUNT; o++) __builtin_prefetch(ahead + o * width + k, 0, 2);
        step([&](int o, Vector (&to)[VECTORS]) __attribute__((always_inline)) { open(w + o * width + k, to); },
             [&](int r, Vector (&to)[VECTORS]) __attribute__((always_inline)) {
                 const auto* from = x.at + r * x.stride + k;
                 if constexpr (VECTORS == 1) {
                     open(from, to);
                 } else {
#pragma GCC unroll 2
                     for (int v = 0; v < VECTORS; v++) to[v] = load(from + v * LANES);
                 }
             });
    }
    if (k < width)
        step([&](int o, Vector (&to)[VECTORS]) __attribute__((always_inline)) { open_some(w + o * width + k, width - k, to); },
             [&](int r, Vector (&to)[VECTORS]) __attribute__((always_inline)) {
                 const auto* from = x.at + r * x.stride + k;
                 // those of pairs of floats have their zeros
                 if constexpr (VECTORS == 1) {
                     open_some(from, width - k, to);
                 } else {
#pragma GCC unroll 2
                     for (int v = 0; v < VECTORS; v++) to[v] = load(from + v * LANES);
                 }
             });
    add_lanes<COUNT * ROWS>(sum, sums);
}

template <typename T, int ROWS, bool FETCH>
static inline void multiply_rows(const T* w, const T* ahead, long count, long width, Strided<typename Factors<T>::Number> x, long row, long at,
                                 const Outputs<T>& to) {
    constexpr int COUNT = SUMS / ROWS;
    float panel[ROWS][PANEL], sums[SUMS];
    const long whole = count / COUNT * COUNT;
    for (long o = 0; o < whole; o += COUNT) {
        multiply_block<T, COUNT, ROWS, FETCH>(w + o * width, ahead + o * width, width, x.from(row), sums);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < COUNT; i++) panel[r][o + i] = sums[r * COUNT + i];
    }
    for (long o = whole; o < count; o++) {
        multiply_block<T, 1, ROWS, false>(w + o * width, nullptr, width, x.from(row), sums);
        for (int r = 0; r < ROWS; r++) panel[r][o] = sums[r];
    }
    for (int r = 0; r < ROWS; r++) to.write(row + r, at, panel[r], count);
}

// Rows from `row` on, ROWS at a time and then fewer; with FETCH the first of them fetch what is ahead.
template <typename T, int ROWS, bool FETCH>
static inline void multiply_by(const T* w, const T* ahead, long count, long width, Strided<typename Factors<T>::Number> x, long rows, long row,
                               long at, const Outputs<T>& to) {
    if (FETCH && row + ROWS <= rows) {
        multiply_rows<T, ROWS, true>(w, ahead, count, width, x, row, at, to);
        return multiply_by<T, ROWS, false>(w, ahead, count, width, x, rows, row + ROWS, at, to);
    }
    for (; row + ROWS <= rows; row += ROWS) multiply_rows<T, ROWS, false>(w, ahead, count, width, x, row, at, to);
    if constexpr (ROWS > 1) multiply_by<T, ROWS / 2, FETCH>(w, ahead, count, width, x, rows, row, at, to);
}

// `count` <= PANEL outputs from `at` on, whose weights are w [count, width], of all rows; as many weights `ahead` are fetched, unless
// that is null.
template <typename T>
static void multiply_panel(const T* w, const T* ahead, long count, long width, Strided<typename Factors<T>::Number> x, long rows, long at,
                           const Outputs<T>& to) {
    if (ahead) multiply_by<T, MOST_ROWS, true>(w, ahead, count, width, x, rows, 0, at, to);
    else multiply_by<T, MOST_ROWS, false>(w, w, count, width, x, rows, 0, at, to);
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
    const auto rows = x.as_factors();
    const long width = x.width;
#pragma omp parallel for schedule(static) if (to.outputs * width > PARALLEL)
    for (long at = 0; at < to.outputs; at += PANEL) {
        const T *here = w + at * width, *ahead = at + 2 * PANEL <= to.outputs ? here + PANEL * width : nullptr;
        multiply_panel(here, ahead, std::min(PANEL, to.outputs - at), width, rows, x.rows, at, to);
    }
}
