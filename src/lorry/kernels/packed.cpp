// Matrices of few bits opened to what they compute with: a block's 16 values are scaled, and rounded, once, and then only looked up.
#include "common.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr long BLOCK = 64;  // values that share a scale

static inline float convert(float x, float*) { return x; }
static inline bf16 convert(float x, bf16*) { return narrow(x); }

// Two codes a byte, the first in the high half.
template <typename T>
static inline void look_up(const uint8_t* codes, const T* table, T* out, long values) {
    for (long i = 0; i + 1 < values; i += 2) {
        out[i] = table[codes[i / 2] >> 4];
        out[i + 1] = table[codes[i / 2] & 15];
    }
    if (values % 2) out[values - 1] = table[codes[values / 2] >> 4];
}

#ifdef __AVX512F__
// 16 bytes at a time: lanes of 32 bits choose from 16, and hold both values of a byte in bfloat16.
static inline void look_up_block(const uint8_t* codes, const bf16* table, bf16* out) {
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)table)), second = _mm512_slli_epi32(first, 16);
    for (long i = 0; i < BLOCK / 2; i += 16) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
        const __m512i high = _mm512_permutexvar_epi32(_mm512_srli_epi32(byte, 4), first);
        // a permutation reads the low four bits of each lane
        _mm512_storeu_si512(out + 2 * i, _mm512_or_si512(high, _mm512_permutexvar_epi32(byte, second)));
    }
}

static inline void look_up_block(const uint8_t* codes, const float* table, float* out) {
    const __m512 values = _mm512_loadu_ps(table);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (long i = 0; i < BLOCK / 2; i += 16) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
        const __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), values), b = _mm512_permutexvar_ps(byte, values);
        _mm512_storeu_ps(out + 2 * i, _mm512_permutex2var_ps(a, low, b));
        _mm512_storeu_ps(out + 2 * i + 16, _mm512_permutex2var_ps(a, high, b));
    }
}
#else
template <typename T>
static inline void look_up_block(const uint8_t* codes, const T* table, T* out) {
    look_up(codes, table, out, BLOCK);
}
#endif

template <typename T>
static void open_blocks(const uint8_t* codes, const float* scales, const float* levels, T* out, long values) {
    const long blocks = (values + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) if (values > PARALLEL)
    for (long b = 0; b < blocks; b++) {
        alignas(64) T table[16];
        for (int i = 0; i < 16; i++) table[i] = convert(levels[i] * scales[b], (T*)nullptr);
        if ((b + 1) * BLOCK <= values)
            look_up_block(codes + b * BLOCK / 2, table, out + b * BLOCK);
        else
            look_up(codes + b * BLOCK / 2, table, out + b * BLOCK, values - b * BLOCK);
    }
}

template <typename T>
static void open_rows(const int8_t* codes, const float* scales, T* out, long rows, long columns) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < columns; i++) out[r * columns + i] = convert((float)codes[r * columns + i] * scales[r], (T*)nullptr);
}

// out [values] = level of each code times the scale of its block of 64; bfloat16 if `narrow_out`, else float.
LORRY void packed_open_4bit(const uint8_t* codes, const float* scales, const float* levels, void* out, long values, long narrow_out) {
    if (narrow_out)
        open_blocks(codes, scales, levels, (bf16*)out, values);
    else
        open_blocks(codes, scales, levels, (float*)out, values);
}

// out [rows, columns] = code times the scale of its row.
LORRY void packed_open_int8(const int8_t* codes, const float* scales, void* out, long rows, long columns, long narrow_out) {
    if (narrow_out)
        open_rows(codes, scales, (bf16*)out, rows, columns);
    else
        open_rows(codes, scales, (float*)out, rows, columns);
}
