// Vectors of floats as wide as the processor's registers, and how rows of weights and of inputs are multiplied in them.
#pragma once
#include "common.h"
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) { return widen(x); }
static inline void put(float& to, float x) { to = x; }
static inline void put(bf16& to, float x) { to = narrow(x); }

static inline Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

static inline Floats load(const bf16* from) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Words) << 16);
}

#if defined(__AVX512F__)
// Lane i of the result is the sum over the lanes of r[i].
static inline __m512 sums16(const __m512* r) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) a[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}
#endif

// The sum over the lanes of each of COUNT vectors, always in the same order.
template <int COUNT>
static inline void add_lanes(const Floats* from, float* to) {
#if defined(__AVX512F__)
    __m512 all[16];
    for (int i = 0; i < 16; i++) all[i] = i < COUNT ? (__m512)from[i] : _mm512_setzero_ps();
    const __m512 sums = sums16(all);
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << COUNT) - 1), sums);
#else
    for (int i = 0; i < COUNT; i++) {
        float lanes[LANES];
        std::memcpy(lanes, from + i, sizeof lanes);
        for (int half = LANES / 2; half; half /= 2)
            for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
        to[i] = lanes[0];
    }
#endif
}

// How a row of weights meets one of inputs: STEP values at a time, summed in lanes of floats. Inputs are what rows are turned into first.
template <typename T>
struct Pairing {
    typedef float Input;
    typedef Floats Value;
    static constexpr long STEP = LANES;
    template <typename U>
    static inline Value read(const U* from) { return load(from); }
    template <typename U>
    static inline Value read_some(const U* from, long count) {
        U padded[LANES] = {};
        std::memcpy(padded, from, count * sizeof(U));
        return load(padded);
    }
    static inline void add(Floats& sum, Value a, Value b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Pairing<bf16> {
    typedef bf16 Input;
    typedef __m512bh Value;
    static constexpr long STEP = 32;
    static inline Value read(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static inline Value read_some(const bf16* from, long count) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, from); }
    static inline void add(Floats& sum, Value a, Value b) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif
