// What stands between the matrix products of a layer, forward: RMS norm, rotary positions, the gated activation; of rows of a training
// step, and of a step of generation.
//
// Rows are independent and summed in a fixed order, so a row's result never depends on its neighbours or on the threads.
#pragma once
#include "common.h"

// y = w * T(x * rstd) of a row, as the published RMS norm rounds; y may be x.
template <typename T>
static inline void rms_row(const T* x, const T* w, T* y, long width, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += wide(x[i]) * wide(x[i]);
    const float rstd = 1.0f / std::sqrt(sum / width + eps);
#pragma omp simd
    for (long i = 0; i < width; i++) {
        T part;
        put(part, wide(x[i]) * rstd);
        put(y[i], wide(w[i]) * wide(part));
    }
}

// Turn the first 2 * half dimensions of every head of x [rows, heads, width] in place, half-split; sign -1 turns back, which is also the
// gradient. cos, sin [rows, half].
template <typename T>
static void rotate(T* x, const float* cos, const float* sin, long rows, long heads, long width, long half, float sign) {
#pragma omp parallel for schedule(static) if (rows * heads * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const float *c = cos + r * half, *s = sin + r * half;
        for (long h = 0; h < heads; h++) {
            T *a = x + (r * heads + h) * width, *b = a + half;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                const float u = wide(a[i]), v = wide(b[i]), n = sign * s[i];
                put(a[i], u * c[i] - v * n);
                put(b[i], v * c[i] + u * n);
            }
        }
    }
}

// h = silu(g) * u, or silu(g) where there is no u; h may be g.
template <typename T>
static void gate_with_silu(const T* g, const T* u, T* h, long count) {
#pragma omp parallel for simd schedule(static) if (count > PARALLEL)
    for (long i = 0; i < count; i++) {
        const float x = wide(g[i]);
        put(h[i], x / (1.0f + exp_fast(-x)) * (u ? wide(u[i]) : 1.0f));
    }
}
