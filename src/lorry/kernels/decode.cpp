// One step of generation: the key/value cache, attention of each row's newest token over what the cache holds of that row, and the
// choice of a token, in bfloat16 and float.
//
// Every row is computed alone, in a fixed order: its result depends neither on its neighbours nor on the number of threads.
#include "few_rows.h"

#include <algorithm>
#include <vector>

// A row of the cache is one piece of memory [layers, 2, groups, held, width], keys then values; table [rows, 2]: its address, held.
template <typename T>
static inline T* part(const int64_t* table, long row, long layer, long side, long groups, long g, long width) {
    return (T*)table[2 * row] + (((layer * 2 + side) * groups + g) * table[2 * row + 1]) * width;
}

// Store k, v [tokens, groups, width] of tokens at (row, position) of a layer.
template <typename T>
static void store(const T* k, const T* v, const int64_t* table, const int64_t* rows, const int64_t* positions, long layer, long tokens,
                  long groups, long width) {
#pragma omp parallel for schedule(static) if (tokens * groups * width > PARALLEL)
    for (long t = 0; t < tokens; t++)
        for (long g = 0; g < groups; g++) {
            long from = (t * groups + g) * width, to = positions[t] * width;
            std::memcpy(part<T>(table, rows[t], layer, 0, groups, g, width) + to, k + from, width * sizeof(T));
            std::memcpy(part<T>(table, rows[t], layer, 1, groups, g, width) + to, v + from, width * sizeof(T));
        }
}

// Scores of `share` query heads against n keys, and sums of n values weighted by them: p [share, n], out [share, width].
template <typename T>
static void score_any(const T* q, const T* k, long n, long share, long width, float* p, long first) {
    const Inputs<T> queries(q, share, width, width);
    const auto heads = queries.as_factors();
    for (long h = 0; h < share; h++) {
        long t = first;
        for (; t + SUMS <= n; t += SUMS) multiply_block<T, SUMS, 1, false>(k + t * width, nullptr, width, heads.from(h), p + h * n + t);
        for (; t + 4 <= n; t += 4) multiply_block<T, 4, 1, false>(k + t * width, nullptr, width, heads.from(h), p + h * n + t);
        for (; t < n; t++) multiply_block<T, 1, 1, false>(k + t * width, nullptr, width, heads.from(h), p + h * n + t);
    }
}

template <typename T>
static void weigh_any(const float* p, const T* v, long n, long share, long width, float* out) {
    for (long t = 0; t < n; t++)
        for (long h = 0; h < share; h++) {
            float by = p[h * n + t];
#pragma omp simd
            for (long i = 0; i < width; i++) out[h * width + i] += by * wide(v[t * width + i]);
        }
}

// H heads of width D, whose sums stay in registers; `next` are read after these.
template <typename T, int D, int H>
static void weigh_heads(const float* p, const T* v, long n, float* out, const T* next) {
    constexpr int VECTORS = Opened<T>::VECTORS, STEP = Opened<T>::STEP, STEPS = D / STEP;
    Floats sum[H][STEPS][VECTORS] = {};
    for (long t = 0; t < n; t++) {
        for (int d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(next + t * D + d, 0, 2);
#pragma GCC unroll 16
        for (int s = 0; s < STEPS; s++) {
            Floats values[VECTORS];
            open(v + t * D + s * STEP, values);
#pragma GCC unroll 8
            for (int h = 0; h < H; h++)
#pragma GCC unroll 2
                for (int x = 0; x < VECTORS; x++) sum[h][s][x] = fused(p[h * n + t] - Floats{}, values[x], sum[h][s][x]);
        }
    }
    for (int h = 0; h < H; h++)
        for (int s = 0; s < STEPS; s++)
            for (int x = 0; x < VECTORS; x++)
                for (int i = 0; i < LANES; i++) out[h * D + s * STEP + i * VECTORS + x] = sum[h][s][x][i];
}

template <typename T, int D>
static void weigh_wide(const float* p, const T* v, long n, long share, float* out, const T* next) {
    constexpr int MOST = SUMS * LANES / D > 1 ? SUMS * LANES / D : 1;
    long h = 0;
    for (; share - h >= MOST; h += MOST) weigh_heads<T, D, MOST>(p + h * n, v, n, out + h * D, next);
    if (MOST > 3 && share - h == 3) return weigh_heads<T, D, 3>(p + h * n, v, n, out + h * D, next);
    for (; h < share; h++) weigh_heads<T, D, 1>(p + h * n, v, n, out + h * D, next);
}

#if defined(__AVX512BF16__)
template <int D>
static void score_wide(const bf16* q, const bf16* k, const bf16* v, long n, long share, float* p) {
    long t = 0;
    for (; t + 16 <= n; t += 16) {
        for (long i = t * D; i < (t + 16) * D; i += 32) _mm_prefetch((const char*)(v + i), _MM_HINT_T1);
        for (long h = 0; h < share; h++) {
            __m512bh query[D / 32];
            for (int d = 0; d < D / 32; d++) query[d] = (__m512bh)_mm512_loadu_si512(q + h * D + 32 * d);
            __m512 r[16];
            for (int i = 0; i < 16; i++) {
                r[i] = _mm512_setzero_ps();
                for (int d = 0; d < D / 32; d++) r[i] = _mm512_dpbf16_ps(r[i], (__m512bh)_mm512_loadu_si512(k + (t + i) * D + 32 * d), query[d]);
            }
            _mm512_storeu_ps(p + h * n + t, sums16(r));
        }
    }
    score_any(q, k, n, share, D, p, t);
}

#endif

static void score(const float* q, const float* k, const float*, long n, long share, long width, float* p) { score_any(q, k, n, share, width, p, 0); }
static void score(const bf16* q, const bf16* k, [[maybe_unused]] const bf16* v, long n, long share, long width, float* p) {
#if defined(__AVX512BF16__)
    if (width == 64) return score_wide<64>(q, k, v, n, share, p);
    if (width == 128) return score_wide<128>(q, k, v, n, share, p);
#endif
    score_any(q, k, n, share, width, p, 0);
}

// out: zeros before.
template <typename T>
static void weigh(const float* p, const T* v, long n, long share, long width, float* out, const T* next) {
    if (width == 64) return weigh_wide<T, 64>(p, v, n, share, out, next);
    if (width == 128) return weigh_wide<T, 128>(p, v, n, share, out, next);
    weigh_any(p, v, n, share, width, out);
}

// q, o [rows, heads, width]: each row's newest token attends to the first lengths[row] tokens the cache holds of it.
template <typename T>
static void attend(const T* q, T* o, const int64_t* table, const int64_t* lengths, long layer, long rows, long heads, long groups,
                   long width, float scale) {
    const long share = heads / groups, units = rows * groups;
    const long chunk = rows >= 8 ? groups : 1;
#pragma omp parallel
    {
        std::vector<float> space;
#pragma omp for schedule(dynamic, chunk)
        for (long u = 0; u < units; u++) {
            const long r = u / groups, g = u % groups, n = lengths[r], after = std::min(u + 1, units - 1);
            const T *k = part<T>(table, r, layer, 0, groups, g, width), *v = part<T>(table, r, layer, 1, groups, g, width);
            const T* next = part<T>(table, after / groups, layer, 0, groups, after % groups, width);
            space.assign(share * (n + width), 0.0f);
            float *p = space.data(), *sums = p + share * n;
            score(q + (r * heads + g * share) * width, k, v, n, share, width, p);
            for (long h = 0; h < share; h++) {
                float *ph = p + h * n, top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
                for (long t = 0; t < n; t++) top = ph[t] > top ? ph[t] : top;
#pragma omp simd reduction(+ : sum)
                for (long t = 0; t < n; t++) {
                    ph[t] = exp_fast((ph[t] - top) * scale);
                    sum += ph[t];
                }
                const float by = 1.0f / sum;
#pragma omp simd
                for (long t = 0; t < n; t++) ph[t] *= by;
            }
            weigh(p, v, n, share, width, sums, next);
            T* to = o + (r * heads + g * share) * width;
#pragma omp simd
            for (long i = 0; i < share * width; i++) put(to[i], sums[i]);
        }
    }
}

// The largest of a row's logits, NaN where any is.
template <typename T>
static float highest(const T* x, long count) {
    float top = -INFINITY;
    int odd = 0;
#pragma omp simd reduction(max : top) reduction(| : odd)
    for (long i = 0; i < count; i++) {
        float y = wide(x[i]);
        top = y > top ? y : top;
        odd |= y != y;
    }
    return odd ? NAN : top;
}

// The place of the largest of each row's logits (the first of several), and that logit.
template <typename T>
static void largest(const T* logits, int64_t* places, float* values, long rows, long count) {
#pragma omp parallel for schedule(static) if (rows * count > PARALLEL)
    for (long r = 0; r < rows; r++) {
        const T* x = logits + r * count;
        values[r] = highest(x, count);
        long place = 0;
        while (place < count - 1 && wide(x[place]) != values[r]) place++;
        places[r] = place;
    }
}

// Invert the cumulative distribution of each row's softmax(logits * by) at its number in [0, 1); summed in double, block by block.
template <typename T>
static void draw(const T* logits, const double* numbers, int64_t* places, float* values, long rows, long count, float by) {
    constexpr long BLOCK = 512;
#pragma omp parallel if (rows * count > PARALLEL)
    {
        std::vector<float> weights(count), sums((count + BLOCK - 1) / BLOCK);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            const T* x = logits + r * count;
            const float top = values[r] = highest(x, count);
            double total = 0;
            long last = 0;
            for (long b = 0; b * BLOCK < count; b++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (long i = b * BLOCK; i < std::min(count, (b + 1) * BLOCK); i++) {
                    float y = (wide(x[i]) - top) * by;
                    weights[i] = y > -87.0f ? exp_fast(y) : 0.0f;  // below that a float has no more than 0
                    sum += weights[i];
                }
                sums[b] = sum;
                total += sum;
                last = sum > 0 ? b : last;
            }
            const double target = numbers[r] * total;
            double before = 0;
            long b = 0, place = 0;
            while (b < last && before + sums[b] <= target) before += sums[b++];
            for (long i = b * BLOCK; i < std::min(count, (b + 1) * BLOCK) && before <= target; i++)
                if (weights[i] > 0) {
                    before += weights[i];
                    place = i;
                }
            places[r] = place;
        }
    }
}

#define STORE(T)                                                                                                                      \
    (const T* k, const T* v, const int64_t* table, const int64_t* rows, const int64_t* positions, long layer, long tokens, long groups, \
     long width)
#define ATTEND(T) \
    (const T* q, T* o, const int64_t* table, const int64_t* lengths, long layer, long rows, long heads, long groups, long width, float scale)
#define LARGEST(T) (const T* logits, int64_t* places, float* values, long rows, long count)
#define DRAW(T) (const T* logits, const double* numbers, int64_t* places, float* values, long rows, long count, float by)

LORRY int store_bf16 STORE(bf16) { return store(k, v, table, rows, positions, layer, tokens, groups, width), 0; }
LORRY int store_float STORE(float) { return store(k, v, table, rows, positions, layer, tokens, groups, width), 0; }
LORRY int attend_bf16 ATTEND(bf16) { return attend(q, o, table, lengths, layer, rows, heads, groups, width, scale), 0; }
LORRY int attend_float ATTEND(float) { return attend(q, o, table, lengths, layer, rows, heads, groups, width, scale), 0; }
LORRY int largest_bf16 LARGEST(bf16) { return largest(logits, places, values, rows, count), 0; }
LORRY int largest_float LARGEST(float) { return largest(logits, places, values, rows, count), 0; }
LORRY int draw_bf16 DRAW(bf16) { return draw(logits, numbers, places, values, rows, count, by), 0; }
LORRY int draw_float DRAW(float) { return draw(logits, numbers, places, values, rows, count, by), 0; }
