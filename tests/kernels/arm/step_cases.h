// The kernels of a training step: norms, rotary positions, gates, dropout, the vocabulary's softmax.
#pragma once
#include "check.h"

extern "C" {
void rms_forward(bf16*, const bf16*, const bf16*, bf16*, long, long, float);
void rms_backward(const bf16*, const bf16*, const bf16*, const bf16*, bf16*, long, long, float);
void rotate_rows(bf16*, const float*, const float*, long, long, long, long, float);
void silu_gate(const bf16*, const bf16*, bf16*, long);
void silu_gate_backward(bf16*, const bf16*, const bf16*, bf16*, bf16*, long);
void scale_rows(const bf16*, const float*, const float*, bf16*, long, long);
void scale_rows_backward(const bf16*, const bf16*, const float*, bf16*, float*, long, long);
void dropout_rows(const bf16*, bf16*, const int64_t*, const int64_t*, long, long, long, long, long, long, long, float);
void dropout_mask(uint8_t*, const int64_t*, const int64_t*, long, long, long, long, long, long, long);
int softmax_fold(bf16*, float*, int64_t*, float*, long, long, long, long, long);
int softmax_slope(const bf16*, bf16*, const float*, long, long, long);
int softmax_gather(float*, const bf16*, const float*, long, long);
void rms_forward_fp32(float*, const float*, const float*, float*, long, long, float);
void rms_backward_fp32(const float*, const float*, const float*, const float*, float*, long, long, float);
void rotate_rows_fp32(float*, const float*, const float*, long, long, long, long, float);
void silu_gate_fp32(const float*, const float*, float*, long);
void silu_gate_backward_fp32(float*, const float*, const float*, float*, float*, long);
int softmax_fold_fp32(float*, float*, int64_t*, float*, long, long, long, long, long);
int softmax_slope_fp32(const float*, float*, const float*, long, long, long);
int softmax_gather_fp32(float*, const float*, const float*, long, long);
}

// The same names for both formats.
static void rms_forward(float* a, const float* b, const float* c, float* d, long e, long f, float g) { rms_forward_fp32(a, b, c, d, e, f, g); }
static void rms_backward(const float* a, const float* b, const float* c, const float* d, float* e, long f, long g, float h) { rms_backward_fp32(a, b, c, d, e, f, g, h); }
static void rotate_rows(float* a, const float* b, const float* c, long d, long e, long f, long g, float h) { rotate_rows_fp32(a, b, c, d, e, f, g, h); }
static void silu_gate(const float* a, const float* b, float* c, long d) { silu_gate_fp32(a, b, c, d); }
static void silu_gate_backward(float* a, const float* b, const float* c, float* d, float* e, long f) { silu_gate_backward_fp32(a, b, c, d, e, f); }
static int softmax_fold(float* a, float* b, int64_t* c, float* d, long e, long f, long g, long h, long i) { return softmax_fold_fp32(a, b, c, d, e, f, g, h, i); }
static int softmax_slope(const float* a, float* b, const float* c, long d, long e, long f) { return softmax_slope_fp32(a, b, c, d, e, f); }
static int softmax_gather(float* a, const float* b, const float* c, long d, long e) { return softmax_gather_fp32(a, b, c, d, e); }

// What single precision adds to the sizes that `near_rounded` is given; in bfloat16 the last rounding hides it.
template <typename T>
static double single(double x) { return sizeof(T) == 4 ? std::fabs(x) : 0; }

// --- norms, rotary positions, gates

static const long SHAPES[][2] = {{1, 1}, {3, 7}, {5, 33}, {2, 131}, {67, 515}};  // the last is shared by threads

template <typename T>
static void norms() {
    const float eps = 1e-5f;
    for (const auto& [rows, width] : SHAPES)
        for (bool residual : {false, true}) {
            List<T> x = numbers<T>(rows * width, 2), before = x, delta = numbers<T>(rows * width), w = numbers<T>(width, 0.2, 1);
            List<T> y(rows * width), dy = numbers<T>(rows * width), carry = numbers<T>(rows * width), dx(rows * width);
            rms_forward(x.data(), residual ? delta.data() : nullptr, w.data(), y.data(), rows, width, eps);
            rms_backward(dy.data(), x.data(), w.data(), residual ? carry.data() : nullptr, dx.data(), rows, width, eps);
            for (long r = 0; r < rows; r++) {
                double squares = 0, dot = 0, sizes = 0;
                for (long i = r * width; i < (r + 1) * width; i++) {
                    near_rounded(x[i], wide(before[i]) + (residual ? wide(delta[i]) : 0));
                    squares += wide(x[i]) * wide(x[i]);
                    const double term = wide(x[i]) * wide(dy[i]) * wide(w[i - r * width]);
                    dot += term, sizes += std::fabs(term);
                }
                const double rstd = 1 / std::sqrt(squares / width + eps), cube = rstd * rstd * rstd / width;
                for (long i = r * width; i < (r + 1) * width; i++) {
                    const double by = wide(w[i - r * width]), a = wide(dy[i]) * by * rstd, c = residual ? wide(carry[i]) : 0;
                    near(wide(y[i]), by * wide(x[i]) * rstd, std::fabs(by * wide(x[i]) * rstd) / (sizeof(T) == 2 ? 128 : 1e6));  // rounded twice
                    near_rounded(dx[i], a - wide(x[i]) * dot * cube + c, std::fabs(a) + std::fabs(wide(x[i])) * sizes * cube + std::fabs(c));
                }
            }
        }
}

template <typename T>
static void rotary() {
    for (long tokens : {1L, 3L, 61L})
        for (long half : {1L, 5L, 32L}) {
            const long heads = 3, dim = 2 * half + 7;  // what is behind the rotated part stays
            List<float> cos(tokens * half), sin(tokens * half);
            for (long i = 0; i < tokens * half; i++) cos[i] = (float)std::cos(i * 0.37), sin[i] = (float)std::sin(i * 0.37);
            for (float sign : {1.0f, -1.0f}) {
                List<T> x = numbers<T>(tokens * heads * dim), was = x;
                rotate_rows(x.data(), cos.data(), sin.data(), tokens, heads, dim, half, sign);
                for (long row = 0; row < tokens * heads; row++)
                    for (long i = 0; i < dim; i++) {
                        const long at = row * dim + i, j = i % half, t = row / heads;
                        if (i >= 2 * half) {
                            same(x[at], was[at]);
                            continue;
                        }
                        const double u = wide(was[row * dim + j]), v = wide(was[row * dim + half + j]);
                        const double c = cos[t * half + j], n = sign * sin[t * half + j];
                        near_rounded(x[at], i < half ? u * c - v * n : v * c + u * n, std::fabs(u) + std::fabs(v));
                    }
            }
        }
}

template <typename T>
static void gates() {
    for (long n : {1L, 7L, 129L, 33333L}) {
        List<T> g = numbers<T>(n, 3), u = numbers<T>(n), h(n), d = numbers<T>(n), dg = d, du(n), again(n);
        put(g[0], -40);
        if (n > 6) put(g[5], 40), put(g[3], NAN);  // a NaN has to be seen
        silu_gate(g.data(), u.data(), h.data(), n);
        silu_gate_backward(dg.data(), g.data(), u.data(), du.data(), again.data(), n);
        for (long i = 0; i < n; i++) {
            const double x = wide(g[i]), y = wide(u[i]), s = 1 / (1 + std::exp(-x));
            if (x != x) {
                for (T got : {h[i], dg[i], du[i], again[i]}) same(wide(got), NAN);
                continue;
            }
            near_rounded(h[i], x * s * y, single<T>(x * s * y));
            near_rounded(again[i], x * s * y, single<T>(x * s * y));
            near_rounded(du[i], wide(d[i]) * x * s, single<T>(wide(d[i]) * x * s));
            const double slope = s * (1 + x * (1 - s));
            near_rounded(dg[i], wide(d[i]) * y * slope, std::fabs(wide(d[i]) * y * s) * (1 + std::fabs(x)));
        }
    }
}

static void columns() {
    for (const auto& [rows, width] : SHAPES)
        for (bool shifted : {false, true}) {
            List<bf16> x = numbers<bf16>(rows * width), out(rows * width), dy = numbers<bf16>(rows * width), dx(rows * width);
            List<float> factor = numbers<float>(width), shift = numbers<float>(width), sums(2 * width);
            scale_rows(x.data(), factor.data(), shifted ? shift.data() : nullptr, out.data(), rows, width);
            scale_rows_backward(dy.data(), x.data(), factor.data(), dx.data(), sums.data(), rows, width);
            for (long c = 0; c < width; c++) {
                double dots = 0, total = 0, sizes = 0, size = 0;
                for (long i = c; i < rows * width; i += width) {
                    const double product = wide(x[i]) * factor[c], add = shifted ? shift[c] : 0;
                    near_rounded(out[i], product + add, std::fabs(product) + std::fabs(add));
                    near_rounded(dx[i], wide(dy[i]) * factor[c]);
                    dots += wide(dy[i]) * wide(x[i]), total += wide(dy[i]);
                    sizes += std::fabs(wide(dy[i]) * wide(x[i])), size += std::fabs(wide(dy[i]));
                }
                near(sums[c], dots, 1e-5 * sizes);
                near(sums[width + c], total, 1e-5 * size);
            }
        }
}

// --- dropout

static bool keeps(uint64_t n, uint64_t seed_, uint64_t threshold) {
    const uint64_t word = 0xffffffff, low = seed_ & word, high = seed_ >> 32;
    uint64_t x = ((n >> 1) * 0x9E3779B1 + low) & word;
    x = ((x ^ x >> 16) * 0x85EBCA6B) & word;
    x = (((x ^ x >> 13) + high) * 0xC2B2AE35) & word;
    x = ((x ^ x >> 16) * 0x27D4EB2F) & word;
    x ^= x >> 15;
    return (n % 2 ? x >> 16 : x & 0xffff) >= threshold;
}

static void dropout() {
    const List<int64_t> seeds = {0x123456789abcdef, 77, 0x7edcba9876543210}, starts = {0, 5, 6, 70};
    for (long whole : {8L, 9L, 701L})
        for (long offset : {0L, 3L, 4L}) {
            const long first = 2, rows = 60, width = whole - offset, threshold = 19661;
            const float keep = 1 / 0.7f;
            List<bf16> x = numbers<bf16>(rows * width), y(rows * width);
            List<uint8_t> mask(rows * width);
            dropout_rows(x.data(), y.data(), seeds.data(), starts.data(), 3, first, rows, width, whole, offset, threshold, keep);
            dropout_mask(mask.data(), seeds.data(), starts.data(), 3, first, rows, width, whole, offset, threshold);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < width; i++) {
                    const int s = first + r < starts[1] ? 0 : first + r < starts[2] ? 1 : 2;
                    const bool kept = keeps((first + r - starts[s]) * whole + offset + i, seeds[s], threshold);
                    same(mask[r * width + i], kept);
                    near_rounded(y[r * width + i], kept ? wide(x[r * width + i]) * keep : 0);
                }
        }
}

// --- the vocabulary's softmax

template <typename T>
static void softmax() {
    for (const auto& [rows, width] : SHAPES)
        for (long moments : {0L, 1L})
            for (long write : {0L, 1L}) {
                // two tiles of unequal width, side by side
                const long widths[2] = {width, width + 3};
                List<T> tiles[2] = {numbers<T>(rows * widths[0], 4), numbers<T>(rows * widths[1], 4)}, was[2] = {tiles[0], tiles[1]};
                List<float> state(rows * 5), scale(rows);
                List<int64_t> top(rows);
                for (long r = 0; r < rows; r++) state[r * 5] = -INFINITY;
                List<double> peak(rows, -INFINITY);
                for (long tile = 0, seen = 0; tile < 2; seen += widths[tile++]) {
                    softmax_fold(tiles[tile].data(), state.data(), top.data(), scale.data(), rows, widths[tile], seen, moments, write);
                    for (long r = 0; r < rows; r++) {
                        const double former = peak[r];
                        for (long i = 0; i < widths[tile]; i++) peak[r] = std::fmax(peak[r], wide(was[tile][r * widths[tile] + i]));
                        near(scale[r], std::exp(former - peak[r]), 1e-6);
                        for (long i = r * widths[tile]; write && i < (r + 1) * widths[tile]; i++) {
                            // the larger z is, the more its rounding weighs
                            const double z = wide(was[tile][i]) - peak[r], e = std::exp(z);
                            near_rounded(tiles[tile][i], e, single<T>(e * (1 - z / 8)));
                        }
                    }
                }
                for (long r = 0; r < rows; r++) {
                    double e = 0, first = 0, second = 0, plain = 0;
                    int64_t place = -1;
                    for (long tile = 0, seen = 0; tile < 2; seen += widths[tile++])
                        for (long i = 0; i < widths[tile]; i++) {
                            const double l = wide(was[tile][r * widths[tile] + i]), z = l - peak[r], p = std::exp(z);
                            if (place < 0 && l == peak[r]) place = seen + i;
                            e += p, first += p * z, second += p * z * z, plain += z;
                        }
                    same(state[r * 5], peak[r]);
                    same((double)top[r], (double)place);
                    near(state[r * 5 + 1], e, 1e-5 * e);
                    if (!moments) continue;
                    near(state[r * 5 + 2], first, 2e-5 * std::fabs(first) + 1e-6);
                    near(state[r * 5 + 3], second, 2e-5 * second + 1e-6);
                    near(state[r * 5 + 4], plain, 1e-5 * std::fabs(plain) + 1e-6);
                }
            }
}

template <typename T>
static void slopes() {
    for (const auto& [rows, width] : SHAPES)
        for (long moments : {0L, 1L}) {
            List<T> x = numbers<T>(rows * width, 3), out(rows * width), part = numbers<T>(rows * width);
            List<float> terms = numbers<float>(rows * 6), scale = numbers<float>(rows), sum = numbers<float>(rows * width), was = sum;
            softmax_slope(x.data(), out.data(), terms.data(), rows, width, moments);
            softmax_gather(sum.data(), part.data(), scale.data(), rows, width);
            for (long r = 0; r < rows; r++)
                for (long i = r * width; i < (r + 1) * width; i++) {
                    const float* t = &terms[r * 6];
                    const double p = std::exp(wide(x[i]) - t[0]), y = wide(x[i]) - t[1];
                    if (moments)
                        near_rounded(out[i], p * (t[2] + t[3] * y + t[4] * y * y) + t[5],
                                     p * (std::fabs(t[2]) + std::fabs(t[3] * y) + std::fabs(t[4] * y * y)) + std::fabs(t[5]) + 3 * single<T>(p * (t[2] + t[3] * y + t[4] * y * y)));
                    else
                        near_rounded(out[i], p * t[2], p * std::fabs(t[2]) + 3 * single<T>(p * t[2]));
                    near_rounded(sum[i], was[i] * (double)scale[r] + wide(part[i]), std::fabs(was[i] * scale[r]) + std::fabs(wide(part[i])));
                }
        }
}
