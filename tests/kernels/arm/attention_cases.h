// Causal attention by segment, forward and backward.
#pragma once
#include "check.h"

extern "C" {
long attention_vectors_space(const int64_t*, long, long, long, long, long, long);
void attention_vectors_forward(const void*, const void*, const void*, void*, float*, const int64_t*, long, long, long, long, long, float,
                               float*, long);
void attention_vectors_backward(const void*, const void*, const void*, const void*, const float*, const void*, void*, void*, void*,
                                const int64_t*, long, long, long, long, long, float, float*, long);
}

// Scratch space that starts at a cache line, as the caller gives it.
static float* space_for(const List<int64_t>& starts, long heads, long groups, long width, bool backward, List<float>& held) {
    const long bytes = attention_vectors_space(starts.data(), starts.size() - 1, starts.back(), heads, groups, width, backward);
    held.assign(bytes / 4 + 32, NAN);
    return (float*)(((uintptr_t)held.data() + 63) / 64 * 64);
}

template <typename T>
static void attention_of(const List<int64_t>& starts, long heads, long groups, long width) {
    const long segments = starts.size() - 1, tokens = starts.back(), share = heads / groups, narrow = sizeof(T) == 2;
    const float scale = 0.7f / std::sqrt((float)width);
    List<T> q = numbers<T>(tokens * heads * width, 2), k = numbers<T>(tokens * groups * width), v = numbers<T>(tokens * groups * width);
    List<T> go = numbers<T>(tokens * heads * width), o(q.size()), dq(q.size()), dk(k.size()), dv(k.size());
    List<float> lse(heads * tokens), held;
    attention_vectors_forward(q.data(), k.data(), v.data(), o.data(), lse.data(), starts.data(), segments, tokens, heads, groups, width,
                              scale, space_for(starts, heads, groups, width, false, held), narrow);
    attention_vectors_backward(q.data(), k.data(), v.data(), o.data(), lse.data(), go.data(), dq.data(), dk.data(), dv.data(),
                               starts.data(), segments, tokens, heads, groups, width, scale,
                               space_for(starts, heads, groups, width, true, held), narrow);
    // gradients of keys and values, and how far off single precision may be
    List<double> wk(k.size()), wv(k.size()), sk(k.size()), sv(k.size());
    const double rounding = narrow ? 1.0 / 256 : 0x1p-23;
    for (long s = 0; s < segments; s++)
        for (long h = 0; h < heads; h++)
            for (long t = starts[s]; t < starts[s + 1]; t++) {
                const long at = (t * heads + h) * width, g = h / share;
                List<double> p(t + 1), dp(t + 1);
                double top = -INFINITY, sum = 0, delta = 0, loose = 0;
                for (long j = starts[s]; j <= t; j++) {
                    for (long i = 0; i < width; i++) p[j] += scale * wide(q[at + i]) * wide(k[(j * groups + g) * width + i]);
                    top = std::fmax(top, p[j]);
                }
                for (long j = starts[s]; j <= t; j++) sum += p[j] = std::exp(p[j] - top);
                near(lse[h * tokens + t], (top + std::log(sum)) / std::log(2.0), 2e-5);
                for (long j = starts[s]; j <= t; j++) {
                    p[j] /= sum;
                    for (long i = 0; i < width; i++) dp[j] += wide(go[at + i]) * wide(v[(j * groups + g) * width + i]);
                    delta += p[j] * dp[j];
                }
                // backward sums go * o, of which o was rounded
                for (long i = 0; i < width; i++) loose += rounding * std::fabs(wide(go[at + i]) * wide(o[at + i]));
                for (long i = 0; i < width; i++) {
                    double out = 0, grad = 0, size = 0, off = 0;
                    for (long j = starts[s]; j <= t; j++) {
                        const long key = (j * groups + g) * width + i;
                        const double ds = scale * p[j] * (dp[j] - delta);
                        const double error = scale * p[j] * (loose + 3e-6 * (std::fabs(dp[j]) + std::fabs(delta) + 1));
                        out += p[j] * wide(v[key]), size += p[j] * std::fabs(wide(v[key]));
                        grad += ds * wide(k[key]), off += error * std::fabs(wide(k[key]));
                        wk[key] += ds * wide(q[at + i]), wv[key] += p[j] * wide(go[at + i]);
                        sk[key] += error * std::fabs(wide(q[at + i])), sv[key] += 3e-6 * p[j] * std::fabs(wide(go[at + i]));
                    }
                    near_rounded(o[at + i], out, 10 * size);
                    within(wide(dq[at + i]), grad, off + 1.01 * rounding * std::fabs(grad) + 1e-7);
                }
            }
    for (size_t i = 0; i < k.size(); i++) {
        within(wide(dk[i]), wk[i], sk[i] + 1.01 * rounding * std::fabs(wk[i]) + 1e-7);
        within(wide(dv[i]), wv[i], sv[i] + 1.01 * rounding * std::fabs(wv[i]) + 1e-7);
    }
}

static void attention() {
    const List<int64_t> ragged = {0, 1, 4, 71, 104}, long_one = {0, 131};
    for (const auto& starts : {ragged, long_one})
        for (long width : {7L, 64L}) {
            attention_of<float>(starts, 3, 1, width), attention_of<bf16>(starts, 3, 1, width);
            attention_of<float>(starts, 2, 2, width), attention_of<bf16>(starts, 2, 2, width);
        }
}
