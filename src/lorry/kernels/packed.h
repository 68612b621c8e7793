// Matrices of fewer bits than they compute with, as they are packed: how a row of each layout is opened to what is computed with.
#pragma once
#include "vectors.h"

#include <algorithm>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

constexpr long BLOCK = 64;  // values of a flattened matrix that share a scale
constexpr long SCALE_BLOCK = 256;  // scales that share one of their own

// a b + c, each rounded on its own, as torch does: the product goes through memory, where no compiler joins the two.
static inline float product_plus(float a, float b, float c) {
    float product = a * b;
    __asm__("" : "+m"(product));
    return product + c;
}

// A finite half-precision number.
static inline float half(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t word = (uint32_t)(bits & 0x7fff) << 13;
    float out;
    std::memcpy(&out, &word, 4);
    return (bits & 0x8000 ? -0x1p112f : 0x1p112f) * out;
#endif
}

// A finite number of 8 bits, 4 of them exponent and 3 mantissa.
static inline float eighth(uint8_t bits) {
    uint32_t word = (uint32_t)(bits & 0x7f) << 20;
    float out;
    std::memcpy(&out, &word, 4);
    return (bits & 0x80 ? -0x1p120f : 0x1p120f) * out;
}

// The 16 values of a block, rounded once, and then only looked up by codes of which a byte has two, the first in the high half.
template <typename T>
struct Table {
    alignas(64) T values[16];

    explicit Table(const float* scaled) {
        for (int i = 0; i < 16; i++) put(values[i], scaled[i]);
    }

    inline long look_up_wide(const uint8_t*, T*, long) const { return 0; }

    inline void look_up(const uint8_t* codes, T* out, long count) const {
        long i = look_up_wide(codes, out, count);
        for (; i + 1 < count; i += 2) {
            out[i] = values[codes[i / 2] >> 4];
            out[i + 1] = values[codes[i / 2] & 15];
        }
        if (i < count) out[i] = values[codes[i / 2] >> 4];
    }
};

#if defined(__AVX512F__)
// As `narrow`, in all lanes at once.
template <>
inline Table<bf16>::Table(const float* scaled) {
    const __m512 x = _mm512_loadu_ps(scaled);
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm256_store_si256((__m256i*)values, _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0)));
}

// 16 bytes at a time: lanes of 32 bits choose from 16, and hold both values of a byte in bfloat16.
template <>
inline long Table<bf16>::look_up_wide(const uint8_t* codes, bf16* out, long count) const {
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)values)), second = _mm512_slli_epi32(first, 16);
    long i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i / 2)));
        const __m512i high = _mm512_permutexvar_epi32(_mm512_srli_epi32(byte, 4), first);
        // a permutation reads the low four bits of each lane
        _mm512_storeu_si512(out + i, _mm512_or_si512(high, _mm512_permutexvar_epi32(byte, second)));
    }
    return i;
}

template <>
inline long Table<float>::look_up_wide(const uint8_t* codes, float* out, long count) const {
    const __m512 all = _mm512_load_ps(values);
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    long i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i / 2)));
        const __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), all), b = _mm512_permutexvar_ps(byte, all);
        _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(a, low, b));
        _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(a, high, b));
    }
    return i;
}
#elif defined(__AVX2__)
// Eight lanes choose from 16 values: from the lower half and from the upper one, and from the two by the highest bit of their codes.
struct TableHalves {
    __m256 lower, upper;

    inline __m256 look_up(__m256i codes) const {
        const __m256 a = _mm256_permutevar8x32_ps(lower, codes), b = _mm256_permutevar8x32_ps(upper, codes);
        return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
};

static inline TableHalves halves_of(const float* values) { return {_mm256_load_ps(values), _mm256_load_ps(values + 8)}; }
static inline __m256 widen8(const bf16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_load_si128((const __m128i*)x)), 16));
}
static inline TableHalves halves_of(const bf16* values) { return {widen8(values), widen8(values + 8)}; }

// Eight bytes at a time.
template <>
inline long Table<bf16>::look_up_wide(const uint8_t* codes, bf16* out, long count) const {
    const TableHalves all = halves_of(values);
    long i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i / 2)));
        const __m256i first = _mm256_srli_epi32(_mm256_castps_si256(all.look_up(_mm256_srli_epi32(byte, 4))), 16);
        _mm256_storeu_si256((__m256i*)(out + i), _mm256_or_si256(first, _mm256_castps_si256(all.look_up(byte))));
    }
    return i;
}

template <>
inline long Table<float>::look_up_wide(const uint8_t* codes, float* out, long count) const {
    const TableHalves all = halves_of(values);
    long i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i / 2)));
        const __m256 first = all.look_up(_mm256_srli_epi32(byte, 4)), second = all.look_up(byte);
        // by fours: of 0, 1 and 4, 5; of 2, 3 and 6, 7
        const __m256 a = _mm256_unpacklo_ps(first, second), b = _mm256_unpackhi_ps(first, second);
        _mm256_storeu_ps(out + i, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(out + i + 8, _mm256_permute2f128_ps(a, b, 0x31));
    }
    return i;
}
#endif

// Four bits in blocks of the flattened matrix. Scales are floats, or (`scale_levels` not null) eight-bit codes with a scale for every
// 256 and an offset.
struct Flat {
    const uint8_t* codes;
    const void* scales;
    const float *scale_levels, *scale_scales, *offset, *levels;

    inline float scale(long block) const {
        if (!scale_levels) return ((const float*)scales)[block];
        return product_plus(scale_levels[((const uint8_t*)scales)[block]], scale_scales[block / SCALE_BLOCK], *offset);
    }

    template <typename T>
    void row(long r, long columns, T* out) const {
        const long end = (r + 1) * columns;
        for (long at = r * columns; at < end;) {
            const long block = at / BLOCK, next = std::min((block + 1) * BLOCK, end);
            alignas(64) float scaled[16];
            const float by = scale(block);
            for (int i = 0; i < 16; i++) scaled[i] = levels[i] * by;
            const Table<T> table(scaled);
            if (at % 2) *out++ = table.values[codes[at++ / 2] & 15];
            table.look_up(codes + at / 2, out, next - at);
            out += next - at;
            at = next;
        }
    }
};

// Eight bits with the largest absolute value of each row.
struct Rows {
    const int8_t* codes;
    const float* largest;

    template <typename T>
    void row(long r, long columns, T* out) const {
        const float by = largest[r];
        const int8_t* from = codes + r * columns;
        for (long i = 0; i < columns; i++) put(out[i], (float)from[i] * by * (1.0f / 127));
    }
};

// Eight bits of exponent and seven of mantissa: bfloat16.
struct Halves {
    const bf16* codes;

    template <typename T>
    void row(long r, long columns, T* out) const {
        const bf16* from = codes + r * columns;
        for (long i = 0; i < columns; i++) put(out[i], widen(from[i]));
    }
};

// Codes of rows with a grid of scales: every `rows` outputs and `columns` inputs share one, or inputs name theirs in `groups`.
// kind: 0 two codes a byte, 1 whole numbers, 2 signed ones, 3 eight-bit floats. A code counts less its block's zero, times the scale,
// plus the minimum, `rounded` to bfloat16 if asked.
struct Grid {
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;
    const uint16_t* minimums;
    const int32_t* groups;
    long kind, halves, rows, columns, across, rounded;

    inline float scale(long place) const { return halves ? half(((const uint16_t*)scales)[place]) : ((const float*)scales)[place]; }

    // A code counts (code - zero) * by + least; without the one or the other nothing changes, not even the sign of a zero: -0 added
    // leaves every number what it is, 0 added makes 0 of -0, and a base is known by its bits.
    struct Place {
        float by, zero, least;
        inline float value(float code) const { return (code - zero) * by + least; }
    };
    inline Place place(long at) const {
        return {scale(at), zeros ? (float)zeros[at] : 0.0f, minimums ? half(minimums[at]) : -0.0f};
    }

    // out [count] of the codes at a place, code(i) the i-th.
    template <typename T, typename Code>
    inline void open(const Place& here, long count, const Code& code, T* out) const {
        if (rounded && sizeof(T) == sizeof(float)) {
#pragma omp simd
            for (long i = 0; i < count; i++) put(out[i], widen(narrow(here.value(code(i)))));
        } else {
#pragma omp simd
            for (long i = 0; i < count; i++) put(out[i], here.value(code(i)));
        }
    }

    template <typename T>
    void row(long r, long width, T* out) const {
        const long first = r / rows * across;
        const uint8_t* from = codes + r * (kind ? width : (width + 1) / 2);
        if (groups) {
            for (long i = 0; i < width; i++) {
                const float code = kind ? from[i] : i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4;
                open(place(first + groups[i]), 1, [&](long) { return code; }, out + i);
            }
            return;
        }
        for (long at = 0, number = first; at < width; at += columns, number++) {
            const long many = std::min(columns, width - at);
            const Place here = place(number);
            const uint8_t* codes = from + (kind ? at : at / 2);
            T* to = out + at;
            if (kind == 0) {
                alignas(64) float values[16];
                open(here, 16, [](long i) { return (float)i; }, values);
                Table<T>(values).look_up(codes, to, many);
            } else if (kind == 1)
                open(here, many, [&](long i) { return (float)codes[i]; }, to);
            else if (kind == 2)
                open(here, many, [&](long i) { return (float)(int8_t)codes[i]; }, to);
            else
                open(here, many, [&](long i) { return eighth(codes[i]); }, to);
        }
    }
};
