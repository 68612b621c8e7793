// The matrix product of bfloat16 with float32 sums: on AMX matrix tiles, or in dot products of AVX512-BF16.
//
// `product`: C[rows, cols] (fp32, stride ldc floats) = or += A[rows, depth] B[depth, cols], sides in multiples of 32. A: rows of bf16,
// stride lda bytes. B: pairs of rows side by side, element by element, stride ldb bytes.
#pragma once
#include "common.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles belong to a thread: taken for the length of a scope, released after it.
struct Tiles {
    Tiles() {
        static const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

static inline void product(int rows, int cols, int depth, const void* a, long lda, const void* b, long ldb, float* c, long ldc,
                           bool add) {
    const char *ap = (const char*)a, *bp = (const char*)b;
    for (int i = 0; i < rows; i += 32)
        for (int j = 0; j < cols; j += 32) {
            float* c0 = c + i * ldc + j;
            if (add) {
                _tile_loadd(0, c0, ldc * 4);
                _tile_loadd(1, c0 + 16, ldc * 4);
                _tile_loadd(2, c0 + 16 * ldc, ldc * 4);
                _tile_loadd(3, c0 + 16 * ldc + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
#pragma GCC unroll 4
            for (int k = 0; k < depth; k += 32) {
                _tile_loadd(4, ap + i * lda + k * 2, lda);
                _tile_loadd(5, ap + (i + 16) * lda + k * 2, lda);
                _tile_loadd(6, bp + (k / 2) * ldb + j * 4, ldb);
                _tile_loadd(7, bp + (k / 2) * ldb + (j + 16) * 4, ldb);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c0, ldc * 4);
            _tile_stored(1, c0 + 16, ldc * 4);
            _tile_stored(2, c0 + 16 * ldc, ldc * 4);
            _tile_stored(3, c0 + 16 * ldc + 16, ldc * 4);
        }
}
#else
struct Tiles {};  // nothing to take

#define INLINED static inline __attribute__((always_inline))  // so that a depth known to the caller is known within

// ROWS x VECTORS sums in registers. A pair of A's values is spread over the lanes, against a paired row of B.
template <int ROWS, int VECTORS>
INLINED void product_dots(int depth, const char* a, long lda, const char* b, long ldb, float* c, long ldc, bool add) {
    __m512 sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = add ? _mm512_loadu_ps(c + i * ldc + 16 * v) : _mm512_setzero_ps();
    for (int k = 0; k < depth / 2; k++) {
        __m512bh right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 64 * v);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            int32_t pair;
            std::memcpy(&pair, a + i * lda + 4 * k, 4);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + i * ldc + 16 * v, sums[i][v]);
}

template <int VECTORS>
INLINED void product_columns(int rows, int depth, const char* a, long lda, const char* b, long ldb, float* c, long ldc, bool add) {
    constexpr int HIGH = 6;  // 24 sums of 32 registers where columns are wide
    int i = 0;
    for (; i + HIGH <= rows; i += HIGH) product_dots<HIGH, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    // of a multiple of 32 rows
    if (rows - i == 4) product_dots<4, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    if (rows - i == 2) product_dots<2, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

static inline void product(int rows, int cols, int depth, const void* a, long lda, const void* b, long ldb, float* c, long ldc,
                           bool add) {
    const char *ap = (const char*)a, *bp = (const char*)b;
    int j = 0;
    for (; j + 64 <= cols; j += 64)
        if (depth == 64)  // most often; known to the compiler it is a twentieth faster
            product_columns<4>(rows, 64, ap, lda, bp + j * 4, ldb, c + j, ldc, add);
        else
            product_columns<4>(rows, depth, ap, lda, bp + j * 4, ldb, c + j, ldc, add);
    if (j < cols) product_columns<2>(rows, depth, ap, lda, bp + j * 4, ldb, c + j, ldc, add);
}
#endif
#endif
