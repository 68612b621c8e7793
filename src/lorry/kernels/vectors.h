// Vectors of floats as wide as the processor's registers, and weights opened into them.
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

// What `open` makes of weights of a type: STEP of them into so many vectors.
template <typename T>
struct Opened {
    static constexpr int VECTORS = 1;
    static constexpr long STEP = LANES;
};
template <>
struct Opened<bf16> {
    static constexpr int VECTORS = 2;
    static constexpr long STEP = 2 * LANES;
};

static inline void open(const float* from, Floats (&to)[1]) { to[0] = load(from); }

// Those of even places, then those of odd ones: a word holds one of each, and either is one operation away from a float. (A dot product of
// bfloat16 pairs, where a processor has one, takes as long as three such products on Sapphire Rapids.)
static inline void open(const bf16* from, Floats (&to)[2]) {
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    Words both;
    std::memcpy(&both, from, sizeof both);
    to[0] = (Floats)(both << 16);
    to[1] = (Floats)(both & 0xffff0000u);
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
