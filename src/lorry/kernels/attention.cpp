// Causal attention by segment in bfloat16 products, forward and backward: on AMX matrix tiles, or in dot products of AVX512-BF16.
//
// One call serves every segment of a packed batch: tokens of a segment see themselves and what is before them in it, so no mask,
// no padding and no copy of keys per query head exist in memory. Work is cut into blocks of 64 queries by 64 keys.
//
// Scores are formed transposed, S^T = K Q^T, keys as rows and queries as lanes: the softmax's maximum and sum run down the rows
// without crossing lanes, P^T and dS^T are then left operands as they stand (dV = P^T dO, dK = dS^T Q), and right operands after
// pairing neighbouring rows (O^T = V^T P^T, dQ^T = K^T dS^T). A tile's right operand holds pairs of rows side by side ("paired").
//
// Every segment is computed alone, in an order that the shapes and the number of threads fix, whatever its neighbours say.
#include "bf16_products.h"
#if defined(__AVX512BF16__)
#include <omp.h>

#include <algorithm>
#include <vector>

constexpr int N = 64;  // queries and keys of a block
constexpr float LOG2E = 1.44269504f;

// Picks the elements of the two halves of a row in turn: two fp32 vectors narrowed side by side become one paired row.
alignas(64) static const uint16_t HALVES[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// 2^x to 4e-5, a hundredth of what bfloat16 keeps; far below -126 it is 0, a NaN stays one.
static inline __m512 exp2_16(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.009618129f), f, _mm512_set1_ps(0.055504109f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240226507f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147181f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Transpose 16 x 16 dwords.
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Two rows of 32 bf16, interleaved element by element: (a0, b0, a1, b1, ...), first half and second half.
static inline void pair_rows(__m512i a, __m512i b, void* low, void* high) {
    alignas(64) static const uint16_t first[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i index = _mm512_load_si512(first);
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, index, b));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, _mm512_add_epi16(index, _mm512_set1_epi16(16)), b));
}

// The two fp32 vectors as one row of 32 bf16.
static inline __m512i narrow32(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Rows of D bf16 (stride in elements), `count` of N real and the rest zero, as a right operand whose depth is D: [D/2][N] dwords.
template <int D>
static void turned(const bf16* x, long stride, int count, uint32_t* out) {
    for (int r = 0; r < N; r += 16)
        for (int k = 0; k < D / 2; k += 16) {
            __m512i tile[16];
            for (int i = 0; i < 16; i++)
                tile[i] = r + i < count ? _mm512_loadu_si512((const uint32_t*)(x + (r + i) * stride) + k) : _mm512_setzero_si512();
            transpose16(tile);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (k + i) * N + r, tile[i]);
        }
}

// The same rows as a right operand whose depth is the rows: [N/2][D] dwords.
template <int D>
static void paired(const bf16* x, long stride, int count, uint32_t* out) {
    for (int r = 0; r < N; r += 2)
        for (int d = 0; d < D; d += 32) {
            __m512i a = r < count ? _mm512_loadu_si512(x + r * stride + d) : _mm512_setzero_si512();
            __m512i b = r + 1 < count ? _mm512_loadu_si512(x + (r + 1) * stride + d) : _mm512_setzero_si512();
            pair_rows(a, b, out + (r / 2) * D + d, out + (r / 2) * D + d + 16);
        }
}

// The same rows transposed, as a left operand [D][N] bf16.
template <int D>
static void transposed(const bf16* x, long stride, int count, bf16* out) {
    alignas(64) uint32_t dwords[D / 2 * N];
    turned<D>(x, stride, count, dwords);
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int k = 0; k < D / 2; k++)
        for (int r = 0; r < N; r += 16) {
            __m512i v = _mm512_load_si512(dwords + k * N + r);
            _mm256_storeu_si256((__m256i*)(out + 2 * k * N + r), _mm512_cvtepi32_epi16(_mm512_and_si512(v, low)));
            _mm256_storeu_si256((__m256i*)(out + (2 * k + 1) * N + r), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
        }
}

// Rows of D bf16 where they are if all N exist, else a zero-padded copy. Returns the address and sets the stride in bytes.
template <int D>
static const bf16* whole(const bf16* x, long stride, int count, bf16* spare, long* bytes) {
    if (count == N) {
        *bytes = stride * 2;
        return x;
    }
    std::memset(spare, 0, sizeof(bf16) * N * D);
    for (int r = 0; r < count; r++) std::memcpy(spare + r * D, x + r * stride, sizeof(bf16) * D);
    *bytes = D * 2;
    return spare;
}

// A [D][N] fp32 block, transposed, scaled lane-wise by `factor` [N] and written as `count` rows of D bf16.
template <int D>
static void write_turned(const float* block, const float* factor, bf16* out, long stride, int count) {
    for (int r = 0; r < N && r < count; r += 16) {
        __m512 by = _mm512_loadu_ps(factor + r);
        for (int d = 0; d < D; d += 32) {
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++) {
                a[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(block + (d + i) * N + r), by));
                b[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(block + (d + 16 + i) * N + r), by));
            }
            transpose16(a);
            transpose16(b);
            for (int i = 0; i < 16 && r + i < count; i++)
                _mm512_storeu_si512(out + (r + i) * stride + d, narrow32(_mm512_castsi512_ps(a[i]), _mm512_castsi512_ps(b[i])));
        }
    }
}

// The lanes (queries) of vector c that may see key row r of the diagonal block.
static inline __mmask16 seen(int r, int c) {
    int first = r - c;  // lane of the first query that sees the key
    return first <= 0 ? 0xffff : first >= 16 ? 0 : (__mmask16)(0xffff << first);
}

// So many queries or keys of a block are computed: the last block of a segment, and the only one of a short one, are not full.
static inline int padded(int count) { return (count + 31) / 32 * 32; }

static inline int blocks(long length) { return (int)((length + N - 1) / N); }

struct Unit {
    long start, length;  // the segment
    long head, block;    // (first) query head; query block
};

// V^T (or K^T) by blocks of N keys, [heads][blocks][D][N]: where each segment's blocks begin.
struct Turned {
    std::vector<long> first;
    long count = 0;
    Turned(const int64_t* starts, long segments) {
        for (long s = 0; s < segments; s++) {
            first.push_back(count);
            count += blocks(starts[s + 1] - starts[s]);
        }
    }
};

template <int D>
static void turn_all(const bf16* x, const Turned& plan, const int64_t* starts, long segments, long heads, bf16* out) {
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (long h = 0; h < heads; h++)
        for (long s = 0; s < segments; s++) {
            long length = starts[s + 1] - starts[s];
            for (int j = 0; j < blocks(length); j++) {
                int count = (int)std::min<long>(N, length - (long)j * N);
                const bf16* from = x + ((starts[s] + (long)j * N) * heads + h) * D;
                transposed<D>(from, heads * D, count, out + (h * plan.count + plan.first[s] + j) * N * D);
            }
        }
}

// How backward shares its work. A unit is a key/value head of a segment with all its query heads, whose sums it keeps to itself.
// Where that leaves threads idle, and memory allows, it is one query head, and sums over heads that share keys are added up after.
struct Sharing {
    bool alone;
    long longest = 0, area, threads;  // area: fp32 sums of one head over the whole batch
    Sharing(const int64_t* starts, long segments, const Turned& plan, long heads, long groups, long width) {
        constexpr long SPREAD = 64l << 20;  // bytes
        threads = omp_get_max_threads();
        area = plan.count * N * width;
        alone = heads > groups && threads > 1 && segments * groups < 4 * threads && area * heads * 8 <= SPREAD;
        for (long s = 0; s < segments; s++) longest = std::max<long>(longest, blocks(starts[s + 1] - starts[s]) * N);
    }
    long sums(long heads, long width) const { return alone ? 2 * area * heads : 2 * longest * width * threads; }
};

template <int D>
static void forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, const int64_t* starts, long segments,
                    long tokens, long heads, long groups, float scale, char* space) {
    Turned plan(starts, segments);
    bf16* vt = (bf16*)space;
    turn_all<D>(v, plan, starts, segments, groups, vt);
    std::vector<Unit> units;
    std::vector<long> segment;
    for (long s = 0; s < segments; s++)
        for (long h = 0; h < heads; h++)
            for (int i = blocks(starts[s + 1] - starts[s]) - 1; i >= 0; i--) {
                units.push_back({starts[s], starts[s + 1] - starts[s], h, i});
                segment.push_back(s);
            }
    const float scale2 = scale * LOG2E;
#pragma omp parallel
    {
        Tiles tiles;
        alignas(64) uint32_t qt[D / 2 * N], p[N / 2 * N];
        alignas(64) float st[N * N], ot[D * N], top[N], sum[N];
        alignas(64) bf16 spare[N * D];
        const __m512i interleave = _mm512_load_si512(HALVES);
#pragma omp for schedule(dynamic, 1)
        for (size_t w = 0; w < units.size(); w++) {
            const Unit& u = units[w];
            long g = u.head / (heads / groups), first = u.block * N;
            int count = (int)std::min<long>(N, u.length - first), width = padded(count);
            turned<D>(q + ((u.start + first) * heads + u.head) * D, heads * D, count, qt);
            for (int c = 0; c < N; c++) top[c] = -INFINITY, sum[c] = 0;
            for (int j = 0; j <= u.block; j++) {
                long bytes;
                int keys = (int)std::min<long>(N, u.length - (long)j * N), deep = padded(keys);
                const bf16* kj = whole<D>(k + ((u.start + (long)j * N) * groups + g) * D, groups * D, keys, spare, &bytes);
                product(deep, width, D, kj, bytes, qt, N * 4, st, N, false);
                bool diagonal = j == u.block;
                __m512 fix[N / 16];
                for (int c = 0; c < width; c += 16) {
                    __m512 old = _mm512_load_ps(top + c), high = old, total = _mm512_setzero_ps();
                    if (diagonal)
                        for (int r = 0; r < deep; r++) high = _mm512_mask_max_ps(high, seen(r, c), high, _mm512_load_ps(st + r * N + c));
                    else
                        for (int r = 0; r < deep; r++) high = _mm512_max_ps(high, _mm512_load_ps(st + r * N + c));
                    const __m512 by = _mm512_set1_ps(scale2), level = _mm512_mul_ps(high, by);
                    for (int r = 0; r < deep; r += 2) {
                        __m512 a = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(st + r * N + c), by, level));
                        __m512 b = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(st + (r + 1) * N + c), by, level));
                        if (diagonal) a = _mm512_maskz_mov_ps(seen(r, c), a), b = _mm512_maskz_mov_ps(seen(r + 1, c), b);
                        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
                        _mm512_store_si512(p + (r / 2) * N + c, _mm512_permutexvar_epi16(interleave, narrow32(a, b)));
                    }
                    fix[c / 16] = j > 0 ? exp2_16(_mm512_fmsub_ps(old, by, level)) : _mm512_setzero_ps();
                    _mm512_store_ps(sum + c, _mm512_fmadd_ps(_mm512_load_ps(sum + c), fix[c / 16], total));
                    _mm512_store_ps(top + c, high);
                }
                if (j > 0)
                    for (int d = 0; d < D; d++)
                        for (int c = 0; c < width; c += 16)
                            _mm512_store_ps(ot + d * N + c, _mm512_mul_ps(_mm512_load_ps(ot + d * N + c), fix[c / 16]));
                product(D, width, deep, vt + (g * plan.count + plan.first[segment[w]] + j) * N * D, N * 2, p, N * 4, ot, N, j > 0);
            }
            alignas(64) float by[N];
            for (int c = 0; c < N; c++) by[c] = 1.0f / sum[c];
            write_turned<D>(ot, by, o + ((u.start + first) * heads + u.head) * D, heads * D, count);
            for (int c = 0; c < count; c++) lse[u.head * tokens + u.start + first + c] = top[c] * scale2 + std::log2(sum[c]);
        }
    }
}

// Write dK and dV of a segment's key/value head g from `count` pairs of fp32 sums that lie `apart` floats from each other.
template <int D>
static void finish(const float* dks, const float* dvs, long count, long apart, const Unit& u, long g, long groups, bf16* dk, bf16* dv,
                   float scale) {
    for (long t = 0; t < u.length; t++) {
        bf16 *kr = dk + ((u.start + t) * groups + g) * D, *vr = dv + ((u.start + t) * groups + g) * D;
        for (int d = 0; d < D; d++) {
            float a = 0, b = 0;
            for (long i = 0; i < count; i++) a += dks[i * apart + t * D + d], b += dvs[i * apart + t * D + d];
            kr[d] = narrow(a * scale), vr[d] = narrow(b);
        }
    }
}

template <int D>
static void backward(const bf16* q, const bf16* k, const bf16* v, const bf16* o, const float* lse, const bf16* go, bf16* dq, bf16* dk,
                     bf16* dv, const int64_t* starts, long segments, long tokens, long heads, long groups, float scale,
                     char* space) {
    Turned plan(starts, segments);
    const Sharing how(starts, segments, plan, heads, groups, D);
    const bool alone = how.alone;
    const long together = heads / groups, share = alone ? 1 : together, longest = how.longest, area = how.area;
    bf16* kt = (bf16*)space;
    turn_all<D>(k, plan, starts, segments, groups, kt);
    float* all_sums = (float*)(space + sizeof(bf16) * plan.count * N * D * groups);
    std::vector<Unit> units;
    std::vector<long> segment;
    for (long s = 0; s < segments; s++)
        for (long h = 0; h < heads; h += share) {
            units.push_back({starts[s], starts[s + 1] - starts[s], h, 0});
            segment.push_back(s);
        }
    const float scale2 = scale * LOG2E;
#pragma omp parallel
    {
        Tiles tiles;
        alignas(64) uint32_t qt[D / 2 * N], gt[D / 2 * N], qp[N / 2 * D], gp[N / 2 * D], dsp[N / 2 * N];
        alignas(64) float st[N * N], dpt[N * N], dqt[D * N], level[N], delta[N], even[N];
        alignas(64) bf16 pt[N * N], dst[N * N], spare_k[N * D], spare_v[N * D];
        float* own = all_sums + (alone ? 0 : 2 * longest * D * omp_get_thread_num());
        for (int c = 0; c < N; c++) even[c] = scale;
        const __m512i interleave = _mm512_load_si512(HALVES);
#pragma omp for schedule(dynamic, 1)
        for (size_t w = 0; w < units.size(); w++) {
            const Unit& u = units[w];
            int n = blocks(u.length);
            const long g = u.head / together;
            float* dks = alone ? all_sums + 2 * area * u.head + plan.first[segment[w]] * N * D : own;
            float* dvs = dks + (alone ? area : longest * D);
            std::memset(dks, 0, sizeof(float) * n * N * D);
            std::memset(dvs, 0, sizeof(float) * n * N * D);
            for (long h = u.head; h < u.head + share; h++)
                for (int i = 0; i < n; i++) {
                    long first = u.start + (long)i * N;
                    int count = (int)std::min<long>(N, u.length - (long)i * N), width = padded(count);
                    const bf16 *qi = q + (first * heads + h) * D, *gi = go + (first * heads + h) * D, *oi = o + (first * heads + h) * D;
                    turned<D>(qi, heads * D, count, qt);
                    turned<D>(gi, heads * D, count, gt);
                    paired<D>(qi, heads * D, count, qp);
                    paired<D>(gi, heads * D, count, gp);
                    for (int c = 0; c < N; c++) {
                        float dot = 0;
                        if (c < count)
#pragma omp simd reduction(+ : dot)
                            for (int d = 0; d < D; d++) dot += widen(oi[c * heads * D + d]) * widen(gi[c * heads * D + d]);
                        delta[c] = dot;
                        level[c] = c < count ? lse[h * tokens + first + c] : 3e38f;  // beyond the segment: probability 0
                    }
                    for (int j = 0; j <= i; j++) {
                        long kb, vb;
                        int keys = (int)std::min<long>(N, u.length - (long)j * N), deep = padded(keys);
                        long at = ((u.start + (long)j * N) * groups + g) * D;
                        const bf16* kj = whole<D>(k + at, groups * D, keys, spare_k, &kb);
                        const bf16* vj = whole<D>(v + at, groups * D, keys, spare_v, &vb);
                        product(deep, width, D, kj, kb, qt, N * 4, st, N, false);
                        product(deep, width, D, vj, vb, gt, N * 4, dpt, N, false);
                        bool diagonal = i == j;
                        for (int c = 0; c < width; c += 32) {
                            __m512 l0 = _mm512_load_ps(level + c), l1 = _mm512_load_ps(level + c + 16);
                            __m512 e0 = _mm512_load_ps(delta + c), e1 = _mm512_load_ps(delta + c + 16);
                            const __m512 by = _mm512_set1_ps(scale2);
                            for (int r = 0; r < deep; r += 2) {
                                __m512 p[4], ds[4];
                                for (int z = 0; z < 2; z++) {
                                    const float *sr = st + (r + z) * N + c, *dr = dpt + (r + z) * N + c;
                                    p[2 * z] = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(sr), by, l0));
                                    p[2 * z + 1] = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(sr + 16), by, l1));
                                    if (diagonal) {
                                        p[2 * z] = _mm512_maskz_mov_ps(seen(r + z, c), p[2 * z]);
                                        p[2 * z + 1] = _mm512_maskz_mov_ps(seen(r + z, c + 16), p[2 * z + 1]);
                                    }
                                    ds[2 * z] = _mm512_mul_ps(p[2 * z], _mm512_sub_ps(_mm512_load_ps(dr), e0));
                                    ds[2 * z + 1] = _mm512_mul_ps(p[2 * z + 1], _mm512_sub_ps(_mm512_load_ps(dr + 16), e1));
                                    _mm512_store_si512(pt + (r + z) * N + c, narrow32(p[2 * z], p[2 * z + 1]));
                                    _mm512_store_si512(dst + (r + z) * N + c, narrow32(ds[2 * z], ds[2 * z + 1]));
                                }
                                _mm512_store_si512(dsp + (r / 2) * N + c, _mm512_permutexvar_epi16(interleave, narrow32(ds[0], ds[2])));
                                _mm512_store_si512(dsp + (r / 2) * N + c + 16,
                                                   _mm512_permutexvar_epi16(interleave, narrow32(ds[1], ds[3])));
                            }
                        }
                        product(deep, D, width, pt, N * 2, gp, D * 4, dvs + (long)j * N * D, D, true);
                        product(deep, D, width, dst, N * 2, qp, D * 4, dks + (long)j * N * D, D, true);
                        const bf16* kjt = kt + (g * plan.count + plan.first[segment[w]] + j) * N * D;
                        product(D, width, deep, kjt, N * 2, dsp, N * 4, dqt, N, j > 0);
                    }
                    write_turned<D>(dqt, even, dq + (first * heads + h) * D, heads * D, count);
                }
            if (!alone) finish<D>(dks, dvs, 1, 0, u, g, groups, dk, dv, scale);
        }
        if (alone)
#pragma omp for schedule(static)
            for (size_t w = 0; w < units.size(); w += together) {
                const float* first = all_sums + 2 * area * units[w].head + plan.first[segment[w]] * N * D;
                finish<D>(first, first + area, together, 2 * area, units[w], units[w].head / together, groups, dk, dv, scale);
            }
    }
}

#define FOR_WIDTH(call)      \
    switch (width) {         \
        case 32: call(32);   \
        case 64: call(64);   \
        case 96: call(96);   \
        case 128: call(128); \
    }

// Bytes that the two calls below want as `space`, aligned to 64.
LORRY long attention_space(const int64_t* starts, long segments, long /*tokens*/, long heads, long groups, long width,
                           long with_backward) {
    Turned plan(starts, segments);
    long turned = sizeof(bf16) * plan.count * N * width * groups;
    if (!with_backward) return turned;
    return turned + sizeof(float) * Sharing(starts, segments, plan, heads, groups, width).sums(heads, width);
}

// q, o [tokens, heads, width], k, v [tokens, groups, width], lse [heads, tokens] in powers of two, starts [segments + 1].
LORRY void attention_forward(const bf16* q, const bf16* k, const bf16* v, bf16* o, float* lse, const int64_t* starts, long segments,
                             long tokens, long heads, long groups, long width, float scale, char* space) {
#define CALL(D) return forward<D>(q, k, v, o, lse, starts, segments, tokens, heads, groups, scale, space)
    FOR_WIDTH(CALL)
#undef CALL
}

LORRY void attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* o, const float* lse, const bf16* go, bf16* dq,
                              bf16* dk, bf16* dv, const int64_t* starts, long segments, long tokens, long heads, long groups,
                              long width, float scale, char* space) {
#define CALL(D) return backward<D>(q, k, v, o, lse, go, dq, dk, dv, starts, segments, tokens, heads, groups, scale, space)
    FOR_WIDTH(CALL)
#undef CALL
}
#endif
