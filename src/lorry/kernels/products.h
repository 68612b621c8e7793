// The matrix product on vectors.
#pragma once
#include "vectors.h"

// A tile of a product is TILE_ROWS x TILE_VECTORS vectors: what the registers hold beside a row of the right operand.
constexpr int TILE_ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

// c [ROWS, VECTORS * LANES] = or += a b. Element (i, k) of a lies at a[i * a_row + k * a_step].
template <int ROWS, int VECTORS>
static inline void product_tile(const float* a, long a_row, long a_step, const float* b, long b_row, float* c, long c_row, long depth,
                                bool add) {
    Floats sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = add ? load(c + i * c_row + v * LANES) : Floats{};
    for (long k = 0; k < depth; k++) {
        Floats right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + k * b_row + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const float left = a[i * a_row + k * a_step];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) store(c + i * c_row + v * LANES, sums[i][v]);
}

// The last rows, fewer than a tile's.
template <int ROWS, int VECTORS>
static inline void product_rest(long rows, const float* a, long a_row, long a_step, const float* b, long b_row, float* c, long c_row,
                                long depth, bool add) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS)
            product_tile<ROWS, VECTORS>(a, a_row, a_step, b, b_row, c, c_row, depth, add);
        else
            product_rest<ROWS - 1, VECTORS>(rows, a, a_row, a_step, b, b_row, c, c_row, depth, add);
    }
}

template <int VECTORS>
static void product_panel(long rows, const float* a, long a_row, long a_step, const float* b, long b_row, float* c, long c_row,
                          long depth, bool add) {
    long i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        product_tile<TILE_ROWS, VECTORS>(a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, depth, add);
    product_rest<TILE_ROWS - 1, VECTORS>(rows - i, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, depth, add);
}

// c [rows, columns] = or += a [rows, depth] b [depth, columns]; columns: whole vectors. a may lie either way (a_row, a_step).
static inline void product(long rows, long columns, long depth, const float* a, long a_row, long a_step, const float* b, long b_row,
                           float* c, long c_row, bool add) {
    static_assert(TILE_VECTORS == 2 || TILE_VECTORS == 4);
    long j = 0;
    for (; j + TILE_VECTORS * LANES <= columns; j += TILE_VECTORS * LANES)
        product_panel<TILE_VECTORS>(rows, a, a_row, a_step, b + j, b_row, c + j, c_row, depth, add);
    switch ((columns - j) / LANES) {
        case 3: product_panel<TILE_VECTORS == 4 ? 3 : 1>(rows, a, a_row, a_step, b + j, b_row, c + j, c_row, depth, add); break;
        case 2: product_panel<2>(rows, a, a_row, a_step, b + j, b_row, c + j, c_row, depth, add); break;
        case 1: product_panel<1>(rows, a, a_row, a_step, b + j, b_row, c + j, c_row, depth, add); break;
    }
}
