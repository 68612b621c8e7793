// Norms, rotary positions and gated activations in bfloat16 and float32 (names ending in _fp32), forward and backward, one pass over
// memory each.
// Rows are independent and summed in a fixed order, so a row's result never depends on its neighbours or on the threads.
#include "pointwise.h"

// y = the norm of x's rows; delta (or null): first x += delta (rounded), written back to x.
template <typename T>
static void rms_forward_of(T* x, const T* delta, const T* w, T* y, long rows, long width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        T* xr = x + r * width;
        if (delta) {
            const T* dr = delta + r * width;
            for (long i = 0; i < width; i++) put(xr[i], wide(xr[i]) + wide(dr[i]));
        }
        rms_row(xr, w, y + r * width, width, eps);
    }
}

// dx = rstd * (w dy - xhat * mean(w dy * xhat)) + carry, where carry is the residual stream's own gradient (or null).
template <typename T>
static void rms_backward_of(const T* dy, const T* x, const T* w, const T* carry, T* dx, long rows, long width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const T *xr = x + r * width, *gr = dy + r * width;
        float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
        for (long i = 0; i < width; i++) {
            float v = wide(xr[i]);
            sum += v * v;
            dot += v * wide(gr[i]) * wide(w[i]);
        }
        float rstd = 1.0f / std::sqrt(sum / width + eps);
        float mean = dot * rstd * rstd * rstd / width;
        T* out = dx + r * width;
        if (carry) {
            const T* cr = carry + r * width;
            for (long i = 0; i < width; i++) put(out[i], wide(gr[i]) * wide(w[i]) * rstd - wide(xr[i]) * mean + wide(cr[i]));
        } else {
            for (long i = 0; i < width; i++) put(out[i], wide(gr[i]) * wide(w[i]) * rstd - wide(xr[i]) * mean);
        }
    }
}

// From dh, g, u: dg written over dh, du and h anew.
template <typename T>
static void silu_gate_backward_of(T* dh, const T* g, const T* u, T* du, T* h, long n) {
#pragma omp parallel for simd schedule(static) if (n > PARALLEL)
    for (long i = 0; i < n; i++) {
        float x = wide(g[i]), y = wide(u[i]), d = wide(dh[i]);
        float s = 1.0f / (1.0f + exp_fast(-x));
        float a = x * s;
        put(dh[i], d * y * (s * (1.0f + x * (1.0f - s))));
        put(du[i], d * a);
        put(h[i], a * y);
    }
}

// Each for both formats.
LORRY void rms_forward(bf16* x, const bf16* delta, const bf16* w, bf16* y, long rows, long width, float eps) {
    rms_forward_of(x, delta, w, y, rows, width, eps);
}
LORRY void rms_forward_fp32(float* x, const float* delta, const float* w, float* y, long rows, long width, float eps) {
    rms_forward_of(x, delta, w, y, rows, width, eps);
}
LORRY void rms_backward(const bf16* dy, const bf16* x, const bf16* w, const bf16* carry, bf16* dx, long rows, long width, float eps) {
    rms_backward_of(dy, x, w, carry, dx, rows, width, eps);
}
LORRY void rms_backward_fp32(const float* dy, const float* x, const float* w, const float* carry, float* dx, long rows, long width, float eps) {
    rms_backward_of(dy, x, w, carry, dx, rows, width, eps);
}
LORRY void rotate_rows(bf16* x, const float* cos, const float* sin, long tokens, long heads, long dim, long half, float sign) {
    rotate(x, cos, sin, tokens, heads, dim, half, sign);
}
LORRY void rotate_rows_fp32(float* x, const float* cos, const float* sin, long tokens, long heads, long dim, long half, float sign) {
    rotate(x, cos, sin, tokens, heads, dim, half, sign);
}
LORRY void silu_gate(const bf16* g, const bf16* u, bf16* h, long n) {
    gate_with_silu(g, u, h, n);
}
LORRY void silu_gate_fp32(const float* g, const float* u, float* h, long n) {
    gate_with_silu(g, u, h, n);
}
LORRY void silu_gate_backward(bf16* dh, const bf16* g, const bf16* u, bf16* du, bf16* h, long n) {
    silu_gate_backward_of(dh, g, u, du, h, n);
}
LORRY void silu_gate_backward_fp32(float* dh, const float* g, const float* u, float* du, float* h, long n) {
    silu_gate_backward_of(dh, g, u, du, h, n);
}

// out = x * factor + shift (or null), both by column; out may be x.
LORRY void scale_rows(const bf16* x, const float* factor, const float* shift, bf16* out, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const bf16* xr = x + r * width;
        bf16* to = out + r * width;
        if (shift) {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = narrow(widen(xr[i]) * factor[i] + shift[i]);
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++) to[i] = narrow(widen(xr[i]) * factor[i]);
        }
    }
}

// Of y = u * factor + shift: out = dy * factor, the gradient of u (out may be dy); sums [2, width]: of dy * y and of dy, by column. Each
// column is summed by one thread, row after row.
LORRY void scale_rows_backward(const bf16* dy, const bf16* y, const float* factor, bf16* out, float* sums, long rows, long width) {
    constexpr long STEP = 64;  // columns at a time: their sums stay in registers
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long c = 0; c < width; c += STEP) {
        const long n = width - c < STEP ? width - c : STEP;
        float dots[STEP] = {}, total[STEP] = {};
        for (long r = 0; r < rows; r++) {
            const bf16 *g = dy + r * width + c, *yr = y + r * width + c;
            bf16* to = out + r * width + c;
#pragma omp simd
            for (long i = 0; i < n; i++) {
                float v = widen(g[i]);
                dots[i] += v * widen(yr[i]);
                total[i] += v;
                to[i] = narrow(v * factor[c + i]);
            }
        }
        for (long i = 0; i < n; i++) {
            sums[c + i] = dots[i];
            sums[width + c + i] = total[i];
        }
    }
}
