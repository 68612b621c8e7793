// The softmax of the vocabulary, a tile of columns at a time, over logits in bfloat16 or float32 (names ending in
// _fp32). Rows are independent of each other.
#include "common.h"

constexpr float LOWEST = -200.0f;  // e^-200 is nothing: where a moment weighs by the exponential, -inf may stand as this

// Floats as integers in the same order (a NaN of positive sign above infinity): their maximum vectorises.
static inline int16_t ordered(bf16 x) {
    int16_t k = (int16_t)x;
    return k ^ (int16_t)((k >> 15) & 0x7fff);
}

static inline int32_t ordered(float x) {
    int32_t k;
    std::memcpy(&k, &x, 4);
    return k ^ ((k >> 31) & 0x7fffffff);
}

// The other way.
static inline float from_ordered(int16_t k) { return widen((bf16)(k ^ (int16_t)((k >> 15) & 0x7fff))); }

static inline float from_ordered(int32_t k) {
    k ^= (k >> 31) & 0x7fffffff;
    float x;
    std::memcpy(&x, &k, 4);
    return x;
}

// Fold one tile into a row's state: peak, sums over e = exp(l - peak) of 1, z, z^2 (z = l - peak), and the sum of z.
// Returns what sums relative to the former peak are to be multiplied by.
template <bool MOMENTS, bool WRITE, typename T>
static float fold(T* x, float* state, int64_t* top, long width, long seen) {
    auto high = ordered(x[0]);
#pragma omp simd reduction(max : high)
    for (long i = 0; i < width; i++) high = ordered(x[i]) > high ? ordered(x[i]) : high;
    float former = state[0], m = from_ordered(high);
    float peak = m > former || m != m ? m : former;
    if (m > former || seen == 0) {
        long i = 0;
        while (ordered(x[i]) != high) i++;
        *top = seen + i;
    }
    float shift = peak == -INFINITY ? 0.0f : peak;
    float total = 0, first = 0, second = 0, plain = 0;
#pragma omp simd reduction(+ : total, first, second, plain)
    for (long i = 0; i < width; i++) {
        float z = wide(x[i]) - shift, e = exp_fast(z);
        total += e;
        if (MOMENTS) {
            float low = z < LOWEST ? LOWEST : z, weighed = e * low;
            first += weighed;
            second += weighed * low;
            plain += z;
        }
        if (WRITE) put(x[i], e);
    }
    bool fresh = former == -INFINITY;
    float down = fresh ? 0.0f : former - peak, scale = fresh ? 0.0f : std::exp(down);
    state[0] = peak;
    if (MOMENTS) {
        state[3] = scale * (state[3] + 2 * down * state[2] + down * down * state[1]) + second;
        state[2] = scale * (state[2] + down * state[1]) + first;
        state[4] = state[4] + down * seen + plain;
    }
    state[1] = scale * state[1] + total;
    return scale;
}

template <typename T>
static void fold_rows(T* x, float* state, int64_t* top, float* scale, long rows, long width, long seen, long moments, long write) {
    auto run = moments ? (write ? fold<true, true, T> : fold<true, false, T>) : (write ? fold<false, true, T> : fold<false, false, T>);
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) scale[r] = run(x + r * width, state + r * 5, top + r, width, seen);
}

// x [rows, width] are columns seen .. seen + width of the logits; state [rows, 5], top [rows], scale [rows].
// write: x becomes exp(x - peak), by the peak so far.
LORRY int softmax_fold(bf16* x, float* state, int64_t* top, float* scale, long rows, long width, long seen, long moments, long write) {
    fold_rows(x, state, top, scale, rows, width, seen, moments, write);
    return 0;
}
LORRY int softmax_fold_fp32(float* x, float* state, int64_t* top, float* scale, long rows, long width, long seen, long moments,
                            long write) {
    fold_rows(x, state, top, scale, rows, width, seen, moments, write);
    return 0;
}

template <typename T>
static void slope_rows(const T* x, T* out, const float* terms, long rows, long width, long moments) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const float* t = terms + r * 6;
        const float shift = t[0], centre = t[1], a = t[2], b = t[3], c = t[4], k = t[5];
        const T* in = x + r * width;
        T* o = out + r * width;
        if (moments) {
#pragma omp simd
            for (long i = 0; i < width; i++) {
                float l = wide(in[i]), y = l - centre;
                y = y < LOWEST ? LOWEST : y;
                put(o[i], exp_fast(l - shift) * (a + y * (b + y * c)) + k);
            }
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++) put(o[i], exp_fast(wide(in[i]) - shift) * a);
        }
    }
}

// out = p (a + b y + c y^2) + k with p = exp(l - shift), y = l - centre; terms [rows, 6] = shift, centre, a, b, c, k. May be in place.
LORRY int softmax_slope(const bf16* x, bf16* out, const float* terms, long rows, long width, long moments) {
    slope_rows(x, out, terms, rows, width, moments);
    return 0;
}
LORRY int softmax_slope_fp32(const float* x, float* out, const float* terms, long rows, long width, long moments) {
    slope_rows(x, out, terms, rows, width, moments);
    return 0;
}

template <typename T>
static void gather_rows(float* sum, const T* part, const float* scale, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        float s = scale[r];
        for (long i = 0; i < width; i++) sum[r * width + i] = sum[r * width + i] * s + wide(part[r * width + i]);
    }
}

// sum = sum * scale + part, row by row.
LORRY int softmax_gather(float* sum, const bf16* part, const float* scale, long rows, long width) {
    gather_rows(sum, part, scale, rows, width);
    return 0;
}
LORRY int softmax_gather_fp32(float* sum, const float* part, const float* scale, long rows, long width) {
    gather_rows(sum, part, scale, rows, width);
    return 0;
}
