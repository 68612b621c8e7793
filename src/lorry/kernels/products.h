// Vectors of floats in the compiler's own terms, as wide as what is compiled for has them, and the matrix product and the
// exponential made of them: one source for AVX-512, AVX2, NEON and whatever is below them.
#pragma once
#include "common.h"

// LANES: floats of a vector. A tile of a product is TILE_ROWS x TILE_VECTORS of them: what the registers hold beside a row of the
// right operand.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int LANES = 4, TILE_ROWS = 6, TILE_VECTORS = 2;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_uvec __attribute__((vector_size(LANES * 2)));

static inline vec load(const float* x) {
    vec v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

static inline void store(float* x, vec v) { std::memcpy(x, &v, sizeof v); }

// The same from and to bfloat16, rounded as `narrow` does.
static inline vec load(const bf16* x) {
    half_uvec half;
    std::memcpy(&half, x, sizeof half);
    uvec bits = __builtin_convertvector(half, uvec) << 16;
    vec v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

static inline void store(bf16* x, vec v) {
    uvec bits;
    std::memcpy(&bits, &v, sizeof bits);
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ivec is_nan = v != v;
    rounded = is_nan ? uvec{} + 0x7fc0 : rounded;
    half_uvec half = __builtin_convertvector(rounded, half_uvec);
    std::memcpy(x, &half, sizeof half);
}

// Fewer than a vector, `count` of them; the other lanes are 0.
template <typename T>
static inline vec load_some(const T* x, long count) {
    T t[LANES] = {};
    std::memcpy(t, x, sizeof(T) * count);
    return load(t);
}

template <typename T>
static inline void store_some(T* x, vec v, long count) {
    T t[LANES];
    store(t, v);
    std::memcpy(x, t, sizeof(T) * count);
}

static inline vec spread(float x) { return x - vec{}; }

constexpr long whole_vectors(long n) { return (n + LANES - 1) / LANES * LANES; }

static inline float sum_of(vec v) {
    float t[LANES];
    store(t, v);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) t[i] += t[i + step];
    return t[0];
}

// The highest lane; a NaN may be passed over.
static inline float highest_of(vec v) {
    float t[LANES];
    store(t, v);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) t[i] = t[i] > t[i + step] ? t[i] : t[i + step];
    return t[0];
}

// 2^x for x <= 127 to about 2 units in the last place. Below 2^-100 it is 0, so that no sum meets denormal numbers; a NaN stays one.
static inline vec exp2_of(vec x) {
    const vec shift = spread(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    vec shifted = x + shift;
    vec f = x - (shifted - shift);
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;
    vec power;
    std::memcpy(&power, &bits, sizeof power);
    vec p = f * 0.00132647238f + 0.00967151299f;
    p = p * f + 0.0555073358f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
    return x < spread(-100.0f) ? vec{} : p * power;
}

// c [ROWS, VECTORS * LANES] = or += a b. Element (i, k) of a lies at a[i * a_row + k * a_step].
template <int ROWS, int VECTORS>
static inline void product_tile(const float* a, long a_row, long a_step, const float* b, long b_row, float* c, long c_row, long depth,
                                bool add) {
    vec sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = add ? load(c + i * c_row + v * LANES) : vec{};
    for (long k = 0; k < depth; k++) {
        vec right[VECTORS];
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
