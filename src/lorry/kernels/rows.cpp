// Products of a few rows with weights as they lie in memory, on AMX tiles. With few rows the time is that of reading the weights, so
// they are the left operand, which tiles load as it stands: nothing of them is copied or rearranged, only the few rows are.
//
// Every row is computed alone, in a fixed order: its result depends neither on its neighbours nor on the number of threads.
#include "common.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 rows; up to 32 columns are taken at a time.
struct alignas(64) RowTiles {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    explicit RowTiles(long step) {
        bytes[4] = bytes[5] = 2 * step;
        rows[6] = rows[7] = step / 2;
    }
};

// 16 x 16 words: rows become columns.
static inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// x [rows, in], `stride` apart -> for every 16 rows and every pair of columns the 16 pairs side by side, as a tile's right operand has them.
static void pair_rows(const bf16* x, long stride, long rows, long in, long step, uint32_t* to) {
    const __mmask32 some = step == 32 ? ~0u : (1u << step) - 1;
    for (long m = 0; m < rows; m += 16) {
        uint32_t* block = to + m / 16 * in / 2 * 16;
        for (long k = 0; k < in; k += step) {
            __m512i r[16];
            for (long i = 0; i < 16; i++)
                r[i] = m + i < rows ? _mm512_maskz_loadu_epi16(some, x + (m + i) * stride + k) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < step / 2; i++) _mm512_store_si512(block + (k / 2 + i) * 16, r[i]);
        }
    }
}

static inline __m512 wide16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

struct Work {
    const bf16 *w, *bias;
    bf16* y;
    long rows, in, out, step;
    bool add;
    float scale;
};

// 32 outputs (from `at`, weights w) of up to 32 rows (from m, paired in x): weights as left operand straight from memory. While this
// is computed, some of the weights 32 to 64 outputs further on come closer.
template <bool TWO>
static inline void block(const Work& job, long at, const bf16* w, long m, const uint32_t* x, int from, int to) {
    alignas(64) float c[4][256];
    const long in = job.in;
    const uint32_t* x1 = x + in / 2 * 16;
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < in; k += job.step) {
        _tile_loadd(4, w + k, in * 2);
        _tile_loadd(5, w + 16 * in + k, in * 2);
        _tile_loadd(6, x + k / 2 * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (TWO) {
            _tile_loadd(7, x1 + k / 2 * 16, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int r = from; r < to; r++) _mm_prefetch((const char*)(w + (32 + r) * in + k), _MM_HINT_T1);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    if (TWO) {
        _tile_stored(2, c[2], 64);
        _tile_stored(3, c[3], 64);
    }
    const __m512 scale = _mm512_set1_ps(job.scale);
    const __mmask32 some = job.out - at >= 32 ? ~0u : (1u << (job.out - at)) - 1;
    for (int j = 0; j < (TWO ? 2 : 1); j++) {
        __m512i lo[16], hi[16];
        for (int i = 0; i < 16; i++) {
            lo[i] = _mm512_load_si512(c[2 * j] + 16 * i);
            hi[i] = _mm512_load_si512(c[2 * j + 1] + 16 * i);
        }
        transpose(lo);
        transpose(hi);
        for (long i = 0; i < 16 && m + 16 * j + i < job.rows; i++) {
            bf16* to = job.y + (m + 16 * j + i) * job.out + at;
            alignas(64) bf16 before[32];
            if (job.add)
                _mm512_store_si512(before, _mm512_maskz_loadu_epi16(some, to));
            else if (job.bias)
                _mm512_store_si512(before, _mm512_maskz_loadu_epi16(some, job.bias + at));
            else
                _mm512_store_si512(before, _mm512_setzero_si512());
            __m512 a = _mm512_fmadd_ps(_mm512_castsi512_ps(lo[i]), scale, wide16(before));
            __m512 b = _mm512_fmadd_ps(_mm512_castsi512_ps(hi[i]), scale, wide16(before + 16));
            _mm512_mask_storeu_epi16(to, some, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
    }
}

// y [rows, out] = scale * x W^T + bias (or null), where x is `in` columns from the `first` on of rows that are `stride` apart; with
// `add` instead y += scale * x W^T. Returns -1 unless in is a multiple of 32, or even and below.
LORRY int rows_product(const bf16* x, const bf16* w, const bf16* bias, bf16* y, long rows, long in, long out, long stride, long first,
                       long add, float scale) {
    const long step = std::min(in, 32L);
    if (in % step || step % 2) return -1;
    const Work job = {w, bias, y, rows, in, out, step, add != 0, scale};
    uint32_t* paired = (uint32_t*)std::aligned_alloc(64, (rows + 15) / 16 * in / 2 * 64);
    pair_rows(x + first, stride, rows, in, step, paired);
#pragma omp parallel if (in * out > PARALLEL)
    {
        RowTiles config(step);
        _tile_loadconfig(&config);
        std::vector<bf16> rest;
#pragma omp for schedule(static)
        for (long at = 0; at < out; at += 32) {
            const bf16* here = w + at * in;
            if (at + 32 > out) {  // fewer than 32 outputs are left: tiles load 32
                rest.assign(32 * in, 0);
                std::memcpy(rest.data(), here, (out - at) * in * sizeof(bf16));
                here = rest.data();
            }
            const bool more = at + 64 <= out;
            for (long m = 0; m < rows; m += 32) {
                int from = more ? m * 32 / rows : 32, to = more ? std::min((m + 32) * 32 / rows, 32L) : 32;
                if (m + 16 < rows)
                    block<true>(job, at, here, m, paired + m / 16 * in / 2 * 16, from, to);
                else
                    block<false>(job, at, here, m, paired + m / 16 * in / 2 * 16, from, to);
            }
        }
        _tile_release();
    }
    std::free(paired);
    return 0;
}
#endif
