// Norms, rotary positions and gated activations in bfloat16, forward and backward, one pass over memory each.
// Rows are independent and summed in a fixed order, so a row's result never depends on its neighbours or on the threads.
#include "common.h"

// y = w * bf16(x * rstd), as the published RMS norm rounds; residual: first x += delta (rounded), written back to x.
LORRY void rms_forward(bf16* x, const bf16* delta, const bf16* w, bf16* y, long rows, long width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        bf16* xr = x + r * width;
        if (delta) {
            const bf16* dr = delta + r * width;
            for (long i = 0; i < width; i++) xr[i] = narrow(widen(xr[i]) + widen(dr[i]));
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += widen(xr[i]) * widen(xr[i]);
        float rstd = 1.0f / std::sqrt(sum / width + eps);
        bf16* yr = y + r * width;
        for (long i = 0; i < width; i++) yr[i] = narrow(widen(w[i]) * widen(narrow(widen(xr[i]) * rstd)));
    }
}

// dx = rstd * (w dy - xhat * mean(w dy * xhat)) + carry, where carry is the residual stream's own gradient (or null).
LORRY void rms_backward(const bf16* dy, const bf16* x, const bf16* w, const bf16* carry, bf16* dx, long rows, long width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const bf16 *xr = x + r * width, *gr = dy + r * width;
        float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
        for (long i = 0; i < width; i++) {
            float v = widen(xr[i]);
            sum += v * v;
            dot += v * widen(gr[i]) * widen(w[i]);
        }
        float rstd = 1.0f / std::sqrt(sum / width + eps);
        float mean = dot * rstd * rstd * rstd / width;
        bf16* out = dx + r * width;
        if (carry) {
            const bf16* cr = carry + r * width;
            for (long i = 0; i < width; i++)
                out[i] = narrow(widen(gr[i]) * widen(w[i]) * rstd - widen(xr[i]) * mean + widen(cr[i]));
        } else {
            for (long i = 0; i < width; i++) out[i] = narrow(widen(gr[i]) * widen(w[i]) * rstd - widen(xr[i]) * mean);
        }
    }
}

// Rotate the first 2*half dimensions of every head in place; sign -1 turns back, which is also the gradient.
LORRY void rotate_rows(bf16* x, const float* cos, const float* sin, long tokens, long heads, long dim, long half, float sign) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim > PARALLEL)
    for (long t = 0; t < tokens; t++) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (long h = 0; h < heads; h++) {
            bf16* a = x + (t * heads + h) * dim;
            bf16* b = a + half;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float u = widen(a[i]), v = widen(b[i]), n = sign * s[i];
                a[i] = narrow(u * c[i] - v * n);
                b[i] = narrow(v * c[i] + u * n);
            }
        }
    }
}

// h = silu(g) * u
LORRY void silu_gate(const bf16* g, const bf16* u, bf16* h, long n) {
#pragma omp parallel for simd schedule(static) if (n > PARALLEL)
    for (long i = 0; i < n; i++) {
        float x = widen(g[i]);
        h[i] = narrow(x / (1.0f + exp_fast(-x)) * widen(u[i]));
    }
}

// From dh, g, u: dg written over dh, du and h anew.
LORRY void silu_gate_backward(bf16* dh, const bf16* g, const bf16* u, bf16* du, bf16* h, long n) {
#pragma omp parallel for simd schedule(static) if (n > PARALLEL)
    for (long i = 0; i < n; i++) {
        float x = widen(g[i]), y = widen(u[i]), d = widen(dh[i]);
        float s = 1.0f / (1.0f + exp_fast(-x));
        float a = x * s;
        dh[i] = narrow(d * y * (s * (1.0f + x * (1.0f - s))));
        du[i] = narrow(d * a);
        h[i] = narrow(a * y);
    }
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
